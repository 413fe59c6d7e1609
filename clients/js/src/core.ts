// The smart client's rules as a pure state machine (docs/protocol.md, section 3).
//
// `Core` takes events, each with the time and a random number, and returns the actions to carry out;
// after each event `timer` says when it wants to hear a `tick`. No clock, no socket, no randomness.
// It is pokebridge.client.core in TypeScript: both do what the scenarios of tests/vectors/client say.
//
// Three things go on side by side. The socket is had whenever it can be: lost, it is tried again
// after a full-jitter delay. The token is fetched before the first connection, before it runs out and
// when it was refused. Pulls follow from what is heard, never two at once, and are retried until one
// succeeds; while the socket can't be had they are made slowly, by the timer.

import type { Action, Event } from "./events.js";

const CLOSE_OVERLOAD = 1013;
const CLOSE_MOVED = 4307;
const CLOSE_TOKEN = 4401;
const CLOSE_FORBIDDEN = 4403;

// What a server may ask a client to wait, so that a wrong header or frame can't silence it for long.
const MAX_ASKED_DELAY_S = 300;
// A token is renewed this long before it runs out, or a quarter of its life if that is shorter.
const TOKEN_LEAD_S = 60;
// Between two renewals, in case the provider keeps handing out the same old token.
const MIN_TOKEN_REST_S = 5;

/**
 * The client's delays, in seconds.
 *
 * A delay after the n-th failure in a row is `random * min(cap, base * 2**n)`: the jitter comes after
 * the cap, so that clients stay spread however long an outage lasts.
 */
export interface Policy {
  base_s: number;
  cap_s: number;
  /** After close code 1013. */
  overload_base_s: number;
  overload_cap_s: number;
  /** A socket that was ready this long makes the next failure the first one again. */
  stable_s: number;
  /** For the opening handshake. */
  open_within_s: number;
  /** And then for `ready`: longer than the 30 s that an instance gives itself to prove the subscription. */
  ready_within_s: number;
  /** Silence after which the server is pinged. */
  ping_after_s: number;
  /** How long it then has to say anything. */
  pong_within_s: number;
  /** Without a socket: when slow polling starts; jitter makes it up to twice that. */
  poll_after_s: number;
  /** The mean interval of slow polling. */
  poll_every_s: number;
}

const DEFAULTS: Policy = {
  base_s: 1,
  cap_s: 30,
  overload_base_s: 10,
  overload_cap_s: 60,
  stable_s: 60,
  open_within_s: 10,
  ready_within_s: 35,
  ping_after_s: 30,
  pong_within_s: 10,
  poll_after_s: 10,
  poll_every_s: 30,
};

/** The message in `text`; an empty one when it is no JSON object. */
function parseFrame(text: string): Record<string, unknown> {
  try {
    return Object(JSON.parse(text)); // a list has no `type`, like any other that is no message
  } catch {
    return {};
  }
}

/** When to pull: at once, at a time picked earlier, or after a failure's delay. */
class Pulls {
  cursor: number;
  failures = 0;
  #running = false;
  #wantedAt = Infinity;
  /** Infinity: unknown, so no cursor makes it needless. */
  #wantedVersion = 0;
  #notBefore = -Infinity;

  constructor(cursor: number) {
    this.cursor = cursor;
  }

  /** When the next pull is to start; never while one is running. */
  get dueAt(): number {
    return this.#running ? Infinity : Math.max(this.#wantedAt, this.#notBefore);
  }

  /** Pull at `at` or earlier, unless the cursor is at `version` by then. */
  want(at: number, version = Infinity): void {
    if (version <= this.cursor) return;
    this.#wantedVersion =
      this.#wantedAt === Infinity ? version : Math.max(this.#wantedVersion, version);
    this.#wantedAt = Math.min(this.#wantedAt, at);
  }

  /** A pull starts, and answers all that was heard before. */
  start(): void {
    this.#running = true;
    this.#wantedAt = Infinity;
  }

