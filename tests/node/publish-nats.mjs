// Publishes with NATS's own client. Arguments: server, subject. Each line of stdin is a signal as JSON: {"body":…,"shard":…}.
import { connect } from "@nats-io/transport-node";
import { createInterface } from "node:readline";

const [servers, subject] = process.argv.slice(2);
const connection = await connect({ servers });
for await (const line of createInterface({ input: process.stdin })) {
  const { body, shard } = JSON.parse(line);
  connection.publish(shard === null ? subject : `${subject}.${shard}`, body);
}
await connection.drain();
