// The shell around the core: a WebSocket, HTTP, timers, and the browser's other tabs.

import { checkUrl, HttpError, isToken } from "./answers.js";
import { Core, parseFrame, type Policy } from "./core.js";
import type { Action, Event } from "./events.js";
import { Poller, type PollEnd } from "./polling.js";
import { Http, MailboxPuller, OwnPuller } from "./pulling.js";
import type { OnMessages, OnPoke, Page, Puller, Sharing } from "./pulling.js";
import { noSocket, Part, SharedSocket, type Listener as Listens, type ListenFrame } from "./sharing.js";
import { Tabs, type Note } from "./tabs.js";
import type { Transport } from "./transports.js";

const TOKEN_TIMEOUT_MS = 30_000;
// The longest timer. Shorter timers notice the end of a machine's sleep sooner.
const MAX_NAP_MS = 10_000;
// If a timer is this late, the machine or the page was asleep.
const ASLEEP_MS = 5_000;
// A tab that starts to lead fetches a new token if its own expires within this time.
const OLD_TOKEN_MS = 30_000;
// A leading tab that does not answer within this time counts as asleep.
const LEADER_ANSWERS_WITHIN_MS = 2_000;
const ABNORMAL_CLOSURE = 1006; // RFC 6455, section 7.4.1: no close frame came
// What a sub-protocol may consist of (RFC 9110, section 5.6.2). A JWT that is padded with = is none.
const IS_PROTOCOL = /^[-!#$%&'*+.^_`|~0-9A-Za-z]+$/;
const CLOSE_OVERLOAD = 1013;
const CLOSE_TOKEN = 4401;
// A browser does not say why a handshake failed, so the client asks by HTTP: at its first failure if it has
// never had a socket, and at every third failure in a row. More requests would double the load of a storm.
const FAILURES_PER_QUESTION = 3;

/** The part of a WebSocket that the client uses. Those of browsers, Node and the `ws` package have it. */
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
   * A JWT, or a function that returns a new one. The function is called at the start, before the token
   * expires, and when the token was refused.
   */
  token: string | (() => string | Promise<string>);
  /** The name of this device. A message is kept until each known device of its recipient has acked it. */
  device?: string;
  /** The version up to which everything is handled. Store `client.cursor` to continue from there. */
  cursor?: number;
  /**
   * Whether tabs of this browser that have the same `url`, `device` and recipient share one socket.
   * Default: true in pages of a browser that has Web Locks.
   */
  share?: boolean;
  /** For runtimes without a global WebSocket, such as Node 20: the class of the `ws` package. */
  WebSocket?: new (url: string, protocols: string[]) => SocketLike;
  fetch?: typeof fetch;
  /**
   * `auto`, the default, connects by WebSocket. Where no WebSocket gets through, it polls over HTTP and tries a
   * WebSocket from time to time. `websocket` and `poll` use only the one or the other.
   */
  transport?: Transport;
  /** Delays that differ from the defaults. */
  policy?: Partial<Policy>;
}

/** A pull reads the bridge's mailbox for `onMessages`, or calls `onPoke`. */
type Handlers = { onMessages: OnMessages; onPoke?: never } | { onPoke: OnPoke; onMessages?: never };

export type Options = CommonOptions & Handlers;

/** Options for a further recipient. They mean the same as the client's. */
export type ListenOptions = Pick<CommonOptions, "token" | "cursor"> & Handlers;

/** Listens to a further recipient until it, or its client, is closed. */
export type Listening = Pick<Client, "cursor" | "state" | "stopCode" | "on" | "close">;

/** The client whose socket carries the recipient. */
interface Upstream {
  recipient: string;
  shared: SharedSocket;
}

/** `connected`: pokes arrive. `stopped`: by the bridge, for good. `closed`: by `close()`. */
export type State = "connecting" | "connected" | "stopped" | "closed";

/** The events of a client, by name. */
export interface ClientEvents {
  state: State;
  /** Why something failed. The client will try again. */
  error: unknown;
  /** Each event, and what the client does about it. No step holds a token. */
  step: Event | Action;
}

type Listener<Name extends keyof ClientEvents> = (value: ClientEvents[Name]) => void;
type Connect = Action & { type: "connect" };
type Try = Action & { type: "try" };

