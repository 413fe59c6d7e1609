// The log of events. An event that two instances report has one id, and is shown once.

import { formatTime } from "./format.js";

const MAX_EVENTS = 200;

export class EventLog {
  #list;
  #known = new Set();

  constructor(list) {
    this.#list = list;
  }

  add(events) {
    for (const event of events) {
      if (this.#known.has(event.id)) continue;
      this.#known.add(event.id);
      this.#insert(event);
    }
    while (this.#list.children.length > MAX_EVENTS) this.#list.lastElementChild.remove();
    // Only events that come from now on are announced to screen readers.
    this.#list.parentElement.setAttribute("aria-live", "polite");
  }

  #insert({ at_ms: atMs, kind, text }) {
    const item = document.createElement("li");
    item.dataset.kind = kind;
    item.dataset.at = atMs;
    const time = document.createElement("time");
    time.dateTime = new Date(atMs).toISOString();
    time.textContent = formatTime(atMs);
    const label = document.createElement("b");
    label.textContent = kind;
    const words = document.createElement("span");
    words.textContent = text;
    item.append(time, label, words);
    const older = [...this.#list.children].find((other) => Number(other.dataset.at) <= atMs);
    this.#list.insertBefore(item, older ?? null);
  }
}
