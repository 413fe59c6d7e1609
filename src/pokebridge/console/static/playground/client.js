// A client of pokebridge: it sleeps on a WebSocket, and pulls over HTTP when it is poked: on
// `ready` and on `poke`, one pull at a time.

import { Session, jitter, sleep } from "../shared/session.js";

const PAGE_SIZE = 50;

/**
 * One device of one user: a `Session`, with these events besides:
 * - `poke`: {version, at, news}: a poke came; `news` when it is followed by a pull
 * - `pull`: {status, messages, cause: {kind: "ready" | "poke", at}, startedAt, endedAt}
 */
export class Client extends Session {
  #cursor = 0;
  #etag = null;
  #pulling = false;
  #cause = null;

  constructor({ subject, device, getToken }) {
    super({ device, getToken });
    this.subject = subject;
  }

  /** The version of the last message pulled. */
  get version() {
    return this.#cursor;
  }

  /** Send `body` to `recipient`; the same `id` again sends nothing twice. → {id, version} */
  async send(recipient, body, { id, ttl_s }) {
    const response = await this.request("POST", "/v1/messages", { recipient, body, id, ttl_s });
    return response.json();
  }

  async poke(recipient) {
    await this.request("POST", "/v1/pokes", { recipient });
  }

  /** This device has all up to the present version. */
  async ack() {
    const path = `/v1/messages/ack?device=${encodeURIComponent(this.device)}`;
    await this.request("POST", path, { version: this.#cursor });
  }

  async connectInfo() {
    return (await this.request("GET", "/v1/connect-info")).json();
  }

  // --- pulls ---------------------------------------------------------------------------------

  onReady(at) {
    this.#pull({ kind: "ready", at });
  }

  onPoke({ version, within_ms: withinMs = 0 }, at) {
    const news = version === undefined || version > this.#cursor;
    this.emit("poke", { version, at, news });
    if (!news) return;
    const pull = () => this.#pull({ kind: "poke", at });
    if (withinMs > 0) this.after(Math.random() * withinMs, pull);
    else pull();
  }

  /** Pull until nothing is left. Whatever asks meanwhile is served by one more pull. */
  async #pull(cause) {
    this.#cause = cause;
    if (this.#pulling) return;
    this.#pulling = true;
    for (let attempt = 0; this.#cause && this.isOpen; ) {
      const served = this.#cause;
      try {
        while (await this.#pullPage(served));
        attempt = 0;
        if (this.#cause === served) this.#cause = null;
      } catch (error) {
        this.log(`pull failed: ${error.message}`);
        await sleep(jitter(attempt++));
      }
    }
    this.#pulling = false;
  }

  /** Pull one page; whether there is more. */
  async #pullPage(cause) {
    const startedAt = performance.now();
    const device = encodeURIComponent(this.device);
    const path = `/v1/messages?after=${this.#cursor}&limit=${PAGE_SIZE}&device=${device}`;
    const headers = this.#etag === null ? {} : { "If-None-Match": this.#etag };
    const response = await this.request("GET", path, undefined, headers);
    const page = response.status === 304 ? { messages: [] } : await response.json();
    const endedAt = performance.now();
    if (response.status === 200) {
      this.#cursor = page.version;
      // The tag stands for the head: it may be shown once the last page is in.
      this.#etag = page.more ? null : response.headers.get("ETag");
    }
    const { messages } = page;
    this.emit("pull", { status: response.status, messages, cause, startedAt, endedAt });
    return page.more === true;
  }
}
