// The table of instances. A row stays the same element while its instance is there, so that the
// keyboard's focus stays where it is.

import {
  formatCount,
  formatDuration,
  formatMemory,
  formatMs,
  formatRate,
  formatShare,
} from "./format.js";
import { markOf } from "./marks.js";

const COLUMNS = [
  { name: "State", of: (each, view) => stateOf(each, view) },
  { name: "Sessions", of: sessionsOf, title: "of each worker, where there are several" },
  { name: "Shards", of: (each) => formatCount(each.shards.length), title: "that the map gives it" },
  { name: "In", of: (each) => `${formatRate(each.messages_per_s)}/s`, title: "signals received" },
  { name: "Out", of: (each) => `${formatRate(each.pokes_per_s)}/s`, title: "pokes to its sockets" },
  { name: "Noise", of: (each) => formatShare(each.noise_ratio), title: "CPU on others' pokes" },
  {
    name: "Pulls",
    of: (each) => (each.pulls_per_s > 0 ? formatMs(each.pull_p99_ms) : "–"),
    title: "99 of 100 answered within",
  },
  {
    name: "Gaps",
    of: (each) => (each.gaps ? `${each.gaps} · ${formatDuration(each.doubt_s)}` : "0"),
    title: "in the transport, and the time in doubt",
  },
  { name: "CPU", of: (each) => formatShare(each.cpu_share), title: "100 % is one core" },
  { name: "Memory", of: (each) => formatMemory(each.memory_bytes) },
  { name: "Age", of: (each) => formatDuration((Date.now() - each.joined_at_ms) / 1000) },
];

/** All sessions, and those of each worker; an older instance does not say. */
function sessionsOf({ sessions, workers = [] }) {
  const each = workers.map((worker) => formatCount(worker.sessions)).join(" + ");
  return each ? `${formatCount(sessions)} (${each})` : formatCount(sessions);
}

/** Its release, which 0.1.0 does not tell, and its address, which not every instance has. */
const aboutOf = ({ version = "", url }) => [version, url].filter(Boolean).join(" · ");

function stateOf({ state, settled, epoch, sessions, shards }, view) {
  if (state === "draining" && sessions === 0 && shards.length === 0) return "drained";
  if (state !== "active") return state;
  if (settled && epoch >= view.epoch) return "active";
  return view.trouble ? "in doubt" : "settling";
}

export class Instances {
  #body;
  #rows = new Map();
  #onDrain;
  #view = null;

  /** `onDrain(id)` is called when the operator asks to drain an instance. */
  constructor(table, onDrain) {
    this.#body = table.querySelector("tbody");
    this.#onDrain = onDrain;
    const head = table.querySelector("thead tr");
    for (const { name, title = "" } of [{ name: "Instance" }, ...COLUMNS, { name: "Action" }]) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.setAttribute("role", "columnheader");
      cell.textContent = name;
      cell.title = title;
      head.append(cell);
    }
  }

  show(view) {
    this.#view = view;
    const ids = view.instances.map(({ id }) => id);
    for (const [id, row] of this.#rows) {
      if (ids.includes(id)) continue;
      row.remove();
      this.#rows.delete(id);
    }
    view.instances.forEach((each, position) => {
      if (!this.#rows.has(each.id)) {
        const row = this.#createRow(each);
        this.#rows.set(each.id, row);
        this.#body.insertBefore(row, this.#body.rows[position] ?? null);
      }
    });
    this.refresh();
  }

  /** Ages change by themselves. */
  refresh() {
    for (const each of this.#view?.instances ?? []) {
      const row = this.#rows.get(each.id);
      row.dataset.state = stateOf(each, this.#view);
      row.querySelector("small").textContent = aboutOf(each);
      COLUMNS.forEach(({ of }, i) => {
        row.cells[i + 1].textContent = of(each, this.#view);
      });
      row.querySelector("button").disabled = each.state !== "active";
    }
  }

  #createRow({ id, url }) {
    const row = document.createElement("tr");
    row.setAttribute("role", "row");
    row.dataset.instance = id;
    const name = document.createElement("th");
    name.scope = "row";
    name.setAttribute("role", "rowheader");
    name.title = url;
    name.append(markOf(id), " ", id);
    name.append(document.createElement("small"));
    row.append(name);
    for (const { name: label } of COLUMNS) row.append(cellOf(label));
    const action = cellOf("Action");
    const button = document.createElement("button");
    button.type = "button";
    button.className = "quiet";
    button.textContent = "Drain";
    button.setAttribute("aria-label", `Drain ${id}`);
    button.addEventListener("click", () => this.#onDrain(id));
    action.append(button);
    row.append(action);
    return row;
  }
}

function cellOf(label) {
  const cell = document.createElement("td");
  cell.setAttribute("role", "cell");
  cell.dataset.label = label;
  return cell;
}
