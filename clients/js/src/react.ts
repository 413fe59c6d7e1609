import { useEffect, useRef, useState } from "react";

import { connect, type Options, type State } from "./index.js";

/**
 * Stay connected while the component is mounted; returns how things stand.
 *
 * It connects anew when `url`, `device` or `key` changes: let `key` name the user, so that another one
 * gets a connection of their own. The functions in `options` may change with every rendering. `null`
 * instead of options, for nobody is signed in, closes the connection.
 */
export function usePokebridge(options: Options | null, key = ""): State {
  const [state, setState] = useState<State>("connecting");
  const latest = useRef(options);
  useEffect(() => {
    latest.current = options;
  });
  const { url, device } = options ?? {};
  useEffect(() => {
    if (!latest.current) return setState("closed");
    const client = connect(forwarding(latest));
    setState(client.state);
    const unlisten = client.on("state", setState);
    return () => {
      unlisten();
      client.close();
    };
  }, [url, device, key]);
  return state;
}

/** Options whose functions are those of the latest rendering. */
function forwarding(latest: { current: Options | null }): Options {
  const options = latest.current!;
  const now = () => latest.current ?? options;
  const token = () => {
    const current = now().token;
    return typeof current === "string" ? current : current();
  };
  return options.onMessages
    ? { ...options, token, onMessages: (messages) => now().onMessages?.(messages) }
    : { ...options, token, onPoke: (cursor) => now().onPoke?.(cursor) };
}
