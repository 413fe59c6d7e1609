// A session with pokebridge: one WebSocket that is kept alive, and calls over HTTP beside it.
//
// What it does and when is protocol.md section 3: reconnect with full jitter, and not at all where
// the close code says so. What is pulled, on `ready` and on `poke`, is a subclass's business.

const PROTOCOL = "pokebridge.v1";
const REQUEST_TIMEOUT_MS = 15_000;
const FIRST_DELAY_MS = 500;
const MAX_DELAY_MS = 30_000;
const OVERLOAD_DELAY_MS = 10_000;
const STABLE_MS = 60_000;
// A connection can die without a word, and a browser can't see the server's pings.
const PING_MS = 25_000;

const CLOSE = { overload: 1013, moved: 4307, badToken: 4401, notAllowed: 4403, replaced: 4409 };
const WHY_STOPPED = {
  [CLOSE.notAllowed]: "not allowed",
  [CLOSE.replaced]: "replaced by a newer session",
};

/** A random delay up to a limit that doubles with each attempt ("full jitter"). */
export function jitter(attempt, leastMs = 0) {
  return leastMs + Math.random() * Math.min(MAX_DELAY_MS, FIRST_DELAY_MS * 2 ** attempt);
}

export function sleep(delayMs) {
  return new Promise((resolve) => setTimeout(resolve, delayMs));
}

/** `fetch`, uncached, that gives up in time and says in plain words when there is no answer. */
export async function reach(path, options) {
  try {
    const signal = AbortSignal.timeout(REQUEST_TIMEOUT_MS);
    return await fetch(path, { ...options, cache: "no-store", signal });
  } catch {
    throw new Error("the server does not answer");
  }
}

/** An answer that is not a success, in the server's own words (RFC 9457). */
export class Refusal extends Error {
  static async of(response) {
    const problem = await response.json().catch(() => ({}));
    const refusal = new Refusal(problem.detail ?? `HTTP ${response.status}`);
    refusal.status = response.status;
    return refusal;
  }
}

/**
 * One session, and the calls of whoever has it.
 *
 * Events, with their particulars in `detail`:
 * - `state`: {state: "connecting" | "ready" | "waiting" | "off", why, delayMs, ready}
 * - `log`: {text}: what went over the wire
 */
export class Session extends EventTarget {
  #getToken;
  #token = null;
  #socket = null;
  #turn = 0;
  #timers = new Set();
  #attempt = 0;
  #closed = true;
  #awaitsPong = false;
  #follows;

  /**
   * `getToken` is asked for a token when there is none, or when the last one was refused;
   * `follows` moves to other instances, or is served at this page's origin alone.
   */
  constructor({ device, getToken, follows = true }) {
    super();
    this.device = device;
    this.#getToken = getToken;
    this.#follows = follows;
  }

  get isOpen() {
    return !this.#closed;
  }

  /** Connect, and stay connected until `close`. */
  open() {
    if (this.#closed) {
      this.#closed = false;
      this.#attempt = 0;
      this.#connect();
    }
  }

  close() {
    this.#stop("disconnected");
  }

  // --- the session ---------------------------------------------------------------------------

