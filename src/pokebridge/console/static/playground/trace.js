// The list in the middle: what happened to a message or a poke, as a waterfall of its steps.

const MAX_TRACES = 40;

export const formatMs = (ms) => (ms < 100 ? `${ms.toFixed(1)} ms` : `${Math.round(ms)} ms`);

/**
 * One message, or one bare poke (`kind`), from one user to another. All times are
 * performance.now(); a message that came from elsewhere has no `sentAt`.
 */
export class Trace {
  committedAt = null;
  version = null;
  wokenAt = null;
  wokenBy = null;
  pullStartedAt = null;
  pullEndedAt = null;
  pullStatus = null;
  shownAt = null;
  failure = null;

  constructor({ kind, from, to, text = "", sentAt = null }) {
    Object.assign(this, { kind, from, to, text, sentAt });
  }

  /** From the click, or from the wake-up when the click was elsewhere, to the end. */
  get totalMs() {
    const endedAt = this.kind === "message" ? this.shownAt : this.pullEndedAt;
    return endedAt === null ? null : endedAt - (this.sentAt ?? this.#startedAt);
  }

  /** The steps so far: {step, label, from, to}, in the order in which they are read. */
  get steps() {
    const { sentAt, committedAt, wokenAt, pullStartedAt, pullEndedAt, shownAt } = this;
    const steps = [];
    if (committedAt !== null) {
      const label = this.kind === "message" ? `commit, version ${this.version}` : "accepted";
      steps.push({ step: "commit", label, from: sentAt, to: committedAt });
    }
    if (wokenAt !== null) {
      // The poke can overtake the answer to the sender: then it is timed from the click.
      const from = committedAt !== null && committedAt <= wokenAt ? committedAt : sentAt;
      steps.push({ step: "poke", label: this.wokenBy, from: from ?? wokenAt, to: wokenAt });
    }
    if (pullEndedAt !== null) {
      const label = this.pullStatus === 304 ? "pull, nothing new" : "pull";
      steps.push({ step: "pull", label, from: pullStartedAt, to: pullEndedAt });
    }
    if (shownAt !== null) {
      steps.push({ step: "shown", label: "shown", from: pullEndedAt, to: shownAt });
    }
    return steps;
  }

  get #startedAt() {
    return this.wokenAt ?? this.pullStartedAt;
  }
}

export class TraceList {
  #list;
  #empty;
  #template;
  #items = new Map();

  constructor(root) {
    this.#list = root.querySelector(".trace-list");
    this.#empty = root.querySelector(".empty");
    this.#template = document.querySelector("#trace-template");
  }

  /** Show `trace` as it stands now. */
  show(trace) {
    let item = this.#items.get(trace);
    if (!item) {
      item = this.#template.content.firstElementChild.cloneNode(true);
      item.querySelector(".who").textContent = `${trace.from} → ${trace.to}`;
      item.querySelector(".what").textContent = trace.kind === "poke" ? "poke only" : trace.text;
      this.#items.set(trace, item);
      this.#list.prepend(item);
      this.#empty.hidden = true;
      if (this.#items.size > MAX_TRACES) this.#forgetOldest();
    }
    item.querySelector(".total").textContent = this.#totalOf(trace);
    item.classList.toggle("failed", trace.failure !== null);
    item.querySelector("dl").replaceChildren(...this.#rowsOf(trace));
  }

  #totalOf(trace) {
    if (trace.failure !== null) return trace.failure;
    return trace.totalMs === null ? "…" : formatMs(trace.totalMs);
  }

  #rowsOf(trace) {
    const { steps } = trace;
    const start = Math.min(...steps.map((step) => step.from));
    const spanMs = Math.max(...steps.map((step) => step.to)) - start || 1;
    return steps.flatMap(({ step, label, from, to }) => {
      const term = document.createElement("dt");
      term.textContent = label;
      const bar = document.createElement("i");
      bar.style.setProperty("--from", (from - start) / spanMs);
      bar.style.setProperty("--to", (to - start) / spanMs);
      const value = document.createElement("dd");
      value.dataset.step = step;
      value.append(bar, formatMs(to - from));
      return [term, value];
    });
  }

  #forgetOldest() {
    const [oldest, item] = this.#items.entries().next().value;
    this.#items.delete(oldest);
    item.remove();
  }
}
