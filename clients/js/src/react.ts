import { useEffect, useRef, useState } from "react";

import { connect, type Options, type State } from "./index.js";

/**
 * Stay connected while the component is mounted; returns the client's state.
 *
 * It connects anew when `url`, `device` or `key` changes: let `key` name the user, so that each user
 * gets their own connection. The functions in `options` may change with every rendering. Pass `null`
 * instead of options when nobody is signed in: that closes the connection.
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

/** Options whose functions call those of the latest rendering. What is missing stays missing. */
function forwarding(latest: { current: Options | null }): Options {
  const options: Record<string, any> = latest.current!;
  const now = (): Record<string, any> => latest.current ?? options;
  const forwarded = { ...options };
  if (options.token) {
    forwarded.token = () => (typeof now().token === "string" ? now().token : now().token());
  }
  for (const name of ["onMessages", "onPoke"]) {
    if (options[name]) forwarded[name] = (argument: unknown) => now()[name]?.(argument);
  }
  return forwarded as Options;
}
