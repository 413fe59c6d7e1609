import { connect } from "@pokebridge/client";
import { Replicache } from "replicache";

const url = new URLSearchParams(location.search).get("bridge") ?? "http://127.0.0.1:8080";
const $ = (selector) => document.querySelector(selector);

const replicache = new Replicache({
  name: "todos",
  pushURL: "/replicache/push",
  pullURL: "/replicache/pull",
  pullInterval: null, // a poke says when
  logLevel: "error",
  mutators: {
    putTodo: (tx, todo) => tx.set(`todo/${todo.id}`, todo),
    deleteTodo: (tx, { id }) => tx.del(`todo/${id}`),
  },
});

const client = connect({ url, token: getToken, onPoke: () => replicache.pull() });
client.on("state", (state) => $("output").replaceChildren(state));
client.on("error", (error) => console.warn(error)); // the client tries again

replicache.subscribe((tx) => tx.scan({ prefix: "todo/" }).values().toArray(), show);

/** The list as this browser has it, what is not pushed yet included. */
function show(todos) {
  const items = todos.toSorted((one, other) => one.at - other.at).map((todo) => {
    const item = document.createElement("li");
    const done = document.createElement("button");
    done.append("Done");
    done.onclick = () => replicache.mutate.deleteTodo({ id: todo.id });
    item.append(todo.text, " ", done);
    return item;
  });
  $("ul").replaceChildren(...items);
}

$("form").onsubmit = (event) => {
  event.preventDefault();
  const todo = { id: crypto.randomUUID(), at: Date.now(), text: event.target.text.value };
  replicache.mutate.putTodo(todo);
  event.target.reset();
};

// Only an instance with --dev hands out tokens. In your app they come from your sign-in service.
async function getToken() {
  const response = await fetch(`${url}/v1/dev/token`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ sub: "urn:space:todos" }),
  });
  if (!response.ok) throw new Error(`no token: ${response.status}`);
  return (await response.json()).token;
}
