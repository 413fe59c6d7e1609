import { Client, type Options } from "./client.js";

export type { Client, ClientEvents, Listening, ListenOptions, Options, SocketLike, State } from "./client.js";
export type { Policy } from "./core.js";
export type { Action, Event } from "./events.js";
export type { Transport } from "./transports.js";
export type { Message, OnMessages, OnPoke } from "./pulling.js";

/**
 * Connect to the bridge, and stay connected until `close()`.
 *
 * ```ts
 * const client = connect({ url: "https://bridge.example.org", token: getToken, onMessages: show });
 * client.on("state", (state) => console.log(state));
 * ```
 *
 * It reconnects, renews its token and retries by itself.
 *
 * @throws TypeError an option is missing or invalid, or the runtime has no WebSocket.
 */
export function connect(options: Options): Client {
  return new Client(options);
}
