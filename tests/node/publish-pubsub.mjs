// Publishes with Google's client. Arguments: project, topic. Each line of stdin is a signal as JSON: {"body":…,"shard":…}.
import { PubSub } from "@google-cloud/pubsub";
import { createInterface } from "node:readline";

const [projectId, name] = process.argv.slice(2);
const client = new PubSub({ projectId }); // honours PUBSUB_EMULATOR_HOST
const topic = client.topic(name);
const published = [];
for await (const line of createInterface({ input: process.stdin })) {
  const { body, shard } = JSON.parse(line);
  const attributes = shard === null ? {} : { shard: String(shard) };
  published.push(topic.publishMessage({ data: Buffer.from(body), attributes }));
}
await Promise.all(published);
await client.close();
