// A worker that sleeps until there is work. A job is a message to it, a result is a message to the job's sender.
import { connect } from "@pokebridge/client";
import { WebSocket } from "ws";

const url = process.env.BRIDGE ?? "http://127.0.0.1:8080";
const worker = process.env.WORKER ?? "urn:worker:adder";

// Only an instance with --dev hands out tokens. In production your own service signs them.
async function getToken() {
  const response = await fetch(`${url}/v1/dev/token`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ sub: worker, scope: "send" }),
  });
  if (!response.ok) throw new Error(`no token: ${response.status}`);
  return (await response.json()).token;
}

async function answer({ id, sender, body }) {
  if (!Array.isArray(body?.numbers) || !body.numbers.every(Number.isFinite)) {
    console.error(`${sender}: not a job: ${JSON.stringify(body)}`); // an exception would make it come again for ever
    return;
  }
  const sum = body.numbers.reduce((total, number) => total + number, 0);
  const response = await fetch(`${url}/v1/messages`, {
    method: "POST",
    headers: { "Content-Type": "application/json", Authorization: `Bearer ${await getToken()}` },
    // The answer's id comes from the job's id, so a job that is done twice is answered once.
    body: JSON.stringify({ recipient: sender, id: `sum-${id}`, body: { sum } }),
  });
  if (!response.ok) throw new Error(`the answer was refused: ${response.status}`);
  console.log(`${sender}: ${body.numbers.join(" + ")} = ${sum}`);
}

const client = connect({
  url,
  token: getToken,
  WebSocket, // Node 20 has no WebSocket
  // After an exception the job comes again. It is done once its answer is committed.
  onMessages: async (jobs) => {
    for (const job of jobs) await answer(job);
  },
});
client.on("state", (state) => console.log(state));
client.on("error", (error) => console.error(String(error)));
for (const signal of ["SIGINT", "SIGTERM"]) process.once(signal, () => client.close());
