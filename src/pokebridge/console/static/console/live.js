// The cluster, live. This page is a client of the bridge: the bridge pokes it when there is something new
// to see, and then it pulls. It does not poll: it only says, from time to time, that somebody watches.

import { Api, home, whyStopped } from "../shared/api.js";
import { connect } from "../vendor/pokebridge-client/index.js";

/** A socket to this page's origin, wherever the bridge would move it: the page's policy allows no other. */
class SocketOfThisOrigin extends WebSocket {
  constructor(url, protocols) {
    const here = new URL(`${home}/v1/connect`.replace(/^http/, "ws"));
    here.search = new URL(url).search;
    here.searchParams.set("moved", "1");
    super(here, protocols);
  }
}

/**
 * What an operator sees and does. Its events, with their particulars in `detail`:
 * - `view`: what GET /v1/cluster answers
 * - `mailbox`: what GET /v1/mailbox answers; null when the instance has no mailbox, or can't count it
 * - `events`: what GET /v1/cluster/events answers
 * - `state`: {state: "connecting" | "ready" | "waiting" | "off", why}
 * - `trouble`: {message}: a call has failed
 * - `refused`: {message}: the token is not accepted any more
 */
// Counting reads the whole mailbox, so it is not done for every look.
const COUNT_EVERY_MS = 60_000;

export class Live extends EventTarget {
  #token;
  #api;
  #client = null;
  #looking = null;
  #lookAgain = false;
  #isWatching = false;
  #renewal = null;
  #countedAt = -Infinity;
  // How many events were read, by the instance that told them: each numbers its own.
  #eventsKnown = new Map();

  constructor(token) {
    super();
    this.#token = token;
    this.#api = new Api(async () => token);
    document.addEventListener("visibilitychange", this.#onVisible);
  }

  /** Connect, and stay connected until `close`. */
  open() {
    this.#emit("state", { state: "connecting" });
    const client = connect({
      url: home,
      token: this.#token,
      device: "console",
      share: false,
      WebSocket: SocketOfThisOrigin,
      onPoke: () => this.#look(),
    });
    client.on("step", (step) => this.#onStep(step));
    client.on("error", (error) => this.#report(error));
    client.on("state", (state) => {
      if (state === "connected") this.#emit("state", { state: "ready" });
      if (state === "stopped") this.#emit("state", { state: "off", why: whyStopped(client.stopCode) });
      if (state === "closed") this.#emit("state", { state: "off", why: "disconnected" });
    });
    this.#client = client;
  }

  close() {
    document.removeEventListener("visibilitychange", this.#onVisible);
    clearTimeout(this.#renewal);
    this.#client?.close();
  }

  /** Pull once; throws what went wrong. */
  async look() {
    const view = await this.#api.call("GET", "/v1/cluster");
    this.#emit("view", view);
    this.#count();
    if (this.#eventsKnown.get(view.seen_by) === view.events) return;
    const told = await this.#api.call("GET", "/v1/cluster/events");
    this.#eventsKnown.set(told.seen_by, told.count);
    this.#emit("events", told);
  }

  async #count() {
    if (performance.now() < this.#countedAt + COUNT_EVERY_MS) return;
    this.#countedAt = performance.now();
    const totals = await this.#api.call("GET", "/v1/mailbox").catch(({ status }) => {
      if (status === 404) this.#countedAt = Infinity; // it has no mailbox, or is of release 0.1.0
      return null;
    });
    this.#emit("mailbox", totals);
  }

  async migrate(mode, force) {
    await this.#api.call("PUT", "/v1/cluster/mode", { mode, force });
    this.#refresh();
  }

  async drain(instance) {
    await this.#api.call("POST", "/v1/cluster/drain", { instance });
    this.#refresh();
  }

  /** Where `recipient` is connected, and what is owed to it. */
  lookUp(recipient) {
    return this.#api.call("GET", `/v1/sessions/${encodeURIComponent(recipient)}`);
  }

  poke(recipient) {
    return this.#api.call("POST", "/v1/pokes", { recipient });
  }

  disconnect(recipient) {
    return this.#api.call("DELETE", `/v1/sessions/${encodeURIComponent(recipient)}`);
  }

  get #isOpen() {
    return this.#client !== null && ["connecting", "connected"].includes(this.#client.state);
  }

  #onStep(step) {
    switch (step.type) {
      case "connect":
        this.#isWatching = false; // a new connection may be another instance's
        break;
      case "disconnect":
        this.#emit("state", { state: "waiting", why: "no answer" });
        break;
      case "closed":
        this.#emit("state", { state: "waiting", why: step.reason || `closed ${step.code}` });
        // A browser does not learn why a handshake was refused, but why a call was.
        this.#refresh();
    }
  }

  /** Pull, one at a time. A call during a pull causes exactly one more pull. */
  #look() {
    this.#lookAgain = true;
    this.#looking ??= this.#lookUntilDone().finally(() => {
      this.#looking = null;
    });
    return this.#looking;
  }

  async #lookUntilDone() {
    while (this.#lookAgain && this.#isOpen) {
      this.#lookAgain = false;
      // First: what changes after a look is poked for only if somebody watches by then.
      if (!this.#isWatching) await this.#watch();
      await this.look();
    }
  }

  #refresh() {
    this.#look().catch((error) => this.#report(error));
  }

  /** Say that somebody watches, again and again while the page is visible. */
  async #watch() {
    clearTimeout(this.#renewal);
    if (document.hidden) return;
    const { for_s: forS } = await this.#api.call("PUT", "/v1/cluster/watch");
    this.#isWatching = true;
    if (this.#isOpen) this.#renewal = setTimeout(() => this.#watchAnew(), (forS / 3) * 1000);
  }

  #watchAnew() {
    this.#isWatching = false;
    this.#refresh();
  }

  #onVisible = () => {
    if (!document.hidden) this.#watchAnew();
  };

  #report(error) {
    const { status, message } = error;
    this.#emit(status === 401 || status === 403 ? "refused" : "trouble", { message });
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
