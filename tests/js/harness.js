// What the tests drive, in a page and in Node alike: a client, and what it said and showed.

export function makeHarness(connect, runtime = {}) {
  const harness = {
    shown: [],
    steps: [],
    states: [],
    errors: [],

    listening: {},

    /** Connect as `sub`; `kind` is "mailbox" or "own"; other settings are those of `connect`. */
    start({ kind = "mailbox", sub, ttl_s = 3600, bad_tokens = 0, ...options }) {
      const tokenOf = async (sub) => {
        const response = await fetch(`${options.url}/v1/dev/token`, {
          method: "POST",
          headers: { "Content-Type": "application/json" },
          body: JSON.stringify({ sub, ttl_s }),
        });
        return (await response.json()).token;
      };
      const token = async () => (bad_tokens-- > 0 ? "e30.eyJzdWIiOiJ4In0.c2ln" : tokenOf(sub));
      const show = (body) => {
        harness.shown.push(body);
        globalThis.document?.body.append(String(body), document.createElement("br"));
      };
      const pulls = {
        mailbox: { onMessages: (messages) => messages.forEach(({ body }) => show(body)) },
        own: { onPoke: (cursor) => show(cursor) },
      };
      const client = connect({ token, ...runtime, ...pulls[kind], ...options });
      client.on("state", (state) => harness.states.push(state));
      client.on("step", (step) => harness.steps.push(step));
      client.on("error", (error) => {
        harness.errors.push({ text: String(error), connects: harness.count("connect") });
      });
      harness.client = client;
      harness.tokenOf = tokenOf;
    },

    /** Listen to `recipient` as well, with the token of `sub`; what comes is in `listening[recipient].shown`. */
    listen(recipient, sub = recipient) {
      const shown = [];
      const onMessages = (messages) => messages.forEach(({ body }) => shown.push(body));
      const listening = harness.client.listen(recipient, { token: () => harness.tokenOf(sub), onMessages });
      harness.listening[recipient] = { listening, shown };
    },

    /** How often an event or an action of that type has passed. */
    count: (type) => harness.steps.filter((step) => step.type === type).length,
  };
  return harness;
}
