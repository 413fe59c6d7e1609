// For backends: send messages, poke, close sessions. Works in Node ≥ 20 and in any runtime with `fetch`.

import { checkUrl, HttpError, isToken, problemDetail } from "./answers.js";
import { readText } from "./pulling.js";

// The limit for one attempt. A large message gets more time, because the line may be slow.
const ATTEMPT_MS = 10_000;
const SLOW_LINE_BYTES_PER_MS = 16;
const FIRST_PAUSE_MS = 200;
const LAST_PAUSE_MS = 5_000;
const MAX_RECIPIENTS_PER_REQUEST = 1000;

export { HttpError };

/** How a {@link Publisher} reaches the bridge. */
export interface PublisherOptions {
  /** The bridge's HTTP address. */
  url: string;
  /**
   * A JWT with the scopes that are needed (`send`, `poke`, `admin`), or a function that returns one. The
   * function is called before every attempt.
   */
  token: string | (() => string | Promise<string>);
  /** How long a call that fails is repeated, in seconds. Default: 30; 0 makes one attempt. */
  timeout_s?: number;
  fetch?: typeof fetch;
}

/** Options of a message. */
export interface SendOptions {
  /**
   * A second send with the same id from the same sender commits nothing. Default: a random id, which all attempts
   * of the call share. Give your own id if you repeat sends yourself, for example after a crash.
   */
  id?: string;
  /** Seconds after which the message may be deleted unread. Default: never. */
  ttl_s?: number;
  /** Only for clients that are connected now; deleted after 30 s at most. */
  ephemeral?: boolean;
}

/** A message that is committed. */
export interface Receipt {
  id: string;
  version: number;
  /** Whether an earlier send with the same id had committed it. */
  duplicate: boolean;
}

/**
 * Sends messages and pokes through the bridge's HTTP API.
 *
 * A call without an answer, or with the answer 429 or 5xx, is repeated with growing pauses. Every call is safe to
 * repeat. A call throws {@link HttpError} if the bridge refuses it. If no attempt succeeds in time, it throws the
 * last error. In that case the message may still have been committed.
 */
export class Publisher {
  readonly #url: string;
  readonly #options: PublisherOptions;
  readonly #timeoutMs: number;

  /** @throws TypeError an option is missing or invalid. */
  constructor(options: PublisherOptions) {
    const { url, token, timeout_s = 30 } = (options ?? {}) as PublisherOptions;
    checkUrl(url);
    if (typeof token !== "function" && !isToken(token)) {
      throw new TypeError("`token` must be a JWT, or a function that returns one");
    }
    if (!(timeout_s >= 0)) throw new TypeError(`\`timeout_s\` must be 0 or more: ${timeout_s}`);
    this.#url = url.replace(/\/+$/, "");
    this.#options = options;
    this.#timeoutMs = timeout_s * 1000;
  }

  /** Put a message into the recipient's mailbox, and poke its clients. It is durable when this returns. */
  async send(recipient: string, body: unknown, options: SendOptions = {}): Promise<Receipt> {
    const { id = globalThis.crypto.randomUUID(), ttl_s, ephemeral } = options;
    if (body === undefined) throw new TypeError("`body` must be JSON");
    const message = { recipient, body, id, ttl_s, ephemeral };
    const { status, answer } = await this.#call("POST", "/v1/messages", message, [200, 202]);
    return { id: answer.id, version: answer.version, duplicate: status === 200 };
  }

  /** Poke one recipient or many, for data that lives elsewhere. */
  async poke(recipients: string | readonly string[]): Promise<void> {
    const all = typeof recipients === "string" ? [recipients] : recipients;
    for (let start = 0; start < all.length; start += MAX_RECIPIENTS_PER_REQUEST) {
      const some = all.slice(start, start + MAX_RECIPIENTS_PER_REQUEST);
      await this.#call("POST", "/v1/pokes", { recipients: some }, [202]);
    }
  }

  /** Close the recipient's sessions on every instance. `revoke`: also refuse the tokens issued before now. */
  async disconnect(recipient: string, { revoke = false }: { revoke?: boolean } = {}): Promise<void> {
    const path = `/v1/sessions/${encodeURIComponent(recipient)}${revoke ? "?revoke=true" : ""}`;
    await this.#call("DELETE", path, undefined, [204]);
  }

  async #call(method: string, path: string, body: unknown, expected: number[]): Promise<Answer> {
    const endsAt = performance.now() + this.#timeoutMs;
    for (let failures = 0; ; failures += 1) {
      try {
        return await this.#attempt(method, path, body, expected);
      } catch (error) {
        const pauseMs = pauseAfter(error, failures);
        if (pauseMs === undefined || performance.now() + pauseMs >= endsAt) throw error;
        await new Promise((resolve) => setTimeout(resolve, pauseMs));
      }
    }
  }

  async #attempt(method: string, path: string, body: unknown, expected: number[]): Promise<Answer> {
    const { token, fetch: send = fetch } = this.#options;
    const url = this.#url + path;
    const content = body === undefined ? undefined : JSON.stringify(body);
    const fresh = typeof token === "string" ? token : await token();
    if (!isToken(fresh)) {
      throw new TypeError("`token` must return a JWT: a string of visible ASCII characters");
    }
    const headers: Record<string, string> = { Authorization: `Bearer ${fresh}` };
    if (content !== undefined) headers["Content-Type"] = "application/json";
    const signal = AbortSignal.timeout(ATTEMPT_MS + Math.ceil((content?.length ?? 0) / SLOW_LINE_BYTES_PER_MS));
    let response: Response;
    let text: string;
    try {
      response = await send(url, { method, headers, signal, redirect: "manual", ...(content && { body: content }) });
      text = await readText(response);
    } catch (error: any) {
      const why = error?.cause?.message || error?.cause?.code || error?.message;
      throw new Error(`${url} can't be reached: ${why}`, { cause: error });
    }
    const { status } = response;
    if (expected.includes(status) && (status === 204 || isOurs(text))) {
      return { status, answer: text && JSON.parse(text) };
    }
    const wait = Number(response.headers.get("Retry-After") ?? NaN);
    const detail = problemDetail(status, response.headers.get("Content-Type"), text);
    throw new HttpError(url, status, wait >= 0 ? wait : undefined, detail);
  }
}

interface Answer {
  status: number;
  answer: any;
}

/** A login page may answer 200 as well. */
function isOurs(text: string): boolean {
  try {
    const answer = JSON.parse(text);
    return "version" in answer || "accepted" in answer;
  } catch {
    return false;
  }
}

/** How long to wait before the next attempt. Undefined if the next attempt would be refused, too. */
function pauseAfter(error: unknown, failures: number): number | undefined {
  const isFinal = error instanceof TypeError || (error instanceof HttpError && error.isTheBridges && !isPassing(error));
  if (isFinal) return undefined;
  const drawn = Math.random() * Math.min(LAST_PAUSE_MS, FIRST_PAUSE_MS * 2 ** failures);
  return error instanceof HttpError ? Math.max(drawn, (error.retry_after_s ?? 0) * 1000) : drawn;
}

/** Whether to repeat. Not after 507: a full mailbox does not empty by itself. */
const isPassing = ({ status }: HttpError) => status === 429 || (status >= 500 && status !== 507);
