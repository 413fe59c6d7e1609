// Rendered on the server, which sends a message first.
import { Publisher } from "@pokebridge/client/server";

import { Inbox } from "./inbox";

type Query = Promise<{ url: string; token: string; sender: string }>;

export default async function Page({ searchParams }: { searchParams: Query }) {
  const { url, token, sender } = await searchParams;
  await new Publisher({ url, token: sender }).send("urn:user:next", "from the server", { id: "first" });
  return <Inbox url={url} token={token} />;
}
