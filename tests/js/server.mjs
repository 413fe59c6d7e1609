// What a backend does with @pokebridge/client/server; prints one line of JSON.
import { createRequire } from "node:module";
import { HttpError, Publisher } from "@pokebridge/client/server";

const { BRIDGE: url, TOKEN: token } = process.env;
const told = {};

// The answer to the first attempt is lost after the commit; the second meets a proxy's error page.
const lost = [];
const flaky = async (target, options) => {
  lost.push(JSON.parse(options.body).id);
  if (lost.length === 1) {
    await (await fetch(target, options)).text();
    throw new TypeError("the line is cut");
  }
  return lost.length === 2 ? new Response("<h1>Bad gateway</h1>", { status: 502 }) : fetch(target, options);
};
const publisher = new Publisher({ url, token: async () => token, fetch: flaky });
told.receipt = await publisher.send("urn:user:bob", { text: "hello" }, { ttl_s: 600 });
told.ids = new Set(lost).size;
told.attempts = lost.length;

const direct = new Publisher({ url: `${url}/`, token });
told.first = await direct.send("urn:user:bob", { text: "again" }, { id: "order-7" });
told.second = await direct.send("urn:user:bob", { text: "again" }, { id: "order-7" });
await direct.poke("urn:user:bob");
await direct.poke(Array.from({ length: 1500 }, (_, number) => `urn:user:${number}`));
await direct.disconnect("urn:user:bob");
await direct.disconnect("urn:user/eve?", { revoke: true });

const failure = async (call) => call.then(() => "none", (error) => error);
const refused = await failure(new Publisher({ url, token: "e30.e30.c2ln" }).send("urn:user:bob", 1));
told.refused = [refused instanceof HttpError, refused.status, refused.message];
told.invalid = (await failure(direct.send("no recipient", 1))).status;
const dead = new Publisher({ url: "http://127.0.0.1:9", token, timeout_s: 0.3 });
told.dead = (await failure(dead.poke("urn:user:bob"))).message;

const chunk = new Uint8Array(256 * 1024).fill(32);
const endless = async () => new Response(new ReadableStream({ pull: (controller) => controller.enqueue(chunk) }));
told.endless = (await failure(new Publisher({ url, token, fetch: endless, timeout_s: 0 }).poke("urn:user:bob"))).message;

const withSecrets = [() => new Publisher({ url: "https://shop:secret@bridge", token })];
for (const bad of ["secret\n.2", "sécret", ""]) {
  withSecrets.push(() => new Publisher({ url, token: bad }));
  withSecrets.push(() => new Publisher({ url, token: () => bad }).send("urn:user:bob", 1));
}
told.withSecrets = await Promise.all(withSecrets.map((call) => failure((async () => call())()).then(String)));

told.cjs = typeof createRequire(import.meta.url)("@pokebridge/client/server").Publisher;
console.log(JSON.stringify(told));
