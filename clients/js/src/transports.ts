// Chooses a client's transport: a WebSocket, or long polling where no WebSocket gets through.
//
// This is a part of the core, and pure like it. The client starts with a WebSocket. Some networks refuse its
// handshake, hold back its frames or cut it after a moment. If WebSockets fail repeatedly before the bridge has sent
// anything, the client polls. If polling fails, too, the bridge is away, and the client tries a WebSocket next. While
// a client polls, it also tries a WebSocket after growing pauses, and switches to it when the bridge has sent `ready`.

/** `auto`: a WebSocket, or polling where none gets through. The others use only that transport. */
export type Transport = "auto" | "websocket" | "poll";

// A client polls after this many WebSockets in a row failed before the bridge sent anything.
const FAILURES_TO_POLL = 3;
/** A WebSocket that ends sooner than this after its `ready` counts as failed. */
export const YOUNG_S = 10;

/** Chooses the transport of each connection, and when a WebSocket is tried beside a poll. */
export class Transports {
  /** The next connection polls. */
  polls: boolean;
  /** The next WebSocket's token goes into the query. */
  inQuery = false;
  /** When a client that polls next tries a WebSocket. */
  tryAt = Infinity;
  readonly #isFixed: boolean;
  #failures = 0;
  #tries = 0;
  /** Whether no WebSocket since the last success got beyond its handshake. */
  #isRefused = true;

  constructor(
    transport: Transport,
    private readonly tryBaseS: number,
    private readonly tryCapS: number,
  ) {
    this.polls = transport === "poll";
    this.#isFixed = transport !== "auto";
  }

  /** A WebSocket's handshake was accepted. */
  opened(): void {
    this.#isRefused = false;
  }

  /**
   * A WebSocket failed before the bridge sent anything. A WebSocket that kept the client waiting counts for more
   * than one that failed at once.
   */
  failed(weight: number): void {
    if (this.#isFixed) return;
    this.#failures += weight;
    this.polls = this.#failures >= FAILURES_TO_POLL;
  }

  /** A WebSocket that worked for long enough has ended. */
  lasted(): void {
    this.#failures = this.#tries = 0;
    this.#isRefused = true;
  }

  /** A poll failed before its `ready`. Perhaps nothing works now. A WebSocket is next. */
  pollFailed(): void {
    if (this.#isFixed) return;
    this.polls = false;
    this.#failures = 0;
  }

  /** Polling works. */
  pollReady(now: number, random: number): void {
    if (this.#isFixed || this.tryAt < Infinity) return;
    this.#changeWay();
    this.#tryLater(now, random);
  }

  /** The WebSocket that was tried during polling has failed. `opened`: it failed after its handshake. */
  tryFailed(now: number, random: number, opened: boolean): void {
    if (opened) this.#isRefused = false;
    this.#changeWay();
    this.#tryLater(now, random);
  }

  /** The WebSocket that was tried is ready. If it does not last, the client polls again. */
  changedOver(): void {
    this.polls = false;
    this.tryAt = Infinity;
    this.#isRefused = false;
    this.#failures = FAILURES_TO_POLL - 1;
  }

  /** The network may have changed. */
  wake(now: number): void {
    if (this.tryAt < Infinity) this.tryAt = now;
  }

  /** Send the token in another way if no handshake succeeds although HTTP requests do. */
  #changeWay(): void {
    if (this.#isRefused) this.inQuery = !this.inQuery;
  }

  #tryLater(now: number, random: number): void {
    const pauseS = Math.min(this.tryCapS, this.tryBaseS * 2 ** this.#tries);
    this.#tries += 1;
    this.tryAt = now + pauseS * (0.5 + 0.5 * random);
  }
}
