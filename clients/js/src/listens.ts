// The further recipients that a client's socket carries. Each recipient has its own core, which treats a part of the
// client's socket as its socket: it gets the frames about its recipient as if they had come over a separate socket.

import { number, parseFrame } from "./core.js";
import type { Event } from "./events.js";

/** The close code for a recipient's core when the client's socket is lost. The core then listens again. */
export const SOCKET_LOST = 1001;
const ABNORMAL_CLOSURE = 1006;

/** An event for the core of a recipient. */
export interface Given {
  recipient: string;
  event: Event & { type: "text" | "closed" };
}

/** The further recipients that a socket carries. */
export class Listens {
  /** How many recipients the socket may carry, as its `ready` said; undefined while there is no socket. */
  atMost: number | undefined;
  readonly #carried = new Set<string>();

  /** A new socket is ready: `text` is its first frame. It carries nothing yet. */
  ready(text: string): Given[] {
    const lost = this.lose();
    this.atMost = Math.floor(number(parseFrame(text).listens));
    return lost;
  }

  /** The socket is gone. */
  lose(): Given[] {
    const closed = { type: "closed", code: SOCKET_LOST, reason: "the socket is gone" } as const;
    const lost = [...this.#carried].map((recipient) => ({ recipient, event: closed }));
    this.#carried.clear();
    this.atMost = undefined;
    return lost;
  }

  /** The socket does not accept `listen` messages. From now on each recipient has its own socket. */
  refuse(): Given[] {
    const lost = this.lose();
    this.atMost = 0;
    return lost;
  }

  /** Whether the socket can carry `recipient`. If so, the caller sends `listen`. */
  carry(recipient: string): boolean {
    if (this.#carried.size >= (this.atMost ?? 0) && !this.#carried.has(recipient)) return false;
    this.#carried.add(recipient);
    return true;
  }

  /** Stop carrying `recipient`. Returns whether the caller has to send `unlisten`. */
  drop(recipient: string): boolean {
    return this.#carried.delete(recipient);
  }

  /** What a frame says about a further recipient. Undefined if the frame is for the client's own core. */
  hear(text: string): Given | undefined {
    const { type, recipient, ...frame } = parseFrame(text);
    if (typeof recipient !== "string" || !["poke", "listening", "unlistened"].includes(type as string)) return;
    if (type === "unlistened") {
      this.#carried.delete(recipient);
      const code = Math.floor(number(frame.code)) || ABNORMAL_CLOSURE;
      return { recipient, event: { type: "closed", code, reason: String(frame.reason ?? "") } };
    }
    const heard = { type: type === "poke" ? "poke" : "ready", ...frame };
    return { recipient, event: { type: "text", text: JSON.stringify(heard) } };
  }
}
