// The cluster, live: this page is a client of the bridge, which pokes it when there is something
// new to see; then it pulls. There is no polling: it only says from time to time that it watches.

import { Session, sleep } from "../shared/session.js";

/**
 * A session of an operator. Besides a session's events it has:
 * - `view`: what GET /v1/cluster answers
 * - `events`: what GET /v1/cluster/events answers
 * - `trouble`: {message}: neither could be had
 * - `refused`: {message}: the token is good for nothing here any more
 */
export class Live extends Session {
  #looking = false;
  #lookAgain = false;
  #renewal = null;
  // The events known, by the instance that told them: each has seen a number of its own.
  #eventsKnown = new Map();

  constructor(token) {
    // It stays at this page's origin: the policy of the page allows no other.
    super({ device: "console", getToken: async () => token, follows: false });
    document.addEventListener("visibilitychange", this.#onVisible);
    // A browser does not learn why a handshake was refused, but why a call was.
    this.addEventListener("state", ({ detail }) => detail.state === "waiting" && this.refresh());
  }

  /** Pull once; raises what went wrong. */
  async look() {
    const view = await (await this.request("GET", "/v1/cluster")).json();
    this.emit("view", view);
    if (this.#eventsKnown.get(view.seen_by) === view.events) return;
    const told = await (await this.request("GET", "/v1/cluster/events")).json();
    this.#eventsKnown.set(told.seen_by, told.count);
    this.emit("events", told);
  }

  close() {
    document.removeEventListener("visibilitychange", this.#onVisible);
    clearTimeout(this.#renewal);
    super.close();
  }

  async migrate(mode, force) {
    await this.request("PUT", "/v1/cluster/mode", { mode, force });
    this.refresh();
  }

  async drain(instance) {
    await this.request("POST", "/v1/cluster/drain", { instance });
    this.refresh();
  }

  onReady() {
    this.#watch();
  }

  async onPoke({ within_ms: withinMs = 0 }) {
    await sleep(Math.random() * withinMs);
    this.refresh();
  }

  /** Pull, one at a time; whatever asks meanwhile is served by one more. */
  async refresh() {
    this.#lookAgain = true;
    if (this.#looking) return;
    this.#looking = true;
    while (this.#lookAgain && this.isOpen) {
      this.#lookAgain = false;
      await this.#attempt(() => this.look());
    }
    this.#looking = false;
  }

  /** Say that somebody watches, until nobody does: a hidden tab shows nothing. */
  async #watch() {
    clearTimeout(this.#renewal);
    if (document.hidden || !this.isOpen) return;
    let forS = 10;
    await this.#attempt(async () => {
      forS = (await (await this.request("PUT", "/v1/cluster/watch")).json()).for_s;
    });
    this.refresh();
    clearTimeout(this.#renewal);
    if (this.isOpen) this.#renewal = setTimeout(() => this.#watch(), (forS / 3) * 1000);
  }

  #onVisible = () => this.#watch();

  async #attempt(action) {
    try {
      await action();
    } catch (error) {
      const { message } = error;
      this.emit(error.status === 401 || error.status === 403 ? "refused" : "trouble", { message });
    }
  }
}
