// The core against the scenarios that the Python client's core is held against, step by step.
import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { test } from "node:test";

import { Core, type Policy } from "../src/core.js";
import type { Action, Event } from "../src/events.js";
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
