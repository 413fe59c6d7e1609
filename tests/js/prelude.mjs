// What the documentation's snippets take for granted. Environment: BRIDGE, RECIPIENT.
import { WebSocket } from "ws";

globalThis.WebSocket ??= WebSocket; // Node 20 has none
const stored = new Map();
globalThis.localStorage = {
  getItem: (key) => stored.get(key) ?? null,
  setItem: (key, value) => stored.set(key, value),
};
globalThis.show = (what) => console.log("shown:", JSON.stringify(what));
globalThis.getToken = async (sub = process.env.RECIPIENT) => {
  const response = await fetch(`${process.env.BRIDGE}/v1/dev/token`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ sub, scope: "send poke admin" }),
  });
  return (await response.json()).token;
};
