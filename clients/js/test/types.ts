// The API as its users call it. Nothing here runs: `npm run check` compiles it against dist/.
import { connect, type Client, type Listening, type Message, type State } from "@pokebridge/client";
import { useListen, usePokebridge, usePokebridgeClient } from "@pokebridge/client/react";
import { WebSocket } from "ws";

const url = "https://bridge.example.org";
const token = async () => "a.b.c";

const client: Client = connect({ url, token, onMessages: (messages: Message[]) => void messages });
connect({ url, token: "a.b.c", onMessages: async ([first]) => console.log(first?.body.text) });
connect({ url, token, onPoke: () => {} });
connect({ url, token, onPoke: async (cursor) => cursor + 1, cursor: 7, device: "phone", share: false });
connect({ url, token, onPoke: async () => {}, WebSocket, fetch, policy: { base_s: 0.5 } });

const off: () => void = client.on("state", (state: State) => state === "connected");
client.on("error", (error: unknown) => error);
client.on("step", (step) => step.type === "pull" && step.after.toFixed());
const cursor: number = client.cursor;
const state: "connecting" | "connected" | "stopped" | "closed" = client.state;
const code: number | undefined = client.stopCode;
client.wake();
client.close();
usePokebridge({ url, token, onPoke: () => {} }, "bob") satisfies State;
usePokebridge(null);
const listening: Listening = client.listen("urn:doc:7", { token, onPoke: () => {} });
client.listen("urn:doc:8", { token, onMessages: async ([first]) => console.log(first?.body.text), cursor: 7 }).close();
listening.on("state", (state: State) => state === "stopped");
const shared: Client | null = usePokebridgeClient({ url, token, onPoke: () => {} }, "bob");
useListen(shared, "urn:doc:7", { token, onPoke: () => {} }) satisfies State;
void [off, cursor, state, code];

// @ts-expect-error: neither onMessages nor onPoke
connect({ url, token });
// @ts-expect-error: neither onMessages nor onPoke
client.listen("urn:doc:7", { token });
// @ts-expect-error: what is listened to has no listeners of its own
listening.listen("urn:doc:8", { token, onPoke: () => {} });
// @ts-expect-error: both
connect({ url, token, onMessages: () => {}, onPoke: () => {} });
// @ts-expect-error: a token is needed
connect({ url, onPoke: () => {} });
// @ts-expect-error: the new cursor is a number
connect({ url, token, onPoke: () => "7" });
// @ts-expect-error: no such delay
connect({ url, token, onPoke: () => {}, policy: { base_ms: 5 } });
// @ts-expect-error: no such event
client.on("message", () => {});
// @ts-expect-error: read-only
client.cursor = 7;
// @ts-expect-error: read-only
client.state = "closed";