/** Holds a connection to the bridge and pulls when it is poked, until it is closed. */
export class Client {
  readonly #options: Options;
  readonly #url: string;
  readonly #device: string;
  readonly #http: Http;
  readonly #poller: Poller;
  readonly #core: Core;
  readonly #puller: Puller;
  readonly #listeners: { [Name in keyof ClientEvents]: Set<Listener<Name>> };
  readonly #listening = new AbortController();
  #state: State = "connecting";
  #stopCode: number | undefined;
  #token = "";
  #timer: ReturnType<typeof setTimeout> | undefined;
  #asleepMs = 0;
  #socket: SocketLike | undefined;
  /** The WebSocket that the client tries while it polls. */
  #tried: SocketLike | undefined;
  #failedHandshakes = 0;
  #hadSocket = false;
  #tabs: Tabs | undefined;
  #sharesNothing: boolean;
  /** In a tab that follows: the connection that the tab would open if it led. */
  #wanted: Connect | undefined;
  #leaderIsConnected = false;
  /** The first frame of the socket of this tab, or of the leading tab. */
  #ready: string | undefined;
  readonly #shared = new SharedSocket((frame) => this.#say(frame));
  readonly #id = Math.random().toString(36).slice(2);
  #leaderTimer: ReturnType<typeof setTimeout> | undefined;