  /** Everything up to `cursor` is dealt with; what was heard meanwhile may need no pull. */
  succeeded(cursor: number): void {
    this.#running = false;
    this.cursor = cursor;
    this.retryNow();
    if (this.#wantedVersion <= cursor) this.#wantedAt = Infinity;
  }

  /** Pull again, but not before `delayS` seconds, whatever is heard meanwhile. */
  failed(now: number, delayS: number): void {
    this.#running = false;
    this.failures += 1;
    this.#notBefore = now + delayS;
    this.want(now);
  }

  /** Forget the failures and their delay. */
  retryNow(): void {
    this.failures = 0;
    this.#notBefore = -Infinity;
  }
}

/** One client of the bridge. */
export class Core {
  stopped = false;
  readonly #url: string;
  readonly #policy: Policy;
  readonly #pulls: Pulls;

  #socket: "down" | "connecting" | "ready" = "down";
  #failures = 0;
  #connectAt = Infinity;
  #giveUpAt = Infinity;
  #readySince = Infinity;
  #pingAt = Infinity;
  #pongBy = Infinity;
  #pollAt = Infinity;
  /** Announced, for when the socket closes with 4307. */
  #moveUrl: string | undefined;
  /** Where to connect next, for once. */
  #nextUrl: string | undefined;
  #moved = false;
  /** To where a move said, and not ready there yet. */
  #led = false;
  /** Nobody was there: whoever takes us now should keep us. */
  #stranded = false;

  #hasToken = false;
  #fetching = false;
  #fetchAt = Infinity;
  #fetchFailures = 0;
  #refusals = 0;
  #refusedAt = -Infinity;
  // The tokens are numbered: the newest, the socket's, and that of the running pull.
  #token = 0;
  #socketToken = 0;
  #pullToken = 0;

  // Of the event that is being handled.
  #now = 0;
  #random = 0;
  #actions: Action[] = [];

  /**
   * @param url the WebSocket address, `wss://…/v1/connect`
   * @param cursor the version up to which everything is dealt with already
   */
  constructor(url: string, cursor = 0, policy: Partial<Policy> = {}) {
    this.#url = url;
    this.#pulls = new Pulls(cursor);
    this.#policy = { ...DEFAULTS, ...policy };
  }

  /** The version up to which everything is dealt with. */
  get cursor(): number {
    return this.#pulls.cursor;
  }

  /** Whether a socket is open and has said `ready`. */
  get ready(): boolean {
    return this.#socket === "ready";
  }

  /** When the next `tick` is due, in seconds; Infinity when only other events can change things. */
  get timer(): number {
    if (this.stopped) return Infinity;
    return Math.min(
      this.#giveUpAt,
      this.#pingAt,
      this.#pongBy,
      this.#pollAt,
      this.#fetching ? Infinity : this.#fetchAt,
      this.#hasToken ? Math.min(this.#connectAt, this.#pulls.dueAt) : Infinity,
    );
  }

  /**
   * Take in `event` at `now` seconds; `random` is evenly from [0, 1).
   *
   * Returns what is to be done, in this order. After a `stop` that is nothing, for ever.
   */
  handle(event: Event, now: number, random: number): Action[] {
    this.#actions = [];
    if (this.stopped) return this.#actions;
    this.#now = now;
    this.#random = random;
    this.#on(event);
    if (!this.stopped) this.#doWhatIsDue();
    return this.#actions;
  }

  #on(event: Event): void {
    switch (event.type) {
      case "opened":
      case "text":
      case "closed":
      case "refused":
        if (this.#socket !== "down") this.#onSocket(event);
        break;
      case "token":
        this.#onToken();
        break;
      case "token_failed":
        this.#fetching = false;
        this.#fetchAt = this.#now + this.#backoff(this.#fetchFailures);
        this.#fetchFailures += 1;
        break;
      case "pulled":
        this.#onPulled(event.cursor, event.more);
        break;
      case "pull_failed":
        this.#onPullFailed(event);
        break;
      case "start":
        this.#fetchAt = this.#connectAt = this.#now;
        this.#pollSoon();
        break;
      case "wake":
        this.#onWake();
      // A tick does nothing of its own: what is due by now is done after any event.
    }
  }

