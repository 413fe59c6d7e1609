// A client of pokebridge: it sleeps on a WebSocket, and pulls over HTTP when it is poked.
//
// What it does and when is protocol.md section 3: pull on `ready` and on `poke`, one pull at a
// time, reconnect with full jitter, and not at all where the close code says so.

const PROTOCOL = "pokebridge.v1";
const PAGE_SIZE = 50;
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
function jitter(attempt, leastMs = 0) {
  return leastMs + Math.random() * Math.min(MAX_DELAY_MS, FIRST_DELAY_MS * 2 ** attempt);
}

function sleep(delayMs) {
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
 * One device of one user.
 *
 * Events, with their particulars in `detail`:
 * - `state`: {state: "connecting" | "ready" | "waiting" | "off", why, delayMs, ready}
 * - `poke`: {version, at, news}: a poke came; `news` when it is followed by a pull
 * - `pull`: {status, messages, cause: {kind: "ready" | "poke", at}, startedAt, endedAt}
 * - `log`: {text}: what went over the wire
 */
export class Client extends EventTarget {
  #getToken;
  #token = null;
  #socket = null;
  #turn = 0;
  #timers = new Set();
  #attempt = 0;
  #closed = true;
  #awaitsPong = false;
  #cursor = 0;
  #etag = null;
  #pulling = false;
  #cause = null;

  constructor({ subject, device, getToken }) {
    super();
    this.subject = subject;
    this.device = device;
    this.#getToken = getToken;
  }

  /** The version of the last message pulled. */
  get version() {
    return this.#cursor;
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

  /** Send `body` to `recipient`; the same `id` again sends nothing twice. → {id, version} */
  async send(recipient, body, { id, ttl_s }) {
    const response = await this.#request("POST", "/v1/messages", { recipient, body, id, ttl_s });
    return response.json();
  }

  async poke(recipient) {
    await this.#request("POST", "/v1/pokes", { recipient });
  }

  /** This device has all up to the present version. */
  async ack() {
    const path = `/v1/messages/ack?device=${encodeURIComponent(this.device)}`;
    await this.#request("POST", path, { version: this.#cursor });
  }

  async connectInfo() {
    return (await this.#request("GET", "/v1/connect-info")).json();
  }

  // --- the session ---------------------------------------------------------------------------

  async #connect(movedTo = null) {
    this.#emit("state", { state: "connecting" });
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
    if (movedTo) url.searchParams.set("moved", "1");
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
    if (frame.type !== "pong") this.#log(`← ${JSON.stringify(frame)}`);
    switch (frame.type) {
      case "ready":
        session.readyAt = at;
        this.#keepAlive(session);
        this.#renewToken(session, frame.expires_in);
        this.#emit("state", { state: "ready", ready: frame });
        this.#pull({ kind: "ready", at });
        break;
      case "poke":
        this.#onPoke(frame, at);
        break;
      case "auth":
        this.#renewToken(session, frame.expires_in);
        break;
      case "move":
        session.moveTo = frame.url;
        break;
    }
  }

  #onPoke({ version, within_ms: withinMs = 0 }, at) {
    const news = version === undefined || version > this.#cursor;
    this.#emit("poke", { version, at, news });
    if (!news) return;
    const pull = () => this.#pull({ kind: "poke", at });
    if (withinMs > 0) this.#after(Math.random() * withinMs, pull);
    else pull();
  }

  #onClose(session, code, reason) {
    if (session.socket !== this.#socket) return;
    this.#log(`closed ${code} ${reason}`);
    const stableMs = session.readyAt === null ? 0 : performance.now() - session.readyAt;
    if (stableMs > STABLE_MS) this.#attempt = 0;
    this.#dropSocket();
    if (code in WHY_STOPPED) {
      this.#stop(WHY_STOPPED[code]);
    } else if (code === CLOSE.moved && session.moveTo) {
      this.#connect(session.moveTo);
    } else {
      // A browser is not told why a handshake was refused: a stale token is one reason.
      if (code === CLOSE.badToken || session.readyAt === null) this.#token = null;
      this.#reconnect(reason || `closed ${code}`, code === CLOSE.overload ? OVERLOAD_DELAY_MS : 0);
    }
  }

  #reconnect(why, leastMs = 0) {
    const delayMs = jitter(this.#attempt++, leastMs);
    this.#emit("state", { state: "waiting", why, delayMs });
    this.#after(delayMs, () => this.#connect());
  }

  #stop(why) {
    this.#closed = true;
    this.#dropSocket();
    this.#emit("state", { state: "off", why });
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
    this.#after(PING_MS, () => {
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
    this.#after(delayMs, async () => {
      try {
        this.#token = await this.#getToken();
      } catch (error) {
        // The server will end the session with 4401, and then there is another try.
        this.#log(`no new token: ${error.message}`);
        return;
      }
      if (session.socket === this.#socket) {
        session.socket.send(JSON.stringify({ type: "auth", token: this.#token }));
      }
    });
  }

  /** Call back after a delay, unless this session ends before. */
  #after(delayMs, callback) {
    const timer = setTimeout(() => {
      this.#timers.delete(timer);
      callback();
    }, delayMs);
    this.#timers.add(timer);
  }

  // --- pulls ---------------------------------------------------------------------------------

  /** Pull until nothing is left. Whatever asks meanwhile is served by one more pull. */
  async #pull(cause) {
    this.#cause = cause;
    if (this.#pulling) return;
    this.#pulling = true;
    for (let attempt = 0; this.#cause && !this.#closed; ) {
      const served = this.#cause;
      try {
        while (await this.#pullPage(served));
        attempt = 0;
        if (this.#cause === served) this.#cause = null;
      } catch (error) {
        this.#log(`pull failed: ${error.message}`);
        await sleep(jitter(attempt++));
      }
    }
    this.#pulling = false;
  }

  /** Pull one page; whether there is more. */
  async #pullPage(cause) {
    const startedAt = performance.now();
    const device = encodeURIComponent(this.device);
    const path = `/v1/messages?after=${this.#cursor}&limit=${PAGE_SIZE}&device=${device}`;
    const headers = this.#etag === null ? {} : { "If-None-Match": this.#etag };
    const response = await this.#request("GET", path, undefined, headers);
    const page = response.status === 304 ? { messages: [] } : await response.json();
    const endedAt = performance.now();
    if (response.status === 200) {
      this.#cursor = page.version;
      // The tag stands for the head: it may be shown once the last page is in.
      this.#etag = page.more ? null : response.headers.get("ETag");
    }
    const { messages } = page;
    this.#emit("pull", { status: response.status, messages, cause, startedAt, endedAt });
    return page.more === true;
  }

  async #request(method, path, body, headers = {}, mayRenew = true) {
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
    this.#log(`→ ${method} ${path.split("?")[0]} ${response.status}`);
    if (response.status === 401 && mayRenew) {
      if (this.#token === token) this.#token = null;
      return this.#request(method, path, body, headers, false);
    }
    if (!response.ok && response.status !== 304) throw await Refusal.of(response);
    return response;
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  #log(text) {
    this.#emit("log", { text });
  }
}
