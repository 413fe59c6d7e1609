// The smart client's rules as a pure state machine (docs/protocol.md, section 3).
//
// `Core` takes events, each with the time and a random number, and returns the actions to carry out;
// after each event `timer` says when it wants to hear a `tick`. No clock, no socket, no randomness.
// It is pokebridge.client.core in TypeScript: both do what the scenarios of tests/vectors/client say.
//
// Four activities run side by side. The core keeps a socket open: when it is lost, the core connects again
// after a full-jitter delay. It fetches a token before the first connection, before the token expires and
// when the token was refused. It pulls when a frame gives a reason to, never twice at once, and retries
// until a pull succeeds. It also pulls by the timer: slowly without a socket, very slowly with one. On a
// socket that takes acks it acks the cursor after a pull, unless that socket has carried it already. So an ack
// that was lost with its socket is repeated.

import type { Action, Event } from "./events.js";
import { Transports, YOUNG_S, type Transport } from "./transports.js";

const CLOSE_ABNORMAL = 1006; // RFC 6455, section 7.4.1: no close frame came
const CLOSE_OVERLOAD = 1013;
const CLOSE_MOVED = 4307;
const CLOSE_TOKEN = 4401;
const CLOSE_FORBIDDEN = 4403;

// The longest wait that a server may ask for. A wrong header or frame must not silence a client for long.
const MAX_ASKED_DELAY_S = 300;
// A token is renewed this long before it expires, or a quarter of its life if that is shorter.
const TOKEN_LEAD_S = 60;
// The shortest time between two renewals, in case the provider keeps returning the same old token.
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
  /** After a socket was ready this long, failures are counted from the start again. */
  stable_s: number;
  /** For the opening handshake. */
  open_within_s: number;
  /** Then for `ready`. Longer than the 30 s that an instance may take to prove its subscription. */
  ready_within_s: number;
  /** How long the server may be silent before it is pinged. */
  ping_after_s: number;
  /** How long the server has to send anything after that ping. */
  pong_within_s: number;
  /** Without a socket: the time until slow polling starts. Jitter makes it up to twice as long. */
  poll_after_s: number;
  /** The mean interval of slow polling. */
  poll_every_s: number;
  /**
   * With a socket: the mean time between two pulls without a poke, plus or minus 20 %. These pulls find what
   * was missed because a server between the bridge and the client lost pokes.
   */
  idle_pull_s: number;
  /** The shortest time between two acks over the socket, because acks count against the limit of frames. */
  ack_every_s: number;
  /** Where no WebSocket gets through: the time from one try to the next. It grows up to the cap. */
  try_base_s: number;
  try_cap_s: number;
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
  idle_pull_s: 750,
  ack_every_s: 0.25,
  try_base_s: 10,
  try_cap_s: 1800,
};