  /** @internal */
  constructor(
    options: Options,
    private readonly upstream?: Upstream,
  ) {
    checkOptions(options);
    this.#options = options;
    if (!this.#webSocket) {
      throw new TypeError(
        "this runtime has no WebSocket: pass that of the ws package as the option `WebSocket`",
      );
    }
    this.#url = options.url.replace(/\/+$/, "");
    this.#device = options.device ?? "default";
    this.#sharesNothing = !(options.share ?? typeof document === "object");
    this.#listeners = { state: new Set(), error: new Set(), step: new Set() };
    // A browser's fetch must not be called as a method of another object.
    const send: typeof fetch = (...call) => (options.fetch ?? fetch)(...call);
    this.#http = new Http(this.#url, this.#device, send);
    this.#poller = new Poller(
      send,
      () => this.#token,
      () => this.#shared.refuse(),
    );
    const sharing: Sharing = {
      leads: () => this.#leads && !this.#ended,
      acksBySocket: () => this.#core.acksBySocket,
      relay: (note) => this.#leads && this.#tabs?.tell(note),
    };
    const cursor = options.cursor ?? 0;
    const { onMessages, onPoke } = options;
    this.#puller = onMessages
      ? new MailboxPuller(this.#http, (messages) => this.#ended || onMessages(messages), sharing, cursor)
      : new OwnPuller(onPoke!, sharing);
    const transport = options.transport ?? "auto";
    this.#core = new Core(`ws${this.#url.slice(4)}/v1/connect`, cursor, options.policy, transport);
    this.#listenToThePage();
    // Later, so that the caller can subscribe to the first events.
    setTimeout(() => this.#feed({ type: "start" }));
  }

  /** The version up to which everything is handled. */
  get cursor(): number {
    return this.#core.cursor;
  }

  /** The client's state. Each change is a `state` event. */
  get state(): State {
    return this.#state;
  }

  /** Whether pokes are polled over HTTP, because no WebSocket gets through. */
  get polls(): boolean {
    return this.#core.polls;
  }

  /** Why the bridge stopped this client: 4403, not allowed, or 4409, replaced by newer sessions. */
  get stopCode(): number | undefined {
    return this.#stopCode;
  }

  /**
   * Listen to `recipient` as well: to a document, a room or a team. Its pokes come over this client's socket. Its pulls
   * use its own token and cursor. If the instance does not accept a further recipient, it gets its own socket.
   *
   * @throws TypeError an option is missing or invalid, or the client listens to `recipient` already.
   */
  listen(recipient: string, options: ListenOptions): Listening {
    if (typeof recipient !== "string" || !/^[!-~]{1,256}$/.test(recipient)) {
      throw new TypeError(`\`recipient\` must be 1 to 256 visible ASCII characters: ${recipient}`);
    }
    if (this.#ended) throw new TypeError("the client has ended");
    const { onMessages: _, onPoke: __, ...common } = this.#options;
    const { token, cursor = 0, onMessages, onPoke } = options;
    const handlers = { ...(onMessages && { onMessages }), ...(onPoke && { onPoke }) } as Handlers;
    let client!: Client;
    this.#shared.add(recipient, () => {
      client = new Client({ ...common, token, cursor, ...handlers }, { recipient, shared: this.#shared });
      return client.#asListener();
    });
    return client;
  }

  #asListener(): Listens {
    const token = () => this.#token;
    return {
      get token() {
        return token();
      },
      attach: () => {
        if (!this.#core.ready) this.wake();
      },
      stop: (code) => {
        this.#stopCode = code;
        this.#end("stopped");
      },
      close: () => this.close(),
    };
  }

  /** Call `listener` at each event of this name. Returns a function that unsubscribes it. */
  on<Name extends keyof ClientEvents>(name: Name, listener: Listener<Name>): () => void {
    this.#listeners[name].add(listener);
    return () => this.#listeners[name].delete(listener);
  }

  /** Retry at once instead of waiting for a delay to end: the network is back, or the machine woke up. */
  wake(): void {
    this.#feed({ type: "wake" });
  }

  /** Close for good. Messages that the handler is still handling are not acked. */
  close(): void {
    this.#end("closed");
  }

  // --- the core's events and actions ---

  #feed(event: Event): void {
    if (this.#ended) return;
    if (event.type !== "tick") this.#emit("step", event);
    const now = (performance.now() + this.#asleepMs) / 1000;
    const wasReady = this.#core.ready;
    const actions = this.#core.handle(event, now, Math.random());
    if (wasReady && !this.#core.ready) {
      this.#ready = undefined;
      this.#shared.lose();
    }
    for (const action of actions) {
      this.#emit("step", action);
      if (!this.#ended) this.#perform(action);
    }
    if (this.#ended) return;
    this.#sleepFor((this.#core.timer - now) * 1000);
    this.#setState(
      this.#core.ready && (this.#leads || this.#leaderIsConnected) ? "connected" : "connecting",
    );
  }

  #perform(action: Action): void {
    switch (action.type) {
      case "fetch_token":
        void this.#fetchToken();
        break;
      case "connect":
        this.#connect(action);
        break;
      case "try":
        this.#try(action);
        break;
      case "abandon":
        this.#abandon();
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
      case "ack":
        this.#send({ type: "ack", version: action.version });
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
      if (!isToken(fresh)) {
        throw new TypeError("`token` must return a JWT: a string of visible ASCII characters");
      }
      this.#token = fresh;
      this.#feed({ type: "token" });
    } catch (error) {
      this.#emit("error", error);
      this.#feed({ type: "token_failed", reason: String(error) });
    }
  }

  async #pull(after: number): Promise<void> {
    const { event, error } = await this.#puller.pull(after, this.#token);
    if (event.type === "pull_failed" && !this.#ended) this.#emit("error", error);
    this.#feed(event);
  }

  #sleepFor(delayMs: number): void {
    clearTimeout(this.#timer);
    const napMs = Math.ceil(Math.min(Math.max(delayMs, 0), MAX_NAP_MS));
    const wall = Date.now();
    const mono = performance.now();
    this.#timer = setTimeout(() => {
      const passedMs = Date.now() - wall;
      if (passedMs - napMs < ASLEEP_MS) return this.#feed({ type: "tick" });
      // On some systems the monotonic clock stands still while the machine sleeps, but tokens expire.
      this.#asleepMs += Math.max(0, passedMs - (performance.now() - mono));
      this.wake();
    }, napMs);
  }

  #listenToThePage(): void {
    const { signal } = this.#listening;
    const listen = (target: EventTarget | undefined, name: string, listener: (event: globalThis.Event) => void) =>
      target?.addEventListener?.(name, listener, { signal });
    const page = typeof document === "object" ? document : undefined;
    listen(globalThis as unknown as EventTarget, "online", () => this.wake());
    listen(globalThis as unknown as EventTarget, "offline", () => {
      if (this.#socket) this.#lose("offline");
    });
    listen(page, "visibilitychange", () => page?.hidden || this.wake());
    // The browser may keep this page in its back/forward cache. Then it cuts the socket.
    listen(globalThis as unknown as EventTarget, "pagehide", (event) => {
      if (this.#socket && (event as PageTransitionEvent).persisted) this.#lose("the page was left");
    });
    listen(globalThis as unknown as EventTarget, "pageshow", (event) => {
      if ((event as PageTransitionEvent).persisted) this.wake();
    });
  }

  get #ended(): boolean {
    return this.#state === "closed" || this.#state === "stopped";
  }

  #end(state: "closed" | "stopped"): void {
    if (this.#ended) return;
    this.#setState(state);
    this.#shared.close(this.#stopCode);
    this.upstream?.shared.forget(this.upstream.recipient);
    clearTimeout(this.#timer);
    clearTimeout(this.#leaderTimer);
    this.#listening.abort();
    this.#tabs?.leave(this.#stopCode);
    const version = this.#core.waitingAck;
    if (version !== undefined) this.#send({ type: "ack", version });
    this.#abandon();
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
        console.error(error); // a fault of the listener, not of this client
      }
    }
  }

  // --- the WebSocket ---

  get #webSocket(): CommonOptions["WebSocket"] {
    return this.#options.WebSocket ?? globalThis.WebSocket;
  }

