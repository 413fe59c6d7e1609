// The shell around the core: a WebSocket, HTTP, timers, and the other tabs.

import { Core, type Policy } from "./core.js";
import type { Action, Event } from "./events.js";
import { Http, HttpError, MailboxPuller, OwnPuller } from "./pulling.js";
import type { OnMessages, OnPoke, Page, Puller, Sharing } from "./pulling.js";
import { Tabs, type Note } from "./tabs.js";

const TOKEN_TIMEOUT_MS = 30_000;
// The longest that a timer waits, so that the time a machine was asleep is noticed soon after.
const MAX_NAP_MS = 10_000;
// A timer this late means that the machine, or the page, was asleep.
const ASLEEP_MS = 5_000;
// A tab that comes to lead does not connect with a token that is this near its end.
const OLD_TOKEN_MS = 30_000;
// A leading tab that takes longer to answer is asleep.
const LEADER_ANSWERS_WITHIN_MS = 2_000;
const ABNORMAL_CLOSURE = 1006; // RFC 6455, section 7.4.1: no close frame came
const CLOSE_TOKEN = 4401;
// A browser does not say why a handshake failed; every third time in a row HTTP is asked.
const FAILURES_PER_QUESTION = 3;

/** What is used of a WebSocket: a browser's, Node's, or that of the `ws` package. */
export interface SocketLike {
  onopen: ((event: any) => void) | null;
  onmessage: ((event: any) => void) | null;
  onclose: ((event: any) => void) | null;
  onerror: ((event: any) => void) | null;
  send(data: string): void;
  close(): void;
}

interface CommonOptions {
  /** The bridge's HTTP address. */
  url: string;
  /**
   * A JWT, or a function that returns a new one: it is called at the start, before the old one runs
   * out, and when it was refused.
   */
  token: string | (() => string | Promise<string>);
  /** The name of this device: a message waits for the ack of each that is known. */
  device?: string;
  /** The version up to which everything is dealt with already: keep `client.cursor` to go on from there. */
  cursor?: number;
  /**
   * Whether tabs of this browser share one socket, when they have the same `url`, `device` and
   * recipient: by default in pages, where the browser has Web Locks.
   */
  share?: boolean;
  /** For runtimes without a global one, such as Node 20: that of the `ws` package. */
  WebSocket?: new (url: string, protocols: string[]) => SocketLike;
  fetch?: typeof fetch;
  /** The delays. */
  policy?: Partial<Policy>;
}

/** What is pulled when a poke comes: the bridge's mailbox, or what `onPoke` pulls. */
export type Options = CommonOptions &
  ({ onMessages: OnMessages; onPoke?: never } | { onPoke: OnPoke; onMessages?: never });

/** `connected`: pokes are heard now. `stopped`: by the bridge, for good. `closed`: by `close()`. */
export type State = "connecting" | "connected" | "stopped" | "closed";

/** What a client tells, by name. */
export interface ClientEvents {
  state: State;
  /** Something failed and will be tried again. */
  error: unknown;
  /** Everything that happens, and what the client does about it; none of it holds a token. */
  step: Event | Action;
}

type Listener<Name extends keyof ClientEvents> = (value: ClientEvents[Name]) => void;
type Connect = Action & { type: "connect" };

/** Holds a connection to the bridge, hears pokes and pulls, until it is closed. */
export class Client {
  readonly #options: Options;
  readonly #url: string;
  readonly #device: string;
  readonly #http: Http;
  readonly #core: Core;
  readonly #puller: Puller;
  readonly #listeners: { [Name in keyof ClientEvents]: Set<Listener<Name>> };
  readonly #unlisten = new AbortController();
  #state: State = "connecting";
  #stopCode: number | undefined;
  #token = "";
  #timer: ReturnType<typeof setTimeout> | undefined;
  #asleepMs = 0;
  #socket: SocketLike | undefined;
  #failedHandshakes = 0;
  #tabs: Tabs | undefined;
  #cannotShare: boolean;
  /** In a tab that follows: the socket that it would open if it led. */
  #wanted: Connect | undefined;
  #leaderIsConnected = false;
  #patience: ReturnType<typeof setTimeout> | undefined;

