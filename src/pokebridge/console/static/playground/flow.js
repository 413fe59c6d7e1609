// The diagram: the steps of a message, in slow motion.

const STEP_MS = 620;
const MAX_QUEUED = 10;

// What lights up at each step.
const PARTS = {
  send: ["sender", "send"],
  commit: ["mailbox"],
  poke: ["signal", "bridge", "poke"],
  pull: ["recipient", "pull"],
  shown: ["recipient"],
};

export class Flow {
  #root;
  #caption;
  #queue = [];
  #running = false;

  constructor(root) {
    this.#root = root;
    this.#caption = root.querySelector(".caption");
  }

  /** Show `step` of a message between two users, after its steps that are still to be shown. */
  show(step, { from, to }, caption) {
    // A new message drops the steps of earlier ones: they would play for a long time.
    if (step === "send") this.#queue = [];
    this.#queue.push({ step, from, to, caption });
    if (this.#queue.length > MAX_QUEUED) this.#queue.shift();
    if (!this.#running) this.#run();
  }

  name(from, to) {
    this.#root.querySelector('[data-name="sender"]').textContent = from;
    this.#root.querySelector('[data-name="recipient"]').textContent = to;
  }

  async #run() {
    this.#running = true;
    for (let shown; (shown = this.#queue.shift()); ) {
      this.name(shown.from, shown.to);
      this.#caption.textContent = shown.caption;
      this.#light(shown.step);
      await new Promise((resolve) => setTimeout(resolve, STEP_MS));
    }
    this.#light(null);
    this.#running = false;
  }

  #light(step) {
    this.#root.dataset.step = step ?? "";
    const lit = PARTS[step] ?? [];
    for (const part of this.#root.querySelectorAll("[data-node], [data-edge]")) {
      part.classList.toggle("lit", lit.includes(part.dataset.node ?? part.dataset.edge));
    }
  }
}
