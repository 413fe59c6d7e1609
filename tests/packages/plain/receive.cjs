const { connect } = require("@pokebridge/client");
const { Publisher } = require("@pokebridge/client/server");
const { WebSocket } = require("ws");

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
new Publisher({ url, token: sender }).send(recipient, "from a CommonJS module");
