// By which transport a client connects: a WebSocket, or long-polling where none gets through.
//
// A part of the core, and pure as it is. A WebSocket comes first. Some networks refuse its handshake, hold back
// its frames or cut it after a moment. Such failures come without a word of the bridge, and again and again. Then the
// client polls. A failure to poll as well means that the bridge is away, and a WebSocket is next. A client that
// polls tries a WebSocket beside it, after pauses that grow, and changes over when the bridge has said `ready` on it.

/** `auto`: a WebSocket, and polling where none gets through. The others: nothing else. */
export type Transport = "auto" | "websocket" | "poll";

// A client polls after so many WebSockets in a row that failed without a word of the bridge.
const FAILURES_TO_POLL = 3;
/** A WebSocket that ends sooner after its `ready` has failed. */
export const YOUNG_S = 10;

/** Chooses the transport of each connection, and when a WebSocket is tried beside a poll. */
export class Transports {
  /** The next connection polls. */
  polls: boolean;
  /** The next WebSocket's token goes into the query. */
  inQuery = false;
  /** When a client that polls tries a WebSocket. */
  tryAt = Infinity;
  readonly #isFixed: boolean;
  #failures = 0;
  #tries = 0;
  /** No WebSocket of this row of failures has got beyond its handshake. */
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
   * A WebSocket has failed without a word of the bridge. One that has kept the client waiting counts for more than
   * one that failed at once.
   */
  failed(weight: number): void {
    if (this.#isFixed) return;
    this.#failures += weight;
    this.polls = this.#failures >= FAILURES_TO_POLL;
  }

  /** A WebSocket has ended that worked for long enough. */
  lasted(): void {
    this.#failures = this.#tries = 0;
    this.#isRefused = true;
  }

  /** A poll has failed before its `ready`: perhaps all fails. A WebSocket is next. */
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

  /** The WebSocket that was tried beside the poll has failed, perhaps once it was `opened`. */
  tryFailed(now: number, random: number, opened: boolean): void {
    if (opened) this.#isRefused = false;
    this.#changeWay();
    this.#tryLater(now, random);
  }

  /** The WebSocket that was tried is ready. It has to last, or the client polls again. */
  changedOver(): void {
    this.polls = false;
    this.tryAt = Infinity;
    this.#isRefused = false;
    this.#failures = FAILURES_TO_POLL - 1;
  }

  /** The network may be another one. */
  wake(now: number): void {
    if (this.tryAt < Infinity) this.tryAt = now;
  }

  /** Send the token in another way if no handshake succeeds although HTTP does. */
  #changeWay(): void {
    if (this.#isRefused) this.inQuery = !this.inQuery;
  }

  #tryLater(now: number, random: number): void {
    const pauseS = Math.min(this.tryCapS, this.tryBaseS * 2 ** this.#tries);
    this.#tries += 1;
    this.tryAt = now + pauseS * (0.5 + 0.5 * random);
  }
}
