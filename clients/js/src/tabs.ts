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
  #queued = new AbortController();
  #hasLeft = false;
  #release = (): void => {};

  /** Throws where the runtime has no such locks or channels. */
  constructor(
    private readonly name: string,
    /** This tab leads from now on, or no longer. */
    private readonly onChange: (leads: boolean) => void,
    onNote: (note: Note) => void,
  ) {
    if (!navigator.locks) throw new Error("no Web Locks");
    this.#channel = new BroadcastChannel(name);
    this.#channel.onmessage = (event) => onNote(event.data);
    this.#queue();
  }

  tell(note: Note): void {
    this.#channel.postMessage(note);
  }

  /** Lead at once: who leads does not answer. Some systems stop a page in the background, lock and all. */
  takeOver(): void {
    this.#queued.abort();
    void this.#hold({ steal: true });
  }

  /** Leave at once, or after having told the others to stop. */
  leave(stopCode?: number): void {
    this.#hasLeft = true;
    if (stopCode && this.leads) {
      this.tell({ type: "stop", code: stopCode });
      setTimeout(() => this.leave(), STOP_LINGER_MS);
    } else {
      this.#queued.abort();
      this.#channel.close();
      this.#release();
    }
  }

  /** Lead when all who came before are gone. */
  #queue(): void {
    this.#queued = new AbortController();
    void this.#hold({ signal: this.#queued.signal });
  }

  async #hold(options: LockOptions): Promise<void> {
    try {
      await navigator.locks.request(this.name, options, () => {
        if (this.#hasLeft) return;
        this.#lead(true);
        return new Promise<void>((release) => {
          this.#release = release;
        });
      });
    } catch {
      if (this.#hasLeft || options.signal?.aborted) return;
      if (this.leads) {
        // Another tab has taken over.
        this.#lead(false);
        this.#queue();
      } else {
        this.#lead(true); // a context that may not lock: each for itself
      }
    }
  }

  #lead(leads: boolean): void {
    this.leads = leads;
    this.onChange(leads);
  }
}
