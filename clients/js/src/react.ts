import { useEffect, useRef, useState } from "react";

import { connect, type Client, type Listening, type ListenOptions, type Options, type State } from "./index.js";

/**
 * Stay connected while the component is mounted; returns the client's state.
 *
 * It reconnects when `url`, `device` or `key` changes. Let `key` name the user, so that each user gets their
 * own connection. The functions in `options` may change with every rendering. If nobody is signed in, pass
 * `null` instead of options: that closes the connection.
 */
export function usePokebridge(options: Options | null, key = ""): State {
  return useStateOf(usePokebridgeClient(options, key), options ? "connecting" : "closed");
}

/** Like `usePokebridge`, but returns the client, for `useListen`. Null while there is none. */
export function usePokebridgeClient(options: Options | null, key = ""): Client | null {
  const [client, setClient] = useState<Client | null>(null);
  const latest = useLatest(options);
  const { url, device } = options ?? {};
  useEffect(() => {
    if (!latest.current) return setClient(null);
    const connected = connect(forwarding(latest));
    setClient(connected);
    return () => connected.close();
  }, [url, device, key]);
  return client;
}

/**
 * Call `client.listen` for `recipient` while the component is mounted. Returns the state of that listening.
 *
 * The functions in `options` may change with every rendering. A client can listen to a recipient only once: let
 * one component do it and pass the data on.
 */
export function useListen(client: Client | null, recipient: string | null, options: ListenOptions): State {
  const [listening, setListening] = useState<Listening | null>(null);
  const latest = useLatest<ListenOptions | null>(options);
  useEffect(() => {
    if (!client || !recipient || client.state === "closed" || client.state === "stopped") return setListening(null);
    const begun = client.listen(recipient, forwarding(latest));
    setListening(begun);
    return () => begun.close();
  }, [client, recipient]);
  return useStateOf(listening, client && recipient ? "connecting" : "closed");
}

function useLatest<T>(value: T): { current: T } {
  const latest = useRef(value);
  useEffect(() => {
    latest.current = value;
  });
  return latest;
}

/** The state of `client`, or `without` if there is no client. */
function useStateOf(client: Listening | null, without: State): State {
  const [state, setState] = useState<State>(without);
  useEffect(() => {
    if (!client) return setState(without);
    setState(client.state);
    return client.on("state", setState) as () => void;
  }, [client, without]);
  return state;
}

/** Options whose functions call those of the latest rendering. Missing functions stay missing. */
function forwarding<T extends ListenOptions>(latest: { current: T | null }): T {
  const options: Record<string, any> = latest.current!;
  const now = (): Record<string, any> => latest.current ?? options;
  const forwarded = { ...options };
  if (options.token) {
    forwarded.token = () => (typeof now().token === "string" ? now().token : now().token());
  }
  for (const name of ["onMessages", "onPoke"]) {
    if (options[name]) forwarded[name] = (argument: unknown) => now()[name]?.(argument);
  }
  return forwarded as T;
}
