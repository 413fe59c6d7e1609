// What the whole cluster does now, in a row of numbers.

import {
  formatBytes,
  formatCount,
  formatDuration,
  formatMs,
  formatRate,
  formatShare,
  plural,
} from "./format.js";

const sum = (all, of) => all.reduce((total, each) => total + of(each), 0);

/** Of those that answer pulls; `null` when nobody does. */
const slowestPullMs = (pulling) =>
  pulling.length ? Math.max(...pulling.map((each) => each.pull_p99_ms)) : null;

/** The load in a view, for the numbers and the charts. */
export function loadOf({ traffic, instances }) {
  const cpu = sum(instances, (each) => each.cpu_share);
  return {
    opsPerS: traffic.global_ops_per_s,
    redLine: traffic.red_line,
    isOver: traffic.over_red_line,
    inPerS: traffic.messages_per_s,
    outPerS: sum(instances, (each) => each.pokes_per_s),
    // Each instance tells of its own CPU time; the cluster's is their mean by that.
    noise: cpu > 0 ? sum(instances, (each) => each.noise_ratio * each.cpu_share) / cpu : 0,
    pullsPerS: sum(instances, (each) => each.pulls_per_s),
    pullMs: slowestPullMs(instances.filter((each) => each.pulls_per_s > 0)),
    gaps: sum(instances, (each) => each.gaps),
    lost: sum(instances, (each) => each.lost ?? 0), // an instance of 0.1.0 does not tell
    doubtS: sum(instances, (each) => each.doubt_s),
    sessions: sum(instances, (each) => each.sessions),
    instances: instances.length,
    draining: instances.filter((each) => each.state === "draining").length,
    deaf: instances.filter((each) => each.state === "deaf").length,
  };
}

function noteOnInstances(load) {
  if (load.deaf) return `${load.deaf} deaf`;
  return load.draining ? `${plural(load.draining, "one")} draining` : "all active";
}

const FIGURES = [
  {
    key: "ops",
    name: "Deliveries",
    value: (load) => `${formatRate(load.opsPerS)}/s`,
    note: (load) => `red line ${formatCount(load.redLine)}/s`,
    share: (load) => load.opsPerS / load.redLine,
    isBad: (load) => load.isOver,
  },
  {
    key: "noise",
    name: "Noise ratio",
    value: (load) => formatShare(load.noise),
    note: () => "of CPU, on others' pokes",
  },
  {
    key: "in",
    name: "Signals in",
    value: (load) => `${formatRate(load.inPerS)}/s`,
    note: () => "published",
  },
  {
    key: "out",
    name: "Pokes out",
    value: (load) => `${formatRate(load.outPerS)}/s`,
    note: () => "frames to sockets",
  },
  {
    key: "pulls",
    name: "Pull latency",
    value: (load) => (load.pullMs === null ? "–" : formatMs(load.pullMs)),
    note: (load) => `p99 · ${formatRate(load.pullsPerS)} pulls/s`,
  },
  {
    key: "gaps",
    name: "Gaps",
    value: (load) => formatCount(load.gaps),
    note: (load) =>
      load.lost
        ? `${plural(load.lost, "lost poke")} sent again`
        : `${formatDuration(load.doubtS)} in doubt`,
    isBad: (load) => load.gaps + load.lost > 0,
  },
  {
    key: "sessions",
    name: "Sessions",
    value: (load) => formatCount(load.sessions),
    note: () => "open",
  },
  {
    key: "instances",
    name: "Instances",
    value: (load) => formatCount(load.instances),
    note: noteOnInstances,
  },
];

// Of the mailbox as it was counted last.
const STORED = [
  {
    key: "mailbox",
    name: "Messages kept",
    value: ({ messages }) => formatCount(messages),
    note: ({ bytes, recipients }) => `${formatBytes(bytes)} of ${plural(recipients, "recipient")}`,
  },
  {
    key: "outbox",
    name: "Pokes owed",
    value: ({ pokes_owed: owed }) => formatCount(owed),
    note: ({ poke_owed_since_ms: since, counted_at_ms: counted }) =>
      since === null ? "all published" : `for ${formatDuration((counted - since) / 1000)}`,
    isBad: ({ poke_owed_since_ms: since, counted_at_ms: counted }) =>
      since !== null && counted - since > OWED_TOO_LONG_MS,
  },
];
// A poke is published at once, and otherwise by the next sweep.
const OWED_TOO_LONG_MS = 5_000;

export class Figures {
  #tiles = new Map();

  constructor(root) {
    for (const { key, name } of [...FIGURES, ...STORED]) {
      const tile = document.createElement("div");
      tile.className = "card";
      tile.dataset.figure = key;
      const term = document.createElement("dt");
      term.textContent = name;
      const number = document.createElement("dd");
      number.append(document.createElement("b"), " ", document.createElement("small"));
      tile.append(term, number);
      root.append(tile);
      this.#tiles.set(key, tile);
    }
  }

  show(load) {
    this.#write(FIGURES, load);
  }

  /** What the mailbox holds; `null` when that is not known. */
  showMailbox(totals) {
    for (const { key } of STORED) this.#tiles.get(key).hidden = totals === null;
    if (totals !== null) this.#write(STORED, totals);
  }

  #write(figures, load) {
    for (const { key, value, note, share, isBad } of figures) {
      const tile = this.#tiles.get(key);
      tile.querySelector("b").textContent = value(load);
      tile.querySelector("small").textContent = note(load);
      tile.classList.toggle("bad", isBad?.(load) ?? false);
      if (share) tile.style.setProperty("--share", Math.min(1, share(load)));
    }
  }
}