/** The message in `text`; an empty one when it is not a JSON object. */
export function parseFrame(text: string): Record<string, unknown> {
  try {
    return Object(JSON.parse(text)); // a list has no `type`, so it is ignored like an unknown message
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
  /** The version to reach. Infinity: unknown, so the pull is necessary whatever the cursor is. */
  #wantedVersion = 0;
  #notBefore = -Infinity;

  constructor(cursor: number) {
    this.cursor = cursor;
  }

  /** When the next pull starts. Infinity while one is running. */
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

  /** A pull starts. It answers all pokes so far. */
  start(): void {
    this.#running = true;
    this.#wantedAt = Infinity;
  }

  /** Everything up to `cursor` is handled. A poke that came during the pull may need no further pull. */
  succeeded(cursor: number): void {
    this.#running = false;
    this.cursor = cursor;
    this.retryNow();
    if (this.#wantedVersion <= cursor) this.#wantedAt = Infinity;
  }

  /** Pull again, but not for `delayS` seconds, even if pokes come meanwhile. */
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
  readonly #transports: Transports;

  #socket: "down" | "connecting" | "ready" = "down";
  /** The handshake is done. */
  #isOpen = false;
  /** The frames are polled over HTTP. */
  #polls = false;
  /** When the client gives up the WebSocket that it tries. */
  #tryUntil = Infinity;
  #failures = 0;
  #connectAt = Infinity;
  #giveUpAt = Infinity;
  #readySince = Infinity;
  #pingAt = Infinity;
  #pongBy = Infinity;
  #pollAt = Infinity;
  /** From the server's `ready`. */
  #takesAcks = false;
  /** The newest version that was acked over this socket. */
  #acked = 0;
  #ackedAt = -Infinity;
  #ackAt = Infinity;
  /** The address that a `move` announced. It is used when the socket closes with 4307. */
  #moveUrl: string | undefined;
  /** Where the next connection goes. Later ones go to `url` again. */
  #nextUrl: string | undefined;
  #moved = false;
  /** The socket goes to the address of a move and is not ready yet. */
  #led = false;
  /** Nobody answered at a move's address. The next connection says `moved`, so the instance keeps it. */
  #stranded = false;

  #hasToken = false;
  #fetching = false;
  #fetchAt = Infinity;
  #fetchFailures = 0;
  #refusals = 0;
  #refusedAt = -Infinity;
  // The numbers of the newest token, of the socket's token and of the running pull's token.
  #token = 0;
  #socketToken = 0;
  #tryToken = 0;
  #pullToken = 0;

  // Of the event that is being handled: its time, its random number, and the actions so far.
  #now = 0;
  #random = 0;
  #actions: Action[] = [];

  /**
   * @param url the WebSocket address, `wss://…/v1/connect`
   * @param cursor the version up to which everything is handled already
   * @param transport how the client connects
   */
  constructor(
    url: string,
    cursor = 0,
    policy: Partial<Policy> = {},
    transport: Transport = "websocket",
  ) {
    this.#url = url;
    this.#pulls = new Pulls(cursor);
    this.#policy = { ...DEFAULTS, ...policy };
    this.#transports = new Transports(transport, this.#policy.try_base_s, this.#policy.try_cap_s);
  }

  /** The version up to which everything is handled. */
  get cursor(): number {
    return this.#pulls.cursor;
  }

  /** Whether a socket is open and has said `ready`. */
  get ready(): boolean {
    return this.#socket === "ready";
  }

  /** Whether frames are polled over HTTP, because no WebSocket gets through. */
  get polls(): boolean {
    return this.#polls && this.#socket !== "down";
  }

  /** Whether the socket takes acks, so that a pull does not ack over HTTP. */
  get acksBySocket(): boolean {
    return this.ready && this.#takesAcks;
  }

  /** The version of an ack that is not due yet. A client that closes should send it. */
  get waitingAck(): number | undefined {
    return this.#ackAt < Infinity ? this.cursor : undefined;
  }

  /** When the next `tick` is due, in seconds; Infinity when only other events can change things. */
  get timer(): number {
    if (this.stopped) return Infinity;
    return Math.min(
      this.#giveUpAt,
      this.#pingAt,
      this.#pongBy,
      this.#pollAt,
      this.#ackAt,
      this.#nextTry(),
      this.#fetching ? Infinity : this.#fetchAt,
      this.#hasToken ? Math.min(this.#connectAt, this.#pulls.dueAt) : Infinity,
    );
  }

  /**
   * Handle `event` at `now` seconds; `random` is uniform in [0, 1).
   *
   * Returns the actions to carry out, in this order. After a `stop` there are none.
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
      case "upgraded":
      case "try_failed":
        this.#onTry(event);
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
        this.#onPulled(event);
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
      // A tick needs no handling here: after each event the core does whatever is due.
    }
  }

  #doWhatIsDue(): void {
    const now = this.#now;
    if (Math.min(this.#giveUpAt, this.#pongBy) <= now) {
      // A proxy may hold back the frames. A failure that took longer counts for more.
      const givesUp = this.#giveUpAt <= now;
      this.#judgeFailure(1 + Number(givesUp) + Number(givesUp && this.#isOpen), true);
      this.#actions.push({ type: "disconnect" });
      this.#loseSocket();
      this.#reconnectLater();
    } else if (this.#pingAt <= now) {
      this.#actions.push({ type: "ping" });
      this.#pingAt = Infinity;
      this.#pongBy = now + this.#policy.pong_within_s;
    }
    if (this.#nextTry() <= now) this.#tryOrAbandon();
    if (this.#ackAt <= now) {
      this.#actions.push({ type: "ack", version: this.cursor });
      this.#acked = this.cursor;
      this.#ackedAt = now;
      this.#ackAt = Infinity;
    }
    if (this.#pollAt <= now) {
      this.#pulls.want(now);
      this.#pollLater();
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
        this.#isOpen = true;
        if (!this.#polls) this.#transports.opened();
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
        // The instance at a move's address may have other keys or another time. The first address accepts the token.
        if (event.status === 401 && !this.#led) {
          this.#onClosed(CLOSE_TOKEN);
        } else if (event.status === 403 && !this.#led) {
          this.#onClosed(CLOSE_FORBIDDEN);
        } else {
          if (this.#polls) this.#judgeFailure();
          this.#loseSocket();
          this.#reconnectLater(asked(event.retry_after_s));
        }
    }
  }

  #onFrame(frame: Record<string, unknown>): void {
    switch (frame.type) {
      case "ready":
        this.#takesAcks = frame.acks === true;
        this.#acked = 0;
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
        // The token is sent to the new address, too. So an encrypted connection must not move to an unencrypted one.
        if (typeof frame.url === "string" && (isWss(frame.url) || !isWss(this.#url))) {
          this.#moveUrl = frame.url;
        }
    }
  }

  #onReady(): void {
    this.#socket = "ready";
    if (this.#polls) this.#transports.pollReady(this.#now, this.#random);
    this.#led = this.#stranded = false;
    this.#readySince = this.#now;
    this.#giveUpAt = Infinity;
    this.#pollLater();
    this.#pingAt = this.#now + this.#policy.ping_after_s;
    // The server answers again, so an earlier failure is no reason to wait.
    this.#pulls.retryNow();
    // Pull even if `ready` has a version: the server may have read it before the subscription was live.
    this.#pulls.want(this.#now);
    if (this.#socketToken !== this.#token) this.#authenticate();
  }

  #onClosed(code: number): void {
    // A second move before `ready` is a loop. After `ready` a move is normal, because shards move.
    const movedAgain = this.#moved && !this.ready;
    if (this.#now - this.#readySince >= YOUNG_S && !this.#polls) this.#transports.lasted();
    else if (code === CLOSE_ABNORMAL) this.#judgeFailure();
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

  /** The socket failed before the bridge sent anything. Perhaps this transport does not get through. */
  #judgeFailure(weight = 1, silent = false): void {
    if (this.#polls) {
      if (!this.ready) this.#transports.pollFailed();
    } else if (silent || this.#now - this.#readySince < YOUNG_S) {
      this.#transports.failed(weight);
    }
  }

  #isStable(): boolean {
    return this.#now - this.#readySince >= this.#policy.stable_s;
  }

  #loseSocket(): void {
    if (this.#isStable()) this.#failures = 0;
    if (this.ready) this.#pollSoon();
    this.#socket = "down";
    this.#isOpen = false;
    this.#readySince = this.#giveUpAt = this.#pingAt = this.#pongBy = this.#ackAt = Infinity;
  }

  #reconnectLater(askedS = 0, overload = false): void {
    if (this.#led) {
      // The owner at the move's address may have died a moment ago, and its successor may not be known
      // yet. Connect to the first address at once, with `moved`: an instance then serves this client.
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
    this.#polls = this.#transports.polls;
    this.#actions.push({
      type: "connect",
      url: this.#nextUrl ?? this.#url,
      moved: this.#moved,
      ...(this.#polls ? { poll: true } : this.#inQuery),
    });
    this.#nextUrl = this.#moveUrl = undefined;
    this.#socket = "connecting";
    this.#socketToken = this.#token;
    this.#connectAt = Infinity;
    this.#giveUpAt = this.#now + this.#policy.open_within_s;
  }

  // --- a WebSocket that is tried while the client polls ---

  get #inQuery(): { in_query?: true } {
    return this.#transports.inQuery ? { in_query: true } : {};
  }

  #nextTry(): number {
    if (this.#tryUntil < Infinity) return this.#tryUntil;
    return this.#polls && this.ready ? this.#transports.tryAt : Infinity;
  }

  #tryOrAbandon(): void {
    if (this.#tryUntil < Infinity) {
      this.#actions.push({ type: "abandon" });
      this.#onTry({ type: "try_failed" });
    } else {
      this.#actions.push({ type: "try", url: this.#url, ...this.#inQuery });
      this.#tryUntil = this.#now + this.#policy.open_within_s;
      this.#tryToken = this.#token;
    }
  }

  #onTry(event: Event & { type: "upgraded" | "try_failed" }): void {
    if (this.#tryUntil === Infinity) return; // it was abandoned
    this.#tryUntil = Infinity;
    if (event.type === "try_failed") {
      this.#transports.tryFailed(this.#now, this.#random, event.opened ?? false);
      return;
    }
    this.#transports.changedOver();
    this.#polls = false;
    this.#connectAt = this.#pongBy = Infinity;
    this.#socketToken = this.#tryToken;
    this.#onFrame(parseFrame(event.text));
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

  /** Fetch another token: at once, or after a delay if the last token was refused, too. */
  #onTokenRefused(token: number): void {
    if (token !== this.#token || !this.#hasToken) return; // a newer token is there, or on its way
    if (this.#now - this.#refusedAt >= this.#policy.stable_s) this.#refusals = 0;
    const delayS = this.#refusals ? this.#backoff(this.#refusals - 1) : 0;
    this.#refusals += 1;
    this.#refusedAt = this.#now;
    this.#hasToken = false;
    this.#fetchAt = this.#now + delayS;
  }

  // --- pulls ---

  #onPulled({ cursor, more, unacked }: Event & { type: "pulled" }): void {
    if (more && cursor === this.cursor) {
      // `more` without progress is a fault of the server. It must not cause a busy loop.
      this.#pulls.failed(this.#now, this.#backoff(this.#pulls.failures));
    } else {
      this.#pulls.succeeded(cursor);
      if (more) this.#pulls.want(this.#now);
      this.#acked = Math.min(this.#acked, cursor); // the mailbox may have been started anew
      if (unacked && this.acksBySocket && cursor > this.#acked) {
        this.#ackAt = Math.max(this.#now, this.#ackedAt + this.#policy.ack_every_s);
      }
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

  #pollLater(): void {
    const pauseS = this.ready
      ? this.#policy.idle_pull_s * (0.8 + 0.4 * this.#random)
      : this.#policy.poll_every_s * (0.5 + this.#random);
    this.#pollAt = this.#now + pauseS;
  }

  #onWake(): void {
    this.#pulls.retryNow();
    this.#transports.wake(this.#now);
    if (this.#connectAt < Infinity) this.#connectAt = this.#now;
    if (!this.#hasToken) this.#fetchAt = this.#now;
    if (this.#pingAt < Infinity && !this.#polls) this.#pingAt = this.#now;
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

/** A number that a server sent; 0 when it is not a number, negative, or absurd. */
export function number(value: unknown): number {
  return typeof value === "number" && value >= 0 && value < 1e9 ? value : 0;
}

/** A delay in seconds that the server asked for, within reason. */
function asked(value: unknown, unitS = 1): number {
  return Math.min(number(value) * unitS, MAX_ASKED_DELAY_S);
}