  #connect(action: Connect): void {
    if (!this.#sharesNothing && !this.#tabs) this.#share();
    if (this.#leads) return this.#open(action);
    this.#wanted = action;
    this.#askTheLeader();
  }

  #open({ url, moved, poll, in_query }: Connect): void {
    let socket: SocketLike;
    let part: Part | undefined;
    let opened = false;
    try {
      part = this.upstream?.shared.open(this.upstream.recipient);
    } catch {
      setTimeout(() => this.#feed(noSocket)); // not now: an action is running
      return;
    }
    try {
      const query: Record<string, string> = { device: this.#device, ...(moved ? { moved: "1" } : {}) };
      socket = part ?? (poll ? this.#poller.open(url, query) : this.#dial(url, query, in_query));
    } catch (error) {
      // The address of a move is invalid, or the page's policy forbids it. Report it later: an action is running.
      const reason = this.#tell(error);
      setTimeout(() => this.#lose(reason));
      return;
    }
    this.#own(socket);
    socket.onopen = () => {
      opened = true;
      if (!poll && !part) this.#hasSocket();
      if (this.#socket === socket) this.#feed({ type: "opened" });
    };
    const close = socket.onclose!;
    socket.onclose = async (end: PollEnd) => {
      const ask = this.#socket === socket && !opened && !poll && !part && this.#shouldAskWhy();
      const isRefused = ask && (await this.#askWhyRefused(url));
      close(isRefused ? { ...end, refused: { type: "refused", status: 401 } } : end);
    };
  }

  /** Open a WebSocket. The token goes into the query if a proxy refuses it as a sub-protocol. */
  #dial(url: string, query: Record<string, string>, inQuery = false): SocketLike {
    const target = new URL(url);
    const asProtocol = !inQuery && IS_PROTOCOL.test(this.#token);
    const all = asProtocol ? query : { ...query, access_token: this.#token };
    for (const [name, value] of Object.entries(all)) target.searchParams.set(name, value);
    // The token comes first, because some proxies keep only the first sub-protocol.
    const protocols = asProtocol ? [`bearer.${this.#token}`, "pokebridge.v1"] : ["pokebridge.v1"];
    const WebSocket = this.#webSocket!;
    return new WebSocket(target.href, protocols);
  }

  /** Why a WebSocket could not be made. A browser may show its sub-protocols and its URL, which bring the token. */
  #tell(error: unknown): string {
    const token = this.#token;
    return [token, encodeURIComponent(token)].reduce((text, each) => text.replaceAll(each, "…"), String(error));
  }

  /** Make `socket` the client's socket. */
  #own(socket: SocketLike): void {
    this.#socket = socket;
    const feed = (event: Event) => this.#socket === socket && this.#feed(event);
    socket.onmessage = ({ data }) => {
      if (typeof data === "string" && this.#socket === socket) this.#onText(data);
    };
    socket.onclose = (end: PollEnd) =>
      feed(end.refused ?? { type: "closed", code: end.code, reason: end.reason });
    socket.onerror = () => {}; // a close follows
  }

  /** Handle a frame that the socket received. */
  #onText(text: string): void {
    if (this.#shared.hear(text)) {
      this.#tabs?.tell({ type: "down", text });
      return;
    }
    this.#feed({ type: "text", text });
    if (parseFrame(text).type === "ready") this.#isReady(text);
  }

  #isReady(text: string): void {
    if (this.#ended) return;
    this.#ready = text;
    this.#shared.ready(text);
    this.#tellThatWeLead();
  }

  #hasSocket(): void {
    this.#hadSocket = true;
    this.#failedHandshakes = 0;
  }

  /** Open a WebSocket while the client polls, and switch to it when it is `ready`. */
  #try({ url, in_query }: Try): void {
    let opened = false;
    const fail = (reason: string) => this.#feed({ type: "try_failed", opened, reason });
    let socket: SocketLike;
    try {
      if (!this.#leads) throw new Error("another tab leads");
      if (this.#socket instanceof Part) throw new Error("the client's socket carries this recipient");
      socket = this.#dial(url, { device: this.#device }, in_query);
    } catch (error) {
      const reason = this.#tell(error);
      setTimeout(() => fail(reason)); // not now: an action is running
      return;
    }
    this.#tried = socket;
    socket.onopen = () => {
      opened = true;
    };
    socket.onerror = () => {}; // a close follows
    socket.onclose = ({ reason }) => {
      if (this.#tried !== socket) return;
      this.#tried = undefined;
      fail(reason);
    };
    socket.onmessage = ({ data }) => {
      if (this.#tried !== socket) return;
      this.#tried = undefined;
      if (typeof data !== "string" || !data.includes('"ready"')) {
        socket.close();
        return fail("its first frame is not `ready`");
      }
      this.#drop();
      this.#own(socket);
      this.#hasSocket();
      this.#feed({ type: "upgraded", text: data });
      this.#isReady(data);
    };
  }

  #abandon(): void {
    const socket = this.#tried;
    this.#tried = undefined;
    socket?.close();
  }

  /** Whether to ask why a handshake has failed. */
  #shouldAskWhy(): boolean {
    const failures = ++this.#failedHandshakes;
    return (failures === 1 && !this.#hadSocket) || failures % FAILURES_PER_QUESTION === 0;
  }

  /** Report to the application why a handshake at `url` failed. Returns whether the token was refused. */
  async #askWhyRefused(url: string): Promise<boolean> {
    let why: unknown = new Error(
      `${url} takes no WebSocket, though the bridge answers over HTTP: check that proxies on the way, and` +
        " the page's content security policy, allow WebSockets, and that proxies do not change" +
        " Sec-WebSocket-Protocol, which carries the token",
    );
    try {
      const { body } = await this.#http.request("/v1/connect-info", this.#token, [200]);
      if (typeof body?.url !== "string") why = new Error(`${this.#url} does not answer as pokebridge does`);
    } catch (error) {
      why = error;
    }
    if (!this.#ended) this.#emit("error", why);
    return why instanceof HttpError && why.status === 401 && why.isTheBridges;
  }

  /** Drop the socket. It causes no further event. */
  #drop(): void {
    const socket = this.#socket;
    this.#socket = this.#wanted = undefined;
    socket?.close();
  }

  #lose(reason: string): void {
    this.#abandon();
    this.#drop();
    this.#feed({ type: "closed", code: ABNORMAL_CLOSURE, reason });
  }

  #send(message: object): void {
    this.#socket?.send(JSON.stringify(message));
  }

  /** Send `frame` over the socket of this tab or of the leading tab. */
  #say(frame: ListenFrame): void {
    this.#leads ? this.#send(frame) : this.#tabs?.tell({ type: "up", frame, by: this.#id });
  }

  // --- the other tabs ---

  /** Whether this tab has the socket. */
  get #leads(): boolean {
    return !this.#tabs || this.#tabs.leads;
  }

  #share(): void {
    const kind = this.#options.onMessages ? "mailbox" : "own";
    try {
      const sub = this.upstream?.recipient ?? claims(this.#token).sub;
      if (!sub) throw new TypeError("the token has no `sub`");
      const name = ["pokebridge", kind, this.#url, this.#device, sub].join(" ");
      this.#tabs = new Tabs(
        name,
        (leads) => (leads ? this.#lead() : this.#lose("another tab leads")),
        (note) => this.#onNote(note),
      );
    } catch {
      // In an old browser, on an insecure page or with a token that is not a JWT, each tab has its own socket.
      this.#sharesNothing = true;
    }
  }

  #lead(): void {
    const wanted = this.#wanted;
    this.#wanted = undefined;
    clearTimeout(this.#leaderTimer);
    if (wanted) {
      this.#open(wanted);
    } else {
      // While a tab follows, its token is not renewed.
      const isOld = claims(this.#token).exp * 1000 < Date.now() + OLD_TOKEN_MS;
      const code = isOld ? CLOSE_TOKEN : ABNORMAL_CLOSURE;
      this.#feed({ type: "closed", code, reason: "the leading tab is gone" });
      this.wake();
    }
    this.#tellThatWeLead();
  }

  #askTheLeader(): void {
    this.#tabs?.tell({ type: "hello" });
    clearTimeout(this.#leaderTimer);
    this.#leaderTimer = setTimeout(() => {
      // A hidden tab does not take over: a visible one will, and the others follow that one.
      if (!globalThis.document?.hidden) this.#tabs?.takeOver();
    }, LEADER_ANSWERS_WITHIN_MS);
  }

  #tellThatWeLead(): void {
    this.#tabs?.tell({ type: "lead", connected: this.#state === "connected", ready: this.#ready });
  }

