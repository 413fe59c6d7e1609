import { usePokebridge } from "@pokebridge/client/react";
import { useState } from "react";

/** Who is signed in, and their inbox. */
export function App({ url }) {
  const [user, setUser] = useState("bob");
  return (
    <main>
      <label>
        Signed in as{" "}
        <select value={user} onChange={(event) => setUser(event.target.value)}>
          <option>alice</option>
          <option>bob</option>
          <option value="">nobody</option>
        </select>
      </label>
      <Inbox key={user} url={url} user={user} />
    </main>
  );
}

function Inbox({ url, user }) {
  const [messages, setMessages] = useState([]);
  const state = usePokebridge(
    user && {
      url,
      token: () => getToken(url, user),
      onMessages: (more) => setMessages((all) => [...all, ...more]),
    },
    user,
  );
  return (
    <section>
      <p>
        <output>{state}</output>
      </p>
      <ol>
        {messages.map(({ version, sender, body }) => (
          <li key={version}>
            {sender}: {body.text}
          </li>
        ))}
      </ol>
    </section>
  );
}

// Only an instance with --dev hands out tokens. In your app they come from your sign-in service.
async function getToken(url, user) {
  const response = await fetch(`${url}/v1/dev/token`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ sub: `urn:user:${user}` }),
  });
  if (!response.ok) throw new Error(`no token: ${response.status}`);
  return (await response.json()).token;
}
