// Node's HTTP server, which verifies an HS256 token and answers what a pull without news answers:
// `node yardstick.cjs SECRET`. It prints its port.
const { createHmac, timingSafeEqual } = require("node:crypto");
const { createServer } = require("node:http");

const secret = process.argv[2];

function isValid(token) {
  const end = token.lastIndexOf(".");
  const expected = createHmac("sha256", secret).update(token.slice(0, end)).digest();
  const given = Buffer.from(token.slice(end + 1), "base64url");
  if (given.length !== expected.length || !timingSafeEqual(given, expected)) return false;
  const claims = JSON.parse(Buffer.from(token.slice(0, end).split(".")[1], "base64url").toString());
  return claims.exp > Date.now() / 1000;
}

const server = createServer((request, response) => {
  const [scheme, token] = (request.headers.authorization ?? "").split(" ");
  const status = scheme === "Bearer" && isValid(token) ? 200 : 401;
  const body = JSON.stringify({ messages: [], version: 0, more: false });
  response.writeHead(status, { "content-type": "application/json", "content-length": body.length });
  response.end(body);
});
server.keepAliveTimeout = 0;
server.listen(0, "127.0.0.1", () => console.log(server.address().port));
