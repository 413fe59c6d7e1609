// The core against the scenarios that the Python client's core is held against, step by step.
import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { test } from "node:test";

import { Core, type Policy } from "../src/core.js";
import type { Action, Event } from "../src/events.js";
import { Listens, type Given } from "../src/listens.js";
import type { Transport } from "../src/transports.js";

interface Step {
  at: number;
  random: number;
  event: Event;
  actions: Action[];
  timer: number | null;
}

interface Scenario {
  name: string;
  url: string;
  cursor: number;
  policy: Partial<Policy>;
  transport?: Transport;
  steps: Step[];
}

const VECTORS = new URL("../../../tests/vectors/client/", import.meta.url);

for (const file of readdirSync(VECTORS).filter((name) => name.endsWith(".json"))) {
  const { scenarios } = JSON.parse(readFileSync(new URL(file, VECTORS), "utf8"));
  for (const scenario of scenarios as Scenario[]) {
    test(`${file}: ${scenario.name}`, () => {
      const core = new Core(scenario.url, scenario.cursor, scenario.policy, scenario.transport);
      scenario.steps.forEach((step, index) => {
        const actions = core.handle(step.event, step.at, step.random);
        const timer = core.timer === Infinity ? null : core.timer;
        assert.deepEqual({ ...step, actions, timer }, step, `step ${index + 1}`);
      });
    });
  }
}

interface Happening {
  type: "ready" | "lost" | "refused" | "text" | "carry" | "drop";
  text: string;
  recipient: string;
}

/** Tell `listens` what happened: what is to be done, and the events for others. */
function carryOut(listens: Listens, { type, text, recipient }: Happening): [string, Given[]] {
  switch (type) {
    case "ready":
      return ["nothing", listens.ready(text)];
    case "lost":
      return ["nothing", listens.lose()];
    case "refused":
      return ["nothing", listens.refuse()];
    case "drop":
      return [listens.drop(recipient) ? "unlisten" : "nothing", []];
    case "carry": {
      const isAbsent = listens.atMost === undefined;
      return [listens.carry(recipient) ? "listen" : isAbsent ? "wait" : "own_socket", []];
    }
    case "text": {
      const given = listens.hear(text);
      return given ? ["nothing", [given]] : ["own", []];
    }
  }
}

/** An event with the frame in it as JSON, whose keys have no order. */
function plain(event: any): object {
  return event.type === "text" ? { ...event, text: JSON.parse(event.text) } : event;
}

const LISTENING = new URL("../listening/listening.json", VECTORS);
for (const { name, steps } of JSON.parse(readFileSync(LISTENING, "utf8")).scenarios) {
  test(`listening: ${name}`, () => {
    const listens = new Listens();
    steps.forEach((step: { event: Happening; does: string; gives: [string, Event][] }, index: number) => {
      const [does, gives] = carryOut(listens, step.event);
      assert.equal(does, step.does, `step ${index + 1}`);
      const got = gives.map(({ recipient, event }) => [recipient, plain(event)]);
      assert.deepEqual(got, step.gives.map(([recipient, event]) => [recipient, plain(event)]), `step ${index + 1}`);
    });
  });
}