  #doWhatIsDue(): void {
    const now = this.#now;
    if (Math.min(this.#giveUpAt, this.#pongBy) <= now) {
      this.#actions.push({ type: "disconnect" });
      this.#loseSocket();
      this.#reconnectLater();
    } else if (this.#pingAt <= now) {
      this.#actions.push({ type: "ping" });
      this.#pingAt = Infinity;
      this.#pongBy = now + this.#policy.pong_within_s;
    }
    if (this.#pollAt <= now) {
      this.#pulls.want(now);
      this.#pollAt = now + this.#policy.poll_every_s * (0.5 + this.#random);
    }
    if (this.#fetchAt <= now && !this.#fetching) {
      this.#actions.push({ type: "fetch_token" });
      this.#fetching = true;
      this.#fetchAt = Infinity;
    }
    if (this.#connectAt <= now && this.#hasToken) this.#connect();
    if (this.#pulls.dueAt <= now && this.#hasToken) {
      this.#actions.push({ type: "pull", after: this.cursor });
      this.#pulls.start();
      this.#pullToken = this.#token;
    }
  }

  // --- the socket ---

  #onSocket(event: Event & { type: "opened" | "text" | "closed" | "refused" }): void {
    switch (event.type) {
      case "opened":
        this.#giveUpAt = this.#now + this.#policy.ready_within_s;
        break;
      case "text":
        if (this.ready) {
          this.#pingAt = this.#now + this.#policy.ping_after_s;
          this.#pongBy = Infinity;
        }
        this.#onFrame(parseFrame(event.text));
        break;
      case "closed":
        this.#onClosed(event.code);
        break;
      case "refused":
        if (event.status === 401) {
          this.#onClosed(CLOSE_TOKEN);
        } else if (event.status === 403) {
          this.#onClosed(CLOSE_FORBIDDEN);
        } else {
          this.#loseSocket();
          this.#reconnectLater(asked(event.retry_after_s));
        }
    }
  }

  #onFrame(frame: Record<string, unknown>): void {
    switch (frame.type) {
      case "ready":
        this.#onReady();
        this.#renewTokenBefore(frame.expires_in);
        break;
      case "auth":
        this.#renewTokenBefore(frame.expires_in);
        break;
      case "poke": {
        const delayS = this.#random * asked(frame.within_ms, 0.001);
        const version = Number.isInteger(frame.version) ? (frame.version as number) : undefined;
        this.#pulls.want(this.#now + delayS, version);
        break;
      }
      case "move":
        // The token goes there too, so never in the clear where it was not so before.
        if (typeof frame.url === "string" && (isWss(frame.url) || !isWss(this.#url))) {
          this.#moveUrl = frame.url;
        }
    }
  }

  #onReady(): void {
    this.#socket = "ready";
    this.#led = this.#stranded = false;
    this.#readySince = this.#now;
    this.#giveUpAt = this.#pollAt = Infinity;
    this.#pingAt = this.#now + this.#policy.ping_after_s;
    // The server answers again, so an earlier failure is no reason to wait any more.
    this.#pulls.retryNow();
    // Whatever version the frame knows: it may have been read before the subscription was live.
    this.#pulls.want(this.#now);
    if (this.#socketToken !== this.#token) this.#authenticate();
  }

  #onClosed(code: number): void {
    // Sent on before it was served is a circle; once served, a shard may move as it must.
    const movedAgain = this.#moved && !this.ready;
    this.#loseSocket();
    if (code === CLOSE_TOKEN) {
      this.#connectAt = this.#now;
      this.#onTokenRefused(this.#socketToken);
    } else if (code >= 4400 && code <= 4499) {
      this.stopped = true;
      this.#actions.push({ type: "stop", code });
    } else if (code === CLOSE_MOVED && this.#moveUrl && !movedAgain) {
      this.#nextUrl = this.#moveUrl;
      this.#connectAt = this.#now;
    } else {
      this.#reconnectLater(0, code === CLOSE_OVERLOAD);
    }
  }

  #isStable(): boolean {
    return this.#now - this.#readySince >= this.#policy.stable_s;
  }

  #loseSocket(): void {
    if (this.#isStable()) this.#failures = 0;
    if (this.ready) this.#pollSoon();
    this.#socket = "down";
    this.#readySince = this.#giveUpAt = this.#pingAt = this.#pongBy = Infinity;
  }

