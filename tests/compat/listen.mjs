// Runs JavaScript clients and prints a JSON line for each message. Arguments: the client's module,
// and a JSON list of clients, each with the url, token, device and policy to use. One of this release
// may listen, with the token of each recipient.
import { createRequire } from "node:module";

const [module, clients] = process.argv.slice(2);
const { WebSocket } = createRequire(new URL("../../clients/js/package.json", import.meta.url))("ws");
const { connect } = await import(module);

for (const { listen = {}, ...client } of JSON.parse(clients)) {
  const show = ({ body }) => console.log(JSON.stringify({ device: client.device, body }));
  const onMessages = (messages) => messages.forEach(show);
  const its = connect({ ...client, WebSocket, onMessages });
  for (const [recipient, token] of Object.entries(listen)) its.listen(recipient, { token, onMessages });
}
