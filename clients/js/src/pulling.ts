// A pull: one page of the recipient's mailbox over HTTP (docs/protocol.md, section 4), or a call of the
// application's own function.

import { HttpError, problemDetail } from "./answers.js";
import type { Event } from "./events.js";

// An answer may take as long as it needs, but each KiB of it must come within this time.
const PROGRESS_WITHIN_MS = 10_000;
const PROGRESS_BYTES = 1024;
// The longest time and the largest size of a whole answer. The bodies of a page have at most 1 MiB.
const ANSWER_WITHIN_MS = 120_000;
const MAX_ANSWER_CHARS = 8 * 1024 * 1024;
const PAGE_LIMIT = 50;
// After an incomplete answer, the next page is smaller by this factor.
const SMALLER_PAGE = 4;
// How many of the leading tab's pages a tab keeps. A tab that falls further behind pulls for itself.
const MAX_RELAYED_PAGES = 20;

/** A message from the mailbox. `body` is the JSON value that the sender gave it. */
export interface Message {
  version: number;
  id: string;
  sender: string;
  body: any;
  /** RFC 3339. */
  sent_at: string;
}

/** Handles messages, in order. They are acked when it returns; when it throws they come again. */
export type OnMessages = (messages: Message[]) => unknown;

/** Pulls what is newer than `cursor`. Returns the new cursor, or nothing if the data has none. */
export type OnPoke = (cursor: number) => number | void | Promise<number | void>;

/** The messages above some cursor, up to and including `version`. */
export interface Page {
  messages: Message[];
  version: number;
  more: boolean;
}

/** What the tab that pulls tells the other tabs. */
export type Relayed = { type: "page"; after: number; page: Page } | { type: "poke" };

/** How a pull ended, for the core, and why it failed, for the application. */
export interface PullResult {
  event: Event & { type: "pulled" | "pull_failed" };
  error?: unknown;
}

/** Makes the core's pulls. */
export interface Puller {
  /** Handle all that is newer than `after`, or a part of it. Never throws. */
  pull(after: number, token: string): Promise<PullResult>;
}

/** What a puller needs to know about this tab and the others. */
export interface Sharing {
  /** Whether this tab pulls for all tabs: then it acks, and relays what it pulls. */
  leads(): boolean;
  /** Whether the core acks over this tab's socket, so that a pull does not. */
  acksBySocket(): boolean;
  relay(note: Relayed): void;
}

/** An answer that stalled or broke off. */
class IncompleteError extends Error {}

/** Leaves the pull to a function of the application. */
export class OwnPuller implements Puller {
  constructor(
    private readonly onPoke: OnPoke,
    private readonly sharing: Sharing,
  ) {}

  async pull(after: number): Promise<PullResult> {
    this.sharing.relay({ type: "poke" });
    try {
      return { event: { type: "pulled", cursor: (await this.onPoke(after)) ?? after } };
    } catch (error) {
      return failed(error);
    }
  }
}

/**
 * Pulls a page, hands it over and acks it, in this order, so that no message is lost on the way.
 *
 * A page whose handler throws is not acked and comes again. When only the ack fails, only the ack is
 * repeated. While the socket takes acks the core acks there instead. A tab that does not lead uses the pages
 * that the leading tab has relayed, if there are any.
 */
export class MailboxPuller implements Puller {
  #acked: number;
  #limit = PAGE_LIMIT;
  // The mailbox's head when the last page left nothing to pull.
  #head = { after: -1, etag: "" };
  #relayed: { after: number; page: Page }[] = [];

  constructor(
    private readonly http: Http,
    private readonly onMessages: OnMessages,
    private readonly sharing: Sharing,
    cursor: number,
  ) {
    this.#acked = cursor;
  }

  /** Keep a page that the leading tab has pulled. */
  keep(after: number, page: Page): void {
    this.#relayed = [...this.#relayed, { after, page }].slice(-MAX_RELAYED_PAGES);
  }

  async pull(after: number, token: string): Promise<PullResult> {
    let handled: number | undefined;
    try {
      const read = this.#kept(after) ?? (await this.#read(after, token));
      // The leading tab may have acked a page during this request. Then only the relayed copy is left.
      const page = this.#kept(after) ?? read;
      if (page.version < after) {
        // The mailbox was started anew: its head is below the cursor.
        this.#acked = 0;
        this.#relayed = [];
        this.sharing.relay({ type: "poke" });
        return { event: { type: "pulled", cursor: 0, more: true } };
      }
      const messages = page.messages.filter((message) => message.version > after);
      if (messages.length) await this.onMessages(messages);
      handled = page.version;
      const pulled = { type: "pulled" as const, cursor: page.version, more: page.more };
      if (this.sharing.acksBySocket()) return { event: { ...pulled, unacked: true } };
      if (this.sharing.leads() && page.version > this.#acked) {
        await this.http.request("/v1/messages/ack", token, [204], { version: page.version });
        this.#acked = page.version;
      }
      return { event: pulled };
    } catch (error) {
      return failed(error, handled);
    }
  }

  #kept(after: number): Page | undefined {
    this.#relayed = this.#relayed.filter(({ page }) => page.version > after);
    const first = this.#relayed.find((relayed) => relayed.after <= after);
    // If this tab leads by now, it has to ask for what came after the relayed page.
    return first && { ...first.page, more: this.#relayed.length > 1 || this.sharing.leads() };
  }