  #onNote(note: Note): void {
    switch (note.type) {
      case "hello":
        if (this.#leads) this.#tellThatWeLead();
        break;
      case "lead":
        if (!this.#leads) this.#onLeader(note.connected, note.ready);
        break;
      case "up":
        if (this.#leads && !this.#shared.relay(note.frame, note.by)) this.#refuseToRelay(note.frame);
        break;
      case "down":
        if (!this.#leads) this.#shared.hear(note.text);
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

  /** The socket carries this recipient no longer. The other tab tries again later. */
  #refuseToRelay({ recipient }: ListenFrame): void {
    const frame = { type: "unlistened", recipient, code: CLOSE_OVERLOAD, reason: "the tabs listen to too many" };
    this.#tabs?.tell({ type: "down", text: JSON.stringify(frame) });
  }

  #onLeader(connected: boolean, ready?: string): void {
    clearTimeout(this.#leaderTimer);
    this.#leaderIsConnected = connected;
    if (this.#wanted) {
      this.#wanted = undefined;
      this.#feed({ type: "opened" });
      this.#hear({ type: "ready" });
    } else {
      this.#hear({ type: "pong" });
    }
    if (ready === this.#ready) return;
    this.#ready = ready;
    ready ? this.#shared.ready(ready) : this.#shared.lose();
  }

  #onPage(after: number, page: Page): void {
    if (this.#puller instanceof MailboxPuller) this.#puller.keep(after, page);
    this.#hear({ type: "poke", version: page.version });
  }

  /** Handle `frame` as if it had come through a socket. */
  #hear(frame: object): void {
    this.#feed({ type: "text", text: JSON.stringify(frame) });
  }
}

/** @throws TypeError an option is missing or invalid. The error names the option and what was expected. */
function checkOptions(options: Options): void {
  const { url, token, device, cursor, transport, onMessages, onPoke } = (options ?? {}) as Record<string, any>;
  checkUrl(url);
  if (typeof token !== "function" && !isToken(token)) {
    throw new TypeError("`token` must be a JWT, or a function that returns one");
  }
  if ((onMessages === undefined) === (onPoke === undefined)) {
    throw new TypeError("connect takes either onMessages or onPoke");
  }
  if (typeof (onMessages ?? onPoke) !== "function") {
    throw new TypeError(`\`${onPoke === undefined ? "onMessages" : "onPoke"}\` must be a function`);
  }
  if (device !== undefined && (typeof device !== "string" || !/^[!-~]{1,128}$/.test(device))) {
    throw new TypeError("`device` must be 1 to 128 visible ASCII characters");
  }
  if (transport !== undefined && !["auto", "websocket", "poll"].includes(transport)) {
    throw new TypeError(`\`transport\` must be "auto", "websocket" or "poll": ${transport}`);
  }
  if (cursor !== undefined && (!Number.isInteger(cursor) || cursor < 0)) {
    throw new TypeError(`\`cursor\` must be a version, an integer of 0 or more: ${cursor}`);
  }
}

/** The claims of a JWT that the client reads (RFC 7519, section 4.1): its recipient, and when it expires. */
function claims(token: string): { sub: string; exp: number } {
  const payload = token.split(".")[1] ?? "";
  return JSON.parse(atob(payload.replace(/-/g, "+").replace(/_/g, "/")));
}

function within<T>(timeoutMs: number, value: T | Promise<T>): Promise<T> {
  let timer: ReturnType<typeof setTimeout>;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`\`token\` has returned nothing for ${timeoutMs} ms`)), timeoutMs);
  });
  return Promise.race([value, late]).finally(() => clearTimeout(timer));
}
