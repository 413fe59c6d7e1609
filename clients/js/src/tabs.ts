// Several tabs of one browser share one socket: a Web Lock says which of them leads, a BroadcastChannel
// carries what it hears to the others.

import type { Relayed } from "./pulling.js";

// How long the lock is kept after `stop`, so that the others hear it before one of them can lead.
const STOP_LINGER_MS = 1_000;

/** What tabs tell one another. */
export type Note =
  /** A tab that follows asks for a sign of life. */
  | { type: "hello" }
  /** The leading tab's; `connected`: whether it hears pokes. */
  | { type: "lead"; connected: boolean }
  /** The server wants no more of this client. */
  | { type: "stop"; code: number }
  | Relayed;

/** One tab among those that share `name`. */
export class Tabs {
  leads = false;
  readonly #channel: BroadcastChannel;
  readonly #waiting = new AbortController();
  #release = (): void => {};

  /** Throws where the runtime has no such locks or channels. */
  constructor(
    name: string,
    /** This tab leads from now on. */
    private readonly onLead: () => void,
    onNote: (note: Note) => void,
  ) {
    const { locks } = navigator;
    if (!locks) throw new Error("no Web Locks");
    this.#channel = new BroadcastChannel(name);
    this.#channel.onmessage = (event) => onNote(event.data);
    locks
      .request(name, { signal: this.#waiting.signal }, () => {
        this.#lead();
        return new Promise<void>((release) => {
          this.#release = release;
        });
      })
      // Left, or a context that may not lock: then each for itself.
      .catch(() => this.#lead());
  }

  tell(note: Note): void {
    this.#channel.postMessage(note);
  }

  /** Leave at once, or after having told the others to stop. */
  leave(stopCode?: number): void {
    if (stopCode && this.leads) {
      this.tell({ type: "stop", code: stopCode });
      setTimeout(() => this.leave(), STOP_LINGER_MS);
    } else {
      this.#waiting.abort();
      this.#channel.close();
      this.#release();
    }
  }

  #lead(): void {
    if (this.#waiting.signal.aborted) return;
    this.leads = true;
    this.onLead();
  }
}
