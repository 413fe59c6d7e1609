// The harness in Node: a line on stdin is an expression, its value goes to stdout as a line of JSON.
import { createRequire } from "node:module";
import { createInterface } from "node:readline";

import { connect } from "../../clients/js/dist/index.js";
import { makeHarness } from "./harness.js";

const require = createRequire(new URL("../../clients/js/package.json", import.meta.url));
const runtime = process.env.OWN_WEBSOCKET ? {} : { WebSocket: require("ws").WebSocket };
globalThis.connect = connect;
globalThis.renew = () => {
  globalThis.harness = makeHarness(connect, runtime);
};
renew();

for await (const line of createInterface({ input: process.stdin })) {
  const value = await (0, eval)(JSON.parse(line));
  console.log(JSON.stringify(value) ?? "null");
}
process.exit();