  /** @internal */
  constructor(options: Options) {
    this.#options = options;
    if (!/^https?:\/\//.test(options.url)) {
      throw new TypeError(`the url must start with http:// or https://: ${options.url}`);
    }
    if (!options.onMessages === !options.onPoke) {
      throw new TypeError("connect takes either onMessages or onPoke");
    }
    if (!this.#webSocket) {
      throw new TypeError("no WebSocket here: pass that of the ws package as `WebSocket`");
    }
    this.#url = options.url.replace(/\/+$/, "");
    this.#device = options.device ?? "default";
    this.#cannotShare = !(options.share ?? typeof document === "object");
    this.#listeners = { state: new Set(), error: new Set(), step: new Set() };
    this.#http = new Http(this.#url, this.#device, options.fetch ?? fetch);
    const sharing: Sharing = {
      leads: () => this.#leads && !this.#ended,
      relay: (note) => this.#leads && this.#tabs?.tell(note),
    };
    const cursor = options.cursor ?? 0;
    const { onMessages, onPoke } = options;
    this.#puller = onMessages
      ? new MailboxPuller(this.#http, (messages) => this.#ended || onMessages(messages), sharing, cursor)
      : new OwnPuller(onPoke!, sharing);
    this.#core = new Core(`ws${this.#url.slice(4)}/v1/connect`, cursor, options.policy);
    this.#listenToThePage();
    // Not now: whoever made this client may listen first.
    setTimeout(() => this.#feed({ type: "start" }));
  }

  /** The version up to which everything is dealt with. */
  get cursor(): number {
    return this.#core.cursor;
  }

  /** How things stand; the `state` event tells when it changes. */
  get state(): State {
    return this.#state;
  }

  /** Why the bridge stopped this client: 4403, not allowed, or 4409, replaced by newer sessions. */
  get stopCode(): number | undefined {
    return this.#stopCode;
  }

  /** Call `listener` from now on; the function that is returned ends that. */
  on<Name extends keyof ClientEvents>(name: Name, listener: Listener<Name>): () => void {
    this.#listeners[name].add(listener);
    return () => this.#listeners[name].delete(listener);
  }

  /** Try now what waits out a delay: the network is back, or the machine woke up. */
  wake(): void {
    this.#feed({ type: "wake" });
  }

  /** Let go of everything, for good. A page whose handler is still running is not acked. */
  close(): void {
    this.#end("closed");
  }

  // --- between the core and the world ---

  #feed(event: Event): void {
    if (this.#ended) return;
    if (event.type !== "tick") this.#emit("step", event);
    const now = (performance.now() + this.#asleepMs) / 1000;
    for (const action of this.#core.handle(event, now, Math.random())) {
      this.#emit("step", action);
      if (!this.#ended) this.#carryOut(action);
    }
    if (this.#ended) return;
    this.#sleepFor((this.#core.timer - now) * 1000);
    this.#setState(
      this.#core.ready && (this.#leads || this.#leaderIsConnected) ? "connected" : "connecting",
    );
  }

  #carryOut(action: Action): void {
    switch (action.type) {
      case "fetch_token":
        void this.#fetchToken();
        break;
      case "connect":
        this.#connect(action);
        break;
      case "disconnect":
        this.#drop();
        break;
      case "ping":
        this.#leads ? this.#send({ type: "ping" }) : this.#askTheLeader();
        break;
      case "authenticate":
        this.#send({ type: "auth", token: this.#token });
        break;
      case "pull":
        void this.#pull(action.after);
        break;
      case "stop":
        this.#stopCode = action.code;
        this.#end("stopped");
    }
  }

  async #fetchToken(): Promise<void> {
    const { token } = this.#options;
    try {
      const fresh = await within(TOKEN_TIMEOUT_MS, typeof token === "string" ? token : token());
      // Anything else could break an HTTP header.
      if (!/^[!-~]+$/.test(fresh)) throw new TypeError("a token is visible ASCII");
      this.#token = fresh;
      this.#feed({ type: "token" });
    } catch (error) {
      this.#emit("error", error);
      this.#feed({ type: "token_failed", reason: String(error) });
    }
  }

  async #pull(after: number): Promise<void> {
    const end = await this.#puller.pull(after, this.#token);
    if (end.type === "pull_failed") this.#emit("error", new Error(end.reason));
    this.#feed(end);
  }

  #sleepFor(delayMs: number): void {
    clearTimeout(this.#timer);
    const napMs = Math.ceil(Math.min(Math.max(delayMs, 0), MAX_NAP_MS));
    const wall = Date.now();
    const mono = performance.now();
    this.#timer = setTimeout(() => {
      const passedMs = Date.now() - wall;
      if (passedMs - napMs < ASLEEP_MS) return this.#feed({ type: "tick" });
      // Some systems' monotonic clocks stand still while the machine sleeps; tokens run out nonetheless.
      this.#asleepMs += Math.max(0, passedMs - (performance.now() - mono));
      this.wake();
    }, napMs);
  }

  #listenToThePage(): void {
    const { signal } = this.#unlisten;
    const listen = (target: EventTarget | undefined, name: string, listener: () => void) =>
      target?.addEventListener?.(name, listener, { signal });
    const page = typeof document === "object" ? document : undefined;
    listen(globalThis as unknown as EventTarget, "online", () => this.wake());
    listen(globalThis as unknown as EventTarget, "offline", () => {
      if (this.#socket) this.#lose("offline");
    });
    listen(page, "visibilitychange", () => page?.hidden || this.wake());
  }

  get #ended(): boolean {
    return this.#state === "closed" || this.#state === "stopped";
  }

  #end(state: "closed" | "stopped"): void {
    if (this.#ended) return;
    this.#setState(state);
    clearTimeout(this.#timer);
    clearTimeout(this.#patience);
    this.#unlisten.abort();
    this.#tabs?.leave(this.#stopCode);
    this.#drop();
  }

  #setState(state: State): void {
    if (state === this.#state) return;
    this.#state = state;
    if (this.#leads) this.#tellThatWeLead();
    this.#emit("state", state);
  }

  #emit<Name extends keyof ClientEvents>(name: Name, value: ClientEvents[Name]): void {
    const listeners = this.#listeners[name];
    if (name === "error" && !listeners.size) console.warn("pokebridge:", value);
    for (const listener of listeners) {
      try {
        listener(value);
      } catch (error) {
        console.error(error); // the listener's own
      }
    }
  }

  // --- the WebSocket ---

  get #webSocket(): CommonOptions["WebSocket"] {
    return this.#options.WebSocket ?? globalThis.WebSocket;
  }

  #connect(action: Connect): void {
    if (!this.#cannotShare && !this.#tabs) this.#share();
    if (this.#leads) return this.#open(action);
    this.#wanted = action;
    this.#askTheLeader();
  }

  #open({ url, moved }: Connect): void {
    const WebSocket = this.#webSocket!;
    let socket: SocketLike;
    let opened = false;
    try {
      const target = new URL(url);
      target.searchParams.set("device", this.#device);
      if (moved) target.searchParams.set("moved", "1");
      socket = new WebSocket(target.href, ["pokebridge.v1", `bearer.${this.#token}`]);
    } catch (error) {
      // A URL that was announced, or a policy of the page's; after the action that we are in.
      setTimeout(() => this.#lose(String(error)));
      return;
    }
    this.#socket = socket;
    const feed = (event: Event) => this.#socket === socket && this.#feed(event);
    socket.onopen = () => {
      opened = true;
      this.#failedHandshakes = 0;
      feed({ type: "opened" });
    };
    socket.onmessage = ({ data }) => typeof data === "string" && feed({ type: "text", text: data });
    socket.onclose = async ({ code, reason }) => {
      if (this.#socket !== socket) return;
      const ask = !opened && ++this.#failedHandshakes % FAILURES_PER_QUESTION === 0;
      if (ask && (await this.#tokenIsRefused())) feed({ type: "refused", status: 401 });
      else feed({ type: "closed", code, reason });
    };
    socket.onerror = () => {}; // a close follows
  }

  async #tokenIsRefused(): Promise<boolean> {
    try {
      await this.#http.request("/v1/connect-info", this.#token);
    } catch (error) {
      return error instanceof HttpError && error.status === 401;
    }
    return false;
  }

  /** Drop the socket; no event of it follows. */
  #drop(): void {
    const socket = this.#socket;
    this.#socket = this.#wanted = undefined;
    socket?.close();
  }

  #lose(reason: string): void {
    this.#drop();
    this.#feed({ type: "closed", code: ABNORMAL_CLOSURE, reason });
  }

  #send(message: object): void {
    this.#socket?.send(JSON.stringify(message));
  }

  // --- the other tabs ---

  /** Whether the socket is this client's own. */
  get #leads(): boolean {
    return !this.#tabs || this.#tabs.leads;
  }

  #share(): void {
    const kind = this.#options.onMessages ? "mailbox" : "own";
    try {
      const { sub } = claims(this.#token);
      if (!sub) throw new TypeError("the token does not say whose it is");
      const name = ["pokebridge", kind, this.#url, this.#device, sub].join(" ");
      this.#tabs = new Tabs(
        name,
        (leads) => (leads ? this.#lead() : this.#lose("another tab leads")),
        (note) => this.#onNote(note),
      );
    } catch {
      // An old browser, an insecure page, or a token that is no JWT: each tab for itself.
      this.#cannotShare = true;
    }
  }

  #lead(): void {
    const wanted = this.#wanted;
    this.#wanted = undefined;
    clearTimeout(this.#patience);
    if (wanted) {
      this.#open(wanted);
    } else {
      // Nobody has renewed this tab's token while it followed.
      const isOld = claims(this.#token).exp * 1000 < Date.now() + OLD_TOKEN_MS;
      const code = isOld ? CLOSE_TOKEN : ABNORMAL_CLOSURE;
      this.#feed({ type: "closed", code, reason: "the leading tab is gone" });
      this.wake();
    }
    this.#tellThatWeLead();
  }

  #askTheLeader(): void {
    this.#tabs?.tell({ type: "hello" });
    clearTimeout(this.#patience);
    this.#patience = setTimeout(() => {
      // One tab that is looked at is enough; the others follow it.
      if (!globalThis.document?.hidden) this.#tabs?.takeOver();
    }, LEADER_ANSWERS_WITHIN_MS);
  }

  #tellThatWeLead(): void {
    this.#tabs?.tell({ type: "lead", connected: this.#state === "connected" });
  }

  #onNote(note: Note): void {
    switch (note.type) {
      case "hello":
        if (this.#leads) this.#tellThatWeLead();
        break;
      case "lead":
        if (!this.#leads) this.#onLeader(note.connected);
        break;
      case "page":
        this.#onPage(note.after, note.page);
        break;
      case "poke":
        this.#hear({ type: "poke" });
        break;
      case "stop":
        this.#feed({ type: "closed", code: note.code });
    }
  }

  #onLeader(connected: boolean): void {
    clearTimeout(this.#patience);
    this.#leaderIsConnected = connected;
    if (this.#wanted) {
      this.#wanted = undefined;
      this.#feed({ type: "opened" });
      this.#hear({ type: "ready" });
    } else {
      this.#hear({ type: "pong" });
    }
  }

  #onPage(after: number, page: Page): void {
    if (this.#puller instanceof MailboxPuller) this.#puller.keep(after, page);
    this.#hear({ type: "poke", version: page.version });
  }

  /** As if it had come through a socket. */
  #hear(frame: object): void {
    this.#feed({ type: "text", text: JSON.stringify(frame) });
  }
}

/** What a JWT says of itself (RFC 7519, section 4.1): whose it is, and until when. */
function claims(token: string): { sub: string; exp: number } {
  const payload = token.split(".")[1] ?? "";
  return JSON.parse(atob(payload.replace(/-/g, "+").replace(/_/g, "/")));
}

function within<T>(timeoutMs: number, value: T | Promise<T>): Promise<T> {
  let timer: ReturnType<typeof setTimeout>;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`no token within ${timeoutMs} ms`)), timeoutMs);
  });
  return Promise.race([value, late]).finally(() => clearTimeout(timer));
}
