// Connects with `ws`, prints every message as a line, and pulls nothing. Arguments: URL, token.
import WebSocket from "ws";

const [url, token] = process.argv.slice(2);
const socket = new WebSocket(url, ["pokebridge.v1", `bearer.${token}`]);
socket.on("open", () => console.log(JSON.stringify({ type: "open", protocol: socket.protocol })));
socket.on("message", (data, isBinary) => console.log(isBinary ? "binary" : data.toString()));
socket.on("close", (code) => console.log(JSON.stringify({ type: "close", code })));
socket.on("error", (error) => console.log(JSON.stringify({ type: "error", error: error.message })));
process.stdin.on("data", (line) => socket.send(line.toString().trim()));
