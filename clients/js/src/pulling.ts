// What a pull is: a page of one's mailbox over HTTP (docs/protocol.md, section 4), or the user's own.

import type { Event } from "./events.js";

const HTTP_TIMEOUT_MS = 10_000;
const PAGE_LIMIT = 50;
// What a tab keeps of what the leading tab has pulled; a slower one pulls for itself.
const MAX_RELAYED_PAGES = 20;

/** A message from the mailbox. `body` is whatever JSON value its sender gave it. */
export interface Message {
  version: number;
  id: string;
  sender: string;
  body: any;
  /** RFC 3339. */
  sent_at: string;
}

/** Deals with messages, in order; when it returns they are acked, when it throws they come again. */
export type OnMessages = (messages: Message[]) => unknown;

/** Pulls what is newer than the cursor it gets; returns the new cursor, or nothing without any. */
export type OnPoke = (cursor: number) => number | void | Promise<number | void>;

/** Messages above some cursor: all up to `version`. */
export interface Page {
  messages: Message[];
  version: number;
  more: boolean;
}

/** What the tab that makes the pulls tells the others. */
export type Relayed = { type: "page"; after: number; page: Page } | { type: "poke" };

type PullEnd = Event & { type: "pulled" | "pull_failed" };

/** Makes the core's pulls. */
export interface Puller {
  /** Deal with what is newer than `after`, or with some of it. Throws nothing. */
  pull(after: number, token: string): Promise<PullEnd>;
}

/** How a puller stands to those of other tabs. */
export interface Sharing {
  /** Whether this tab answers for all: it acks, and its pulls are relayed. */
  leads(): boolean;
  relay(note: Relayed): void;
}

/** An HTTP answer that is no success. */
export class HttpError extends Error {
  constructor(
    readonly status: number,
    readonly retry_after_s: number | undefined,
    path: string,
  ) {
    super(`${path} answered ${status}`);
  }
}

/** Leaves it all to a function of the user's. */
export class OwnPuller implements Puller {
  constructor(
    private readonly onPoke: OnPoke,
    private readonly sharing: Sharing,
  ) {}

  async pull(after: number): Promise<PullEnd> {
    this.sharing.relay({ type: "poke" });
    try {
      return { type: "pulled", cursor: (await this.onPoke(after)) ?? after };
    } catch (error) {
      return failed(error);
    }
  }
}

/**
 * Pulls a page, hands it over and acks it, in this order, so that nothing is lost on the way.
 *
 * A page whose handler throws is not acked and comes again; one whose ack fails does not, but its ack
 * does. In a tab that does not lead, what the leading tab has relayed saves the request.
 */
export class MailboxPuller implements Puller {
  #acked: number;
  // What the server said the head was when nothing was left above the cursor.
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

  /** Keep what the leading tab has pulled. */
  keep(after: number, page: Page): void {
    this.#relayed = [...this.#relayed, { after, page }].slice(-MAX_RELAYED_PAGES);
  }

  async pull(after: number, token: string): Promise<PullEnd> {
    let dealtWith: number | undefined;
    try {
      const read = this.#kept(after) ?? (await this.#read(after, token));
      // Another tab may have led meanwhile, and acked what it relayed: then it is nowhere but here.
      const page = this.#kept(after) ?? read;
      if (page.version < after) {
        // The mailbox was begun anew: it is behind the cursor.
        this.#acked = 0;
        this.#relayed = [];
        this.sharing.relay({ type: "poke" });
        return { type: "pulled", cursor: 0, more: true };
      }
      const messages = page.messages.filter((message) => message.version > after);
      if (messages.length) await this.onMessages(messages);
      dealtWith = page.version;
      if (this.sharing.leads() && page.version > this.#acked) {
        await this.http.request("/v1/messages/ack", token, { version: page.version });
        this.#acked = page.version;
      }
      return { type: "pulled", cursor: page.version, more: page.more };
    } catch (error) {
      return failed(error, dealtWith);
    }
  }

  #kept(after: number): Page | undefined {
    this.#relayed = this.#relayed.filter(({ page }) => page.version > after);
    const first = this.#relayed.find((relayed) => relayed.after <= after);
    // Whoever leads by now has to ask for what came after it.
    return first && { ...first.page, more: this.#relayed.length > 1 || this.sharing.leads() };
  }

  /** The page above `after`; an empty one when the server says that nothing has changed. */
  async #read(after: number, token: string): Promise<Page> {
    const etag = this.#head.after === after ? this.#head.etag : "";
    const path = `/v1/messages?after=${after}&limit=${PAGE_LIMIT}`;
    const answer = await this.http.request(path, token, undefined, etag);
    let page: Page = { messages: [], version: after, more: false };
    if (answer.status !== 304) {
      page = answer.body;
      if (!Number.isInteger(page?.version)) throw new TypeError("what came is no page of messages");
      if (!page.more) this.#head = { after: page.version, etag: answer.etag };
    }
    this.sharing.relay({ type: "page", after, page });
    return page;
  }
}

/** The bridge's HTTP API, as one device. */
export class Http {
  readonly #fetch: typeof fetch;

  constructor(
    private readonly url: string,
    private readonly device: string,
    send: typeof fetch,
  ) {
    this.#fetch = send;
  }

  /** POST `body`, or GET without any; `status` is then 200 to 299 or 304, else HttpError is thrown. */
  async request(
    path: string,
    token: string,
    body?: unknown,
    etag?: string,
  ): Promise<{ status: number; etag: string; body: any }> {
    const send = this.#fetch; // not as a method: a browser's fetch wants no other `this`
    const headers: Record<string, string> = { Authorization: `Bearer ${token}` };
    if (etag) headers["If-None-Match"] = etag;
    if (body) headers["Content-Type"] = "application/json";
    const separator = path.includes("?") ? "&" : "?";
    const response = await send(
      `${this.url}${path}${separator}device=${encodeURIComponent(this.device)}`,
      {
        method: body ? "POST" : "GET",
        headers,
        cache: "no-store",
        signal: AbortSignal.timeout(HTTP_TIMEOUT_MS),
        ...(body ? { body: JSON.stringify(body) } : {}),
      },
    );
    const { status } = response;
    const text = await response.text();
    if (!response.ok && status !== 304) {
      // The header's other form, a date, is not heeded.
      const wait = Number(response.headers.get("Retry-After") ?? NaN);
      throw new HttpError(status, wait >= 0 ? wait : undefined, path);
    }
    return {
      status,
      etag: response.headers.get("ETag") ?? "",
      body: text ? JSON.parse(text) : undefined,
    };
  }
}

/** For the core; `cursor` if the pull got somewhere nonetheless. A user's error may have a `status`, too. */
function failed(error: any, cursor?: number): PullEnd {
  return {
    type: "pull_failed",
    unauthorized: error?.status === 401,
    retry_after_s: error?.retry_after_s ?? null,
    cursor: cursor ?? null,
    reason: String(error),
  };
}