  /** The page above `after`; an empty one when the server says that nothing has changed. */
  async #read(after: number, token: string): Promise<Page> {
    const etag = this.#head.after === after ? this.#head.etag : "";
    const path = `/v1/messages?after=${after}&limit=${this.#limit}`;
    let answer;
    try {
      answer = await this.http.request(path, token, etag ? [200, 304] : [200], undefined, etag);
    } catch (error) {
      if (error instanceof IncompleteError) {
        this.#limit = Math.max(Math.floor(this.#limit / SMALLER_PAGE), 1);
      }
      throw error;
    }
    this.#limit = Math.min(this.#limit * 2, PAGE_LIMIT);
    let page: Page = { messages: [], version: after, more: false };
    if (answer.status !== 304) {
      page = answer.body;
      if (!Number.isInteger(page?.version) || !Array.isArray(page.messages)) {
        throw new TypeError("the answer to a pull is not a page of messages");
      }
      if (!page.more) this.#head = { after: page.version, etag: answer.etag };
    }
    this.sharing.relay({ type: "page", after, page });
    return page;
  }
}

/** The bridge's HTTP API, called by one device. */
export class Http {
  readonly #fetch: typeof fetch;

  constructor(
    private readonly url: string,
    private readonly device: string,
    send: typeof fetch,
  ) {
    this.#fetch = send;
  }

  /**
   * POST `body`, or GET without one. Any status but those `expected` throws an HttpError.
   *
   * Its other errors name the URL, too: the server can't be reached, or the answer stalls.
   */
  async request(
    path: string,
    token: string,
    expected: number[],
    body?: unknown,
    etag?: string,
  ): Promise<{ status: number; etag: string; body: any }> {
    const send = this.#fetch; // not called as a method: a browser's fetch accepts no other `this`
    const headers: Record<string, string> = { Authorization: `Bearer ${token}` };
    if (etag) headers["If-None-Match"] = etag;
    if (body) headers["Content-Type"] = "application/json";
    const separator = path.includes("?") ? "&" : "?";
    const url = this.url + path.split("?")[0];
    const progress = new Progress();
    let response: Response | undefined;
    let text: string;
    try {
      response = await send(
        `${this.url}${path}${separator}device=${encodeURIComponent(this.device)}`,
        {
          method: body ? "POST" : "GET",
          headers,
          cache: "no-store",
          redirect: "manual", // only a login page would redirect
          signal: progress.signal,
          ...(body ? { body: JSON.stringify(body) } : {}),
        },
      );
      text = await readText(response, progress);
    } catch (error: any) {
      if (progress.signal.aborted) {
        throw new IncompleteError(`${url} stopped sending its answer`);
      }
      // Node puts what happened into `cause`, with a code when several addresses were tried.
      const why = error?.cause?.message || error?.cause?.code || error?.message;
      if (response) throw new IncompleteError(`${url}: the answer broke off: ${why}`);
      throw new Error(`${url} can't be reached: ${why}`, { cause: error });
    } finally {
      progress.end();
    }
    const { status, headers: got } = response;
    if (!expected.includes(status)) {
      // The header's other form, a date, is ignored.
      const wait = Number(got.get("Retry-After") ?? NaN);
      const detail = problemDetail(status, got.get("Content-Type"), text);
      throw new HttpError(url, status, wait >= 0 ? wait : undefined, detail);
    }
    return { status, etag: got.get("ETag") ?? "", body: text ? JSON.parse(text) : undefined };
  }
}

/** Aborts a request whose answer has stopped coming. */
class Progress {
  readonly #controller = new AbortController();
  readonly #endsAt = performance.now() + ANSWER_WITHIN_MS;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #bytes = 0;

  constructor() {
    this.#abortIn(PROGRESS_WITHIN_MS);
  }

  get signal(): AbortSignal {
    return this.#controller.signal;
  }

  /** Count bytes that have arrived. The deadline moves only after a full KiB, so that a dripping answer ends. */
  add(bytes: number): void {
    this.#bytes += bytes;
    if (this.#bytes < PROGRESS_BYTES) return;
    this.#bytes = 0;
    this.#abortIn(PROGRESS_WITHIN_MS);
  }

  /** The rest of the answer comes in one piece, so its progress can't be seen. */
  isUnseen(): void {
    this.#abortIn(ANSWER_WITHIN_MS);
  }

  end(): void {
    clearTimeout(this.#timer);
  }

  #abortIn(delayMs: number): void {
    clearTimeout(this.#timer);
    const leftMs = this.#endsAt - performance.now();
    this.#timer = setTimeout(() => this.#controller.abort(), Math.min(delayMs, leftMs));
  }
}

/** The whole body as text. Its length is limited to a page's, because a proxy may answer with anything. */
export async function readText(response: Response, progress?: Progress): Promise<string> {
  const reader = response.body?.getReader?.();
  if (!reader) {
    progress?.isUnseen(); // an empty body, or a `fetch` that can't stream
    return response.text();
  }
  const decoder = new TextDecoder();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return text + decoder.decode();
    progress?.add(value.length);
    text += decoder.decode(value, { stream: true });
    if (text.length > MAX_ANSWER_CHARS) {
      void reader.cancel();
      throw new Error(`more than ${MAX_ANSWER_CHARS} characters`);
    }
  }
}

/**
 * The event for a pull that failed. `cursor`: the version that it reached before. An error of the application
 * may have a `status` and a `retry_after_s`, too.
 */
function failed(error: any, cursor?: number): PullResult {
  return {
    event: {
      type: "pull_failed",
      unauthorized: error?.status === 401 && (error.isTheBridges ?? true),
      retry_after_s: error?.retry_after_s ?? null,
      cursor: cursor ?? null,
      reason: String(error),
    },
    error,
  };
}
