import { connect } from "@pokebridge/client";
import { Publisher } from "@pokebridge/client/server";
import { WebSocket } from "ws";

const { URL: url, TOKEN: token, SENDER: sender, RECIPIENT: recipient } = process.env;
const client = connect({
  url,
  token,
  WebSocket,
  onMessages: ([{ body }]) => {
    console.log(body);
    client.close();
  },
});
await new Publisher({ url, token: sender }).send(recipient, "from an ES module");
