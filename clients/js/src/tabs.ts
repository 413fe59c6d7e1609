// Several tabs of one browser share one socket. A Web Lock decides which of them leads; a BroadcastChannel
// carries what the leading tab receives to the others.

import type { Relayed } from "./pulling.js";
import type { ListenFrame } from "./sharing.js";

// How long the lock is kept after `stop`, so that no other tab leads before it has received the stop.
const STOP_LINGER_MS = 1_000;

/** The messages between tabs. */
export type Note =
  /** A tab that follows asks for a sign of life. */
  | { type: "hello" }
  /** The leading tab's sign of life. `connected`: whether it receives pokes. `ready`: its socket's first frame. */
  | { type: "lead"; connected: boolean; ready?: string | undefined }
  /** A tab that follows asks the leading tab to send a frame about a further recipient. */
  | { type: "up"; frame: ListenFrame; by: string }
  /** A frame about a further recipient. */
  | { type: "down"; text: string }
  /** The bridge has stopped this client for good. */
  | { type: "stop"; code: number }
  | Relayed;

/** One tab among those that share `name`. */
export class Tabs {
  leads = false;
  readonly #channel: BroadcastChannel;
  #queued = new AbortController();
  #hasLeft = false;
  #release = (): void => {};

  /** @throws Error the runtime has no Web Locks or no BroadcastChannel. */
  constructor(
    private readonly name: string,
    /** Called when this tab starts to lead, and when it no longer leads. */
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

  /** Lead at once, because the leading tab does not answer. Some systems stop a hidden page, and it keeps its lock. */
  takeOver(): void {
    this.#queued.abort();
    void this.#hold({ steal: true });
  }

  /** Leave: at once, or after telling the others to stop. */
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

  /** Lead when all tabs that queued earlier are gone. */
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
        this.#lead(true); // locks are forbidden here, so each tab has its own socket
      }
    }
  }

  #lead(leads: boolean): void {
    this.leads = leads;
    this.onChange(leads);
  }
}
