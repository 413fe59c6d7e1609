// The shard map as a grid: who owns each shard, whose sessions it has, and what has just moved.

import { formatDuration, plural } from "./format.js";
import { classesOf, letterOf, markOf } from "./marks.js";

// How long a shard that has moved is marked.
const MOVED_MS = 15_000;
const DENSE_FROM = 400;

export class ShardGrid {
  #grid;
  #legend;
  #hint;
  #detail;
  #shards = [];
  #current = 0;

  constructor(section) {
    this.#grid = section.querySelector(".shards");
    this.#legend = section.querySelector(".legend");
    this.#hint = section.querySelector(".shards-hint");
    this.#detail = section.querySelector(".shard-detail");
    this.#grid.addEventListener("keydown", (event) => this.#onKey(event));
    for (const type of ["focusin", "pointerover"]) {
      this.#grid.addEventListener(type, ({ target }) => {
        if (target.dataset.shard) this.#detail.textContent = this.#tell(target.dataset.shard);
      });
    }
  }

  show(view) {
    if (this.#shards.length !== view.shard_count) this.#create(view.shard_count);
    const owners = new Map();
    const interested = new Map();
    for (const { id, shards, interest } of view.instances) {
      for (const shard of shards) owners.set(shard, id);
      for (const shard of interest) interested.set(shard, [...(interested.get(shard) ?? []), id]);
    }
    this.#shards.forEach((shard, number) => {
      const owner = owners.get(number) ?? null;
      if (shard.owner !== undefined && shard.owner !== owner) {
        Object.assign(shard, { movedFrom: shard.owner, movedAt: Date.now() });
      }
      shard.owner = owner;
      shard.sessionsOn = interested.get(number) ?? [];
    });
    this.#grid.classList.toggle("prepared", view.mode === "fanout");
    this.#hint.textContent =
      view.mode === "fanout"
        ? "Fan-out: every instance hears all shards. These owners wait for partitioned mode."
        : "Partitioned: each instance hears the shards it owns, and those of its sessions.";
    this.#showLegend(view);
    this.refresh();
  }

  /** Marks of moves fade by themselves. */
  refresh() {
    const fadedAt = Date.now() - MOVED_MS;
    for (const shard of this.#shards) {
      if (shard.movedAt < fadedAt) shard.movedFrom = shard.movedAt = undefined;
      const looks = this.#looksOf(shard);
      if (looks === shard.looks) continue;
      shard.looks = looks;
      shard.cell.className = looks;
      shard.cell.textContent = shard.owner === null ? "–" : letterOf(shard.owner);
      shard.cell.setAttribute("aria-label", this.#tell(shard.cell.dataset.shard));
    }
  }

  #looksOf({ owner, sessionsOn, movedAt }) {
    return [
      "shard",
      owner === null ? "nobodys" : classesOf(owner),
      sessionsOn.length > 0 && "interest",
      sessionsOn.some((instance) => instance !== owner) && "astray",
      movedAt && "moved",
    ]
      .filter(Boolean)
      .join(" ");
  }

  #tell(number) {
    const { owner, sessionsOn, movedFrom, movedAt } = this.#shards[number];
    const parts = [`Shard ${number}: ${owner === null ? "nobody owns it" : `owned by ${owner}`}`];
    parts.push(sessionsOn.length ? `sessions on ${sessionsOn.join(", ")}` : "no sessions");
    if (movedAt) {
      const ago = formatDuration((Date.now() - movedAt) / 1000);
      parts.push(`moved from ${movedFrom ?? "nobody"} ${ago} ago`);
    }
    return `${parts.join("; ")}.`;
  }

  #create(count) {
    this.#grid.classList.toggle("dense", count >= DENSE_FROM);
    this.#shards = Array.from({ length: count }, (_, number) => {
      const cell = document.createElement("span");
      cell.dataset.shard = number;
      cell.setAttribute("role", "img");
      cell.tabIndex = number === 0 ? 0 : -1;
      return { cell, owner: undefined, sessionsOn: [], looks: null };
    });
    this.#current = 0;
    this.#grid.replaceChildren(...this.#shards.map(({ cell }) => cell));
  }

  #showLegend({ instances }) {
    const key = instances.map(({ id, shards }) => `${id} ${shards.length}`).join();
    if (key === this.#legend.dataset.key) return;
    this.#legend.dataset.key = key;
    const items = instances.map(({ id, shards }) => {
      const item = document.createElement("li");
      item.append(markOf(id), ` ${id} `, small(plural(shards.length, "shard")));
      return item;
    });
    for (const [classes, text] of [
      ["interest", "has sessions"],
      ["interest astray", "has sessions elsewhere than its owner"],
      ["moved", "has just moved"],
    ]) {
      const item = document.createElement("li");
      const mark = document.createElement("span");
      mark.className = `mark shard ${classes}`;
      item.append(mark, " ", small(text));
      items.push(item);
    }
    this.#legend.replaceChildren(...items);
  }

  #onKey(event) {
    const columns = getComputedStyle(this.#grid).gridTemplateColumns.split(" ").length;
    const last = this.#shards.length - 1;
    const next = {
      ArrowRight: this.#current + 1,
      ArrowLeft: this.#current - 1,
      ArrowDown: this.#current + columns,
      ArrowUp: this.#current - columns,
      Home: 0,
      End: last,
    }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    if (next < 0 || next > last) return;
    this.#shards[this.#current].cell.tabIndex = -1;
    this.#current = next;
    this.#shards[next].cell.tabIndex = 0;
    this.#shards[next].cell.focus();
  }
}

function small(text) {
  const element = document.createElement("small");
  element.textContent = text;
  return element;
}
