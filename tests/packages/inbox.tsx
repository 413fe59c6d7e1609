"use client"; // for Next, because it has a state

import type { Message, State } from "@pokebridge/client";
import { usePokebridge } from "@pokebridge/client/react";
import { useState } from "react";

export function Inbox({ url, token }: { url: string; token: string }) {
  const [messages, setMessages] = useState<Message[]>([]);
  const onMessages = (more: Message[]) => setMessages((all) => [...all, ...more]);
  const state: State = usePokebridge({ url, token, onMessages }, token);
  // @ts-expect-error: the types are there, so this is found
  usePokebridge satisfies string;
  return (
    <main>
      <output>{state}</output>
      {messages.map(({ version, body }) => (
        <p key={version}>{String(body)}</p>
      ))}
    </main>
  );
}
