// One recipient: where it is connected, and what is owed to it.

import { confirm } from "./confirm.js";
import { formatCount, formatDuration, formatTime, plural } from "./format.js";

export class LookUp {
  #root;
  #live;
  #recipient = "";

  /** `live()` returns the connection through which the cluster is asked. */
  constructor(root, live) {
    this.#root = root;
    this.#live = live;
    this.#find("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#recipient = this.#find("input").value.trim();
      this.#attempt(() => this.#look());
    });
    this.#find(".test-poke").addEventListener("click", () => this.#attempt(() => this.#poke()));
    this.#find(".disconnect").addEventListener("click", () => this.#askToDisconnect());
  }

  /** Forget what was found: somebody else may sign in. */
  clear() {
    this.#find("input").value = "";
    this.#find(".found").replaceChildren();
    this.#find(".error").textContent = "";
    this.#find(".buttons").hidden = true;
  }

  #find(selector) {
    return this.#root.querySelector(selector);
  }

  async #attempt(act) {
    this.#find(".error").textContent = "";
    try {
      await act();
    } catch (error) {
      this.#find(".error").textContent = error.message;
    }
  }

  /** Show what is known now, after what has just been `done`. */
  async #look(done = []) {
    const found = await this.#live().lookUp(this.#recipient);
    this.#show([...done, ...this.#linesOf(found)]);
    this.#find(".buttons").hidden = false;
  }

  async #poke() {
    await this.#live().poke(this.#recipient);
    await this.#look([`${formatTime(Date.now())}: the test poke is accepted.`]);
  }

  #askToDisconnect() {
    const recipient = this.#recipient;
    confirm({
      title: `Disconnect ${recipient}?`,
      what: "Every session closes, on every instance. The clients get a new token and come back.",
      yes: "Disconnect",
      act: async () => {
        await this.#live().disconnect(recipient);
        const done = `${formatTime(Date.now())}: disconnected. Clients come back within seconds; look up again to see them.`;
        await this.#attempt(() => this.#look([done]));
      },
    });
  }

  #show(lines) {
    const items = lines.map((line) => Object.assign(document.createElement("li"), { textContent: line }));
    const list = document.createElement("ul");
    list.append(...items);
    this.#find(".found").replaceChildren(list);
  }

  *#linesOf({ sessions, unanswered, mailbox }) {
    yield* sessions.map((each) => this.#lineOfSession(each));
    if (sessions.length === 0) yield `${this.#recipient} is not connected.`;
    if (unanswered.length > 0) yield `No answer from ${unanswered.join(", ")}: sessions may be missing.`;
    if (mailbox !== null) yield* this.#linesOfMailbox(mailbox);
  }

  #lineOfSession({ instance, device, address, since_ms: sinceMs, told }) {
    const from = address ? ` from ${address}` : "";
    const poked = told === null ? "no poke has named a version yet" : `last poked for version ${told}`;
    return `Connected to ${instance}${from}, device ${device}, for ${ageOf(sinceMs)}; ${poked}.`;
  }

  *#linesOfMailbox({ head, messages, poke_owed_since_ms: owedSinceMs, devices }) {
    yield `The newest version is ${head}. Kept: ${plural(messages, "message")}.`;
    if (owedSinceMs !== null) yield `A poke has been owed for ${ageOf(owedSinceMs)}.`;
    for (const { device, acked, behind } of devices) {
      yield `Device ${device} has acked version ${acked}: ${formatCount(behind)} behind.`;
    }
  }
}

const ageOf = (ms) => formatDuration(Math.max(0, Date.now() - ms) / 1000);
