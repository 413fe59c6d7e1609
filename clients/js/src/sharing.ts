// The part of a client's socket that carries further recipients.

import type { SocketLike } from "./client.js";
import type { Event } from "./events.js";
import { Listens, SOCKET_LOST, type Given } from "./listens.js";

/** The frames that a client sends about a further recipient. */
export interface ListenFrame {
  type: "listen" | "unlisten";
  recipient: string;
  token?: string;
}

/** A client that listens to a further recipient. */
export interface Listener {
  readonly token: string;
  /** The client has a new socket. */
  attach(): void;
  /** The bridge has stopped the client for good. */
  stop(code: number): void;
  close(): void;
}

export class SharedSocket {
  readonly #listens = new Listens();
  readonly #listeners = new Map<string, Listener>();
  readonly #parts = new Map<string, Part>();
  /** For each recipient, the clients that listen to it: other tabs' by their names, this tab's as an empty string. */
  readonly #holders = new Map<string, Set<string>>();

  constructor(
    /** Sends a message over the socket if there is one. */
    readonly say: (message: ListenFrame) => void,
  ) {}

  /** @throws TypeError the client listens to `recipient` already. */
  add(recipient: string, create: () => Listener): void {
    if (this.#listeners.has(recipient)) {
      throw new TypeError(`this client listens to ${recipient} already: close that first`);
    }
    this.#listeners.set(recipient, create());
  }

  /** Forget `recipient`, to which nobody listens any more. */
  forget(recipient: string): void {
    this.#listeners.delete(recipient);
  }

  /** Stop listening to all recipients. */
  close(code?: number): void {
    for (const each of [...this.#listeners.values()]) code ? each.stop(code) : each.close();
  }

  // --- what happens to the socket ---

  /** Handle a frame. Returns whether it was about a further recipient. */
  hear(text: string): boolean {
    const given = this.#listens.hear(text);
    if (given) this.#give([given]);
    return given !== undefined;
  }

  /** There is a new socket, whose first frame is `text`. */
  ready(text: string): void {
    this.#holders.clear();
    this.#give(this.#listens.ready(text));
    for (const each of [...this.#listeners.values()]) each.attach();
  }

  lose(): void {
    this.#holders.clear();
    this.#give(this.#listens.lose());
  }

  /** The socket does not accept `listen` messages. */
  refuse(): void {
    this.#holders.clear();
    this.#give(this.#listens.refuse());
  }

  #give(given: Given[]): void {
    for (const { recipient, event } of given) this.#parts.get(recipient)?.take(event);
  }

  // --- called by what listens ---

  /**
   * A part of the socket for `recipient`. Undefined if the recipient needs its own socket.
   *
   * @throws Error there is no socket now, so its limit is unknown.
   */
  open(recipient: string): Part | undefined {
    if (this.#listens.atMost === undefined) throw new Error("the client has no socket");
    const listener = this.#listeners.get(recipient);
    if (!listener || !this.#hold(recipient, "")) return undefined;
    const part = new Part(recipient, listener, this);
    this.#parts.set(recipient, part);
    return part;
  }

  /** Give `part` back. */
  drop(recipient: string, part: Part): void {
    if (this.#parts.get(recipient) !== part) return;
    this.#parts.delete(recipient);
    this.#release(recipient, "");
  }

  // --- called for other tabs ---

  /** Send a frame for the client `by` of another tab. Returns false if the socket does not accept it. */
  relay(frame: ListenFrame, by: string): boolean {
    const { type, recipient } = frame;
    if (type === "unlisten") {
      this.#release(recipient, by);
      return true;
    }
    if (!this.#hold(recipient, by)) return false;
    this.say(frame);
    return true;
  }

  #hold(recipient: string, by: string): boolean {
    if (!this.#listens.carry(recipient)) return false;
    const holders = this.#holders.get(recipient) ?? new Set();
    this.#holders.set(recipient, holders.add(by));
    return true;
  }

  #release(recipient: string, by: string): void {
    const holders = this.#holders.get(recipient);
    if (!holders?.delete(by) || holders.size) return;
    this.#holders.delete(recipient);
    if (this.#listens.drop(recipient)) this.say({ type: "unlisten", recipient });
  }
}

/** The part of a client's socket for one further recipient, with the interface of a WebSocket. */
export class Part implements SocketLike {
  onopen: ((event: any) => void) | null = null;
  onmessage: ((event: any) => void) | null = null;
  onclose: ((event: any) => void) | null = null;
  onerror: ((event: any) => void) | null = null;

  constructor(
    private readonly recipient: string,
    private readonly listener: Listener,
    private readonly shared: SharedSocket,
  ) {
    queueMicrotask(() => {
      if (!this.onopen) return; // closed meanwhile
      this.onopen({});
      this.#ask();
    });
  }

  /** Handle a frame of the core. A ping is answered here, because the client checks the socket. Acks go over HTTP. */
  send(data: string): void {
    const { type } = JSON.parse(data);
    if (type === "auth") this.#ask();
    if (type === "ping") queueMicrotask(() => this.onmessage?.({ data: '{"type":"pong"}' }));
  }

  close(): void {
    this.onopen = this.onmessage = this.onclose = null;
    this.shared.drop(this.recipient, this);
  }

  take(event: Given["event"]): void {
    if (event.type === "text") return this.onmessage?.({ data: event.text });
    const { onclose } = this;
    this.close();
    onclose?.({ code: event.code, reason: event.reason ?? "" });
  }

  #ask(): void {
    this.shared.say({ type: "listen", recipient: this.recipient, token: this.listener.token });
  }
}

/** The event for a core that wants a socket while the client has none. */
export const noSocket: Event = { type: "closed", code: SOCKET_LOST, reason: "the client has no socket" };