  async #connect(movedTo = null) {
    this.emit("state", { state: "connecting" });
    const turn = ++this.#turn;
    try {
      this.#token ??= await this.#getToken();
    } catch (error) {
      if (turn === this.#turn) this.#reconnect(error.message);
      return;
    }
    if (turn !== this.#turn) return;
    const url = new URL(movedTo ?? `${location.origin.replace(/^http/, "ws")}/v1/connect`);
    url.searchParams.set("device", this.device);
    if (movedTo || !this.#follows) url.searchParams.set("moved", "1");
    const socket = new WebSocket(url, [PROTOCOL, `bearer.${this.#token}`]);
    const session = { socket, readyAt: null, moveTo: null };
    this.#socket = socket;
    socket.onmessage = (event) => this.#onFrame(session, JSON.parse(event.data));
    socket.onclose = (event) => this.#onClose(session, event.code, event.reason);
  }

  #onFrame(session, frame) {
    if (session.socket !== this.#socket) return;
    const at = performance.now();
    this.#awaitsPong = false;
    if (frame.type !== "pong") this.log(`← ${JSON.stringify(frame)}`);
    switch (frame.type) {
      case "ready":
        session.readyAt = at;
        this.#keepAlive(session);
        this.#renewToken(session, frame.expires_in);
        this.emit("state", { state: "ready", ready: frame });
        this.onReady(at);
        break;
      case "poke":
        this.onPoke(frame, at);
        break;
      case "auth":
        this.#renewToken(session, frame.expires_in);
        break;
      case "move":
        session.moveTo = frame.url;
        break;
    }
  }

  #onClose(session, code, reason) {
    if (session.socket !== this.#socket) return;
    this.log(`closed ${code} ${reason}`);
    const stableMs = session.readyAt === null ? 0 : performance.now() - session.readyAt;
    if (stableMs > STABLE_MS) this.#attempt = 0;
    this.#dropSocket();
    if (code in WHY_STOPPED) {
      this.#stop(WHY_STOPPED[code]);
    } else if (code === CLOSE.moved && session.moveTo && this.#follows) {
      this.#connect(session.moveTo);
    } else {
      // A browser is not told why a handshake was refused: a stale token is one reason.
      if (code === CLOSE.badToken || session.readyAt === null) this.#token = null;
      this.#reconnect(reason || `closed ${code}`, code === CLOSE.overload ? OVERLOAD_DELAY_MS : 0);
    }
  }

  #reconnect(why, leastMs = 0) {
    const delayMs = jitter(this.#attempt++, leastMs);
    this.emit("state", { state: "waiting", why, delayMs });
    this.after(delayMs, () => this.#connect());
  }

  #stop(why) {
    this.#closed = true;
    this.#dropSocket();
    this.emit("state", { state: "off", why });
  }

  #dropSocket() {
    const socket = this.#socket;
    this.#socket = null;
    this.#turn++;
    this.#timers.forEach(clearTimeout);
    this.#timers.clear();
    socket?.close();
  }

  #keepAlive(session) {
    this.after(PING_MS, () => {
      if (this.#awaitsPong) {
        this.#onClose(session, 1006, "no answer");
        return;
      }
      this.#awaitsPong = true;
      session.socket.send(JSON.stringify({ type: "ping" }));
      this.#keepAlive(session);
    });
  }

  #renewToken(session, expiresInS) {
    if (expiresInS === undefined) return;
    // Timers hold 31 bits of milliseconds.
    const delayMs = Math.min(expiresInS * 800, 2 ** 31 - 1);
    this.after(delayMs, async () => {
      try {
        this.#token = await this.#getToken();
      } catch (error) {
        // The server will end the session with 4401, and then there is another try.
        this.log(`no new token: ${error.message}`);
        return;
      }
      if (session.socket === this.#socket) {
        session.socket.send(JSON.stringify({ type: "auth", token: this.#token }));
      }
    });
  }

  /** Call back after a delay, unless this session ends before. */
  after(delayMs, callback) {
    const timer = setTimeout(() => {
      this.#timers.delete(timer);
      callback();
    }, delayMs);
    this.#timers.add(timer);
  }

  // --- what a subclass makes of it -------------------------------------------------------------

  /** The session is live: pull. Times are performance.now(). */
  onReady(_at) {}

  /** A poke came. */
  onPoke(_frame, _at) {}

  // --- calls -------------------------------------------------------------------------------------

  /** Call the API; what is no success is a `Refusal`, but for 304. */
  async request(method, path, body, headers = {}, mayRenew = true) {
    this.#token ??= await this.#getToken();
    const token = this.#token;
    const response = await reach(path, {
      method,
      headers: {
        Authorization: `Bearer ${token}`,
        ...(body === undefined ? {} : { "Content-Type": "application/json" }),
        ...headers,
      },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
    this.log(`→ ${method} ${path.split("?")[0]} ${response.status}`);
    if (response.status === 401 && mayRenew) {
      if (this.#token === token) this.#token = null;
      return this.request(method, path, body, headers, false);
    }
    if (!response.ok && response.status !== 304) throw await Refusal.of(response);
    return response;
  }

  emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  log(text) {
    this.emit("log", { text });
  }
}