  #reconnectLater(askedS = 0, overload = false): void {
    if (this.#led) {
      // The owner that we were sent to may have died a moment ago. Its successor is not known yet, so
      // go back at once and say that we were moved: then we are served.
      this.#led = false;
      this.#stranded = true;
      this.#connectAt = this.#now;
      return;
    }
    const policy = this.#policy;
    const delayS = overload
      ? this.#jitter(this.#failures, policy.overload_base_s, policy.overload_cap_s)
      : this.#backoff(this.#failures);
    this.#failures += 1;
    this.#connectAt = this.#now + askedS + delayS;
  }

  #connect(): void {
    this.#led = this.#nextUrl !== undefined;
    this.#moved = this.#led || this.#stranded;
    this.#actions.push({ type: "connect", url: this.#nextUrl ?? this.#url, moved: this.#moved });
    this.#nextUrl = this.#moveUrl = undefined;
    this.#socket = "connecting";
    this.#socketToken = this.#token;
    this.#connectAt = Infinity;
    this.#giveUpAt = this.#now + this.#policy.open_within_s;
  }

  // --- the token ---

  #onToken(): void {
    this.#fetching = false;
    this.#fetchFailures = 0;
    this.#fetchAt = Infinity;
    this.#hasToken = true;
    this.#token += 1;
    if (this.ready) this.#authenticate();
  }

  #authenticate(): void {
    this.#actions.push({ type: "authenticate" });
    this.#socketToken = this.#token;
  }

  #renewTokenBefore(expiresIn: unknown): void {
    const lifetimeS = number(expiresIn);
    if (lifetimeS > 0) {
      const leadS = Math.min(TOKEN_LEAD_S, lifetimeS / 4);
      this.#fetchAt = this.#now + Math.max(lifetimeS - leadS, MIN_TOKEN_REST_S);
    }
  }

  /** Get another one: at once, but after a delay when that one was refused as well. */
  #onTokenRefused(token: number): void {
    if (token !== this.#token || !this.#hasToken) return; // it was known already
    if (this.#now - this.#refusedAt >= this.#policy.stable_s) this.#refusals = 0;
    const delayS = this.#refusals ? this.#backoff(this.#refusals - 1) : 0;
    this.#refusals += 1;
    this.#refusedAt = this.#now;
    this.#hasToken = false;
    this.#fetchAt = this.#now + delayS;
  }

  // --- pulls ---

  #onPulled(cursor: number, more?: boolean): void {
    if (more && cursor === this.cursor) {
      // More, and no way to get there: a server's fault that must not make a hot loop.
      this.#pulls.failed(this.#now, this.#backoff(this.#pulls.failures));
    } else {
      this.#pulls.succeeded(cursor);
      if (more) this.#pulls.want(this.#now);
    }
  }

  #onPullFailed(event: Event & { type: "pull_failed" }): void {
    this.#pulls.cursor = event.cursor ?? this.cursor;
    if (event.unauthorized) {
      this.#pulls.failed(this.#now, 0);
      this.#onTokenRefused(this.#pullToken);
    } else {
      const delayS = this.#backoff(this.#pulls.failures);
      this.#pulls.failed(this.#now, asked(event.retry_after_s) + delayS);
    }
  }

  #pollSoon(): void {
    this.#pollAt = this.#now + this.#policy.poll_after_s * (1 + this.#random);
  }

  #onWake(): void {
    this.#pulls.retryNow();
    if (this.#connectAt < Infinity) this.#connectAt = this.#now;
    if (!this.#hasToken) this.#fetchAt = this.#now;
    if (this.#pingAt < Infinity) this.#pingAt = this.#now;
  }

  // --- delays ---

  #backoff(failures: number): number {
    return this.#jitter(failures, this.#policy.base_s, this.#policy.cap_s);
  }

  /** Full jitter, after the cap. */
  #jitter(failures: number, baseS: number, capS: number): number {
    return this.#random * Math.min(capS, baseS * 2 ** failures);
  }
}

function isWss(url: string): boolean {
  return url.startsWith("wss://");
}

/** What a server sent as a number; 0 when it is none, or negative, or absurd. */
function number(value: unknown): number {
  return typeof value === "number" && value >= 0 && value < 1e9 ? value : 0;
}

/** A delay in seconds that the server asked for, within reason. */
function asked(value: unknown, unitS = 1): number {
  return Math.min(number(value) * unitS, MAX_ASKED_DELAY_S);
}
