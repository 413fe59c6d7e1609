// A socket for networks that let no WebSocket pass. HTTP calls that wait fetch its frames (docs/protocol.md,
// section 4).

import type { SocketLike } from "./client.js";
import type { Event } from "./events.js";
import { HttpError, problemDetail } from "./answers.js";
import { readText } from "./pulling.js";

const CONNECT_PATH = "/v1/connect";
const FRAMES_AT_ONCE = 20;
const OPEN_WAIT_S = 5;
const WAIT_S = 25;
const LEAST_WAIT_S = 3;
// If a proxy cuts a call after some time, the next calls wait for this share of that time.
const SHARE = 0.7;
// An empty answer that comes sooner did not wait. The next call would not either, so it is delayed until then.
const EMPTY_AFTER_MS = 1_000;
const ABNORMAL_CLOSURE = 1006;

/** How a polled socket has ended: closed like a WebSocket, or refused by the bridge. */
export interface PollEnd {
  code: number;
  reason: string;
  refused?: Event & { type: "refused" };
}

/** Opens polled sockets, and remembers how long a call may wait on this network. */
export class Poller {
  /** How long a call waits. It is shorter after a proxy has cut a call. */
  waitS = WAIT_S;

  constructor(
    readonly send: typeof fetch,
    /** Returns the token for the next call. */
    readonly token: () => string,
    /** Called when a frame that the client sent did not arrive. */
    readonly onUnsent: () => void,
  ) {}

  /** Begin a session at `url`, a WebSocket address. */
  open(url: string, query: Record<string, string>): SocketLike {
    return new PolledSocket(this, url, query);
  }
}

/** One session, with the interface of a WebSocket. */
class PolledSocket implements SocketLike {
  onopen: ((event: any) => void) | null = null;
  onmessage: ((event: any) => void) | null = null;
  onclose: ((event: PollEnd) => void) | null = null;
  onerror: ((event: any) => void) | null = null;
  readonly #url: string;
  readonly #controller = new AbortController();
  #query: Record<string, string>;
  #unsent: object[] = [];
  #isSending = false;

  constructor(
    private readonly poller: Poller,
    url: string,
    query: Record<string, string>,
  ) {
    const target = new URL(url.replace(/^ws/, "http"));
    const prefix = target.pathname.replace(new RegExp(`${CONNECT_PATH}$`), "");
    this.#url = `${target.origin}${prefix}/v1/pokes`;
    this.#query = query;
    void this.#run();
  }

  /**
   * Send `listen` and `unlisten`. Other frames are not needed: each call has its token, acks go over HTTP, and an
   * answer is a sign of life.
   */
  send(data: string): void {
    const frame = JSON.parse(data);
    if (!["listen", "unlisten"].includes(frame.type)) return;
    this.#unsent.push(frame);
    if (!this.#isSending) void this.#sendAll();
  }

  async #sendAll(): Promise<void> {
    this.#isSending = true;
    try {
      while (this.#unsent.length) {
        const frames = this.#unsent.splice(0, FRAMES_AT_ONCE);
        await this.#request("/frames", this.#query, 204, { frames });
      }
    } catch {
      if (!this.#controller.signal.aborted) this.poller.onUnsent();
    } finally {
      this.#isSending = false;
    }
  }

  close(): void {
    this.onopen = this.onmessage = this.onclose = null;
    this.#controller.abort();
  }

  async #run(): Promise<void> {
    let isOpen = false;
    for (;;) {
      const began = performance.now();
      const answer = await this.#fetch(isOpen ? this.poller.waitS : Math.min(OPEN_WAIT_S, this.poller.waitS));
      if ("code" in answer) return this.onclose?.(answer);
      if (!isOpen) this.onopen?.({});
      isOpen = true;
      this.#query = { session: answer.session };
      const frames = answer.frames.length || answer.close ? answer.frames : [{ type: "pong" }];
      for (const frame of frames) this.onmessage?.({ data: JSON.stringify(frame) });
      if (answer.close) return this.onclose?.(answer.close);
      const early = answer.frames.length ? 0 : began + EMPTY_AFTER_MS - performance.now();
      if (early > 0) await new Promise((resolve) => setTimeout(resolve, early));
      if (this.#controller.signal.aborted) return;
    }
  }

  async #fetch(waitS: number): Promise<PollEnd | { session: string; frames: object[]; close?: PollEnd }> {
    const began = performance.now();
    try {
      return await this.#call(waitS);
    } catch (error: any) {
      const tookS = (performance.now() - began) / 1000;
      if (tookS > LEAST_WAIT_S && tookS < waitS) this.poller.waitS = Math.max(tookS * SHARE, LEAST_WAIT_S);
      const end: PollEnd = { code: ABNORMAL_CLOSURE, reason: String(error) };
      const isStrange = error instanceof HttpError && !error.isTheBridges && [401, 403].includes(error.status);
      if (error instanceof HttpError && !isStrange) {
        const { status, retry_after_s = null } = error;
        end.refused = { type: "refused", status, retry_after_s, reason: end.reason };
      }
      return end;
    }
  }

  async #call(waitS: number): Promise<{ session: string; frames: object[]; close?: PollEnd }> {
    const text = await this.#request("", { ...this.#query, wait_s: String(waitS) }, 200);
    const answer = JSON.parse(text);
    if (typeof answer?.session !== "string" || !Array.isArray(answer.frames)) {
      throw new TypeError(`${this.#url} does not answer as pokebridge does`);
    }
    return answer;
  }

  async #request(path: string, query: Record<string, string>, expected: number, body?: object): Promise<string> {
    const { send, token } = this.poller;
    const url = this.#url + path;
    const response = await send(`${url}?${new URLSearchParams(query)}`, {
      headers: { Authorization: `Bearer ${token()}`, ...(body ? { "Content-Type": "application/json" } : {}) },
      cache: "no-store",
      redirect: "manual",
      signal: this.#controller.signal,
      ...(body ? { method: "POST", body: JSON.stringify(body) } : {}),
    });
    const text = await readText(response);
    const { status, headers } = response;
    if (status !== expected) {
      const wait = Number(headers.get("Retry-After") ?? NaN);
      const detail = problemDetail(status, headers.get("Content-Type"), text);
      throw new HttpError(url, status, wait >= 0 ? wait : undefined, detail);
    }
    return text;
  }
}
