// Two users of pokebridge side by side, and what happens between them.

import { Api, devToken, home, reach, whyStopped } from "../shared/api.js";
import { connect } from "../vendor/pokebridge-client/index.js";
import { pickDevice } from "./device.js";
import { Flow } from "./flow.js";
import { ROOM, Room } from "./room.js";
import { Trace, TraceList, formatMs } from "./trace.js";

const TOKEN_TTL_S = 3600;
const MESSAGE_TTL_S = 24 * 3600;
const MAX_MESSAGES = 200;
const MAX_LOG_LINES = 200;
const MAX_SUBJECT_LENGTH = 256;

const flow = new Flow(document.querySelector(".flow"));
const traceList = new TraceList(document.querySelector(".traces"));
// The messages that this page has sent, by id, until their recipient has shown them.
const underWay = new Map();

const clock = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });

/** A plain name stands for the URN of a user. A name with a colon is taken as it is. */
const subjectOf = (name) => (name.includes(":") ? name : `urn:user:${name}`);
const nameOf = (subject) => subject.replace(/^urn:user:/, "");

function randomId() {
  const bytes = crypto.getRandomValues(new Uint8Array(8));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** What is remembered for this tab, or a new value. */
function remembered(key, fresh) {
  const value = sessionStorage.getItem(key) ?? fresh();
  sessionStorage.setItem(key, value);
  return value;
}

const device = await pickDevice(randomId);

/** Whether the instance has a mailbox. One without carries pokes only, and the page offers nothing else. */
const hasMailbox = await reach("/openapi.json")
  .then((response) => response.json())
  .then(({ paths }) => "/v1/messages" in paths)
  .catch(() => true);

/** Resolves when all changes so far are on the screen, or at once in a hidden tab, which is not painted. */
function painted() {
  if (document.hidden) return Promise.resolve();
  return new Promise((resolve) => {
    requestAnimationFrame(() => setTimeout(resolve));
  });
}

/** Once for each message: the poke can overtake the answer that says "committed". */
function showCommit(trace) {
  if (trace.commitWasShown) return;
  trace.commitWasShown = true;
  flow.show("commit", trace, `The mailbox has committed it as version ${trace.version}.`);
}

const textOf = (body) => {
  if (typeof body === "string") return body;
  return typeof body?.text === "string" ? body.text : JSON.stringify(body);
};

const isPull = (url, { method }) => method === "GET" && new URL(url).pathname.endsWith("/v1/messages");

/**
 * One of the two users: a client of the bridge, and what is shown of it.
 *
 * - `#client`, `#api`: the connection, and calls beside it
 * - `#room`: the place in the room, which the same connection carries
 * - `#version`: up to which messages were pulled
 * - `#cause`: what the next pull answers: {kind: "ready" | "poke", at}, or null
 * - `#pull`: the latest pull: {cause, startedAt, status, hadMessages}
 * - `#pokes`: the pokes that named a version, until its messages are shown
 * - `#barePokes`: the traces of pokes without a message
 * - `#unsent`: what was written and not sent: {text, id, note}
 */
class User {
  #root;
  #key;
  #subject = "";
  #client = null;
  #api = null;
  #room;
  #version = 0;
  #cause = null;
  #pull = null;
  #pokes = [];
  #barePokes = [];
  #unsent = null;
  other = null;

  constructor(root, defaultName) {
    this.#root = root;
    this.#key = root.dataset.user;
    root.append(document.querySelector("#user-template").content.cloneNode(true));
    const nameInput = this.#find(".name");
    nameInput.value = remembered(`name.${this.#key}`, () => defaultName);
    nameInput.setAttribute("aria-label", `Name of the ${this.#key} user`);
    nameInput.addEventListener("change", () => this.#rename());
    nameInput.addEventListener("keydown", (event) => event.key === "Enter" && nameInput.blur());
    this.#find(".toggle").addEventListener("click", () => this.#toggle());
    this.#find(".composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    this.#find(".poke-only").addEventListener("click", () => this.#pokeOnly());
    this.#room = new Room(root, (message) => this.#showFromRoom(message));
    this.#find(".join").addEventListener("change", () => this.#enterRoom());
    this.#find(".to-room").addEventListener("click", () => this.#sendToRoom());
    if (!hasMailbox) this.#find(".poke-only").textContent = "Poke";
  }

  get name() {
    return nameOf(this.#subject || subjectOf(this.#find(".name").value));
  }

  get subject() {
    return subjectOf(this.name);
  }

  /** Become who the name says, and connect. */
  start() {
    this.#client?.close();
    const subject = subjectOf(this.#find(".name").value.trim());
    const claims = { sub: subject, scope: "send poke", ttl_s: TOKEN_TTL_S };
    this.#subject = subject;
    this.#api = new Api(() => devToken(claims));
    this.#api.onAnswer = (method, path, status) => this.#log(`→ ${method} ${path} ${status}`);
    this.#pokes = [];
    // What this device has shown once is not shown again after a reload.
    this.#version = Number(localStorage.getItem(this.#cursorKey));
    this.#find(".messages").replaceChildren();
    this.#find(".log-of-messages").setAttribute("aria-label", `Messages of ${this.name}`);
    this.#find(".log ol").setAttribute("aria-label", `Frames and requests of ${this.name}`);
    this.#find(".avatar").textContent = [...this.name][0]?.toUpperCase() ?? "?";
    this.#find(".empty").textContent = hasMailbox
      ? `No messages for ${this.name} yet.`
      : `When it is poked, ${this.name}'s client would pull from your own application here.`;
    this.#find(".empty").hidden = false;
    this.showOther();
    this.other?.showOther();
    this.#connect();
  }

  get #cursorKey() {
    return `cursor ${device} ${this.#subject}`;
  }

  #connect() {
    const api = this.#api;
    const client = connect({
      url: home,
      token: () => api.renew(),
      device,
      cursor: this.#version,
      share: false,
      fetch: (url, options) => this.#fetch(url, options),
      ...(hasMailbox
        ? { onMessages: (messages) => client === this.#client && this.#onPulled(messages) }
        : { onPoke: () => {} }), // an application would pull its own data here
    });
    const listen = (name, listener) =>
      client.on(name, (value) => client === this.#client && listener(value));
    this.#client = client;
    this.#cause = null;
    listen("step", (step) => this.#onStep(step));
    listen("error", (error) => this.#log(`failed: ${error.message}`));
    listen("state", () => this.#showState());
    this.#showState();
    this.#enterRoom();
  }

  #enterRoom() {
    this.#room.enter(this.#client, `${this.#cursorKey} ${ROOM}`);
  }

  /** The other user's name has changed. */
  showOther() {
    if (!this.other) return;
    const name = this.other.name;
    this.#find(".text").placeholder = `Message to ${name}`;
    this.#find(".text").setAttribute("aria-label", `${this.name}: message to ${name}`);
    this.#find(".poke-only").title = `Poke ${name} without a message: it pulls and finds nothing`;
  }

  #find(selector) {
    return this.#root.querySelector(selector);
  }

  #rename() {
    const input = this.#find(".name");
    const subject = subjectOf(input.value.trim());
    if (subject === this.subject) return;
    if (!/^[!-~]+$/.test(subject) || subject.length > MAX_SUBJECT_LENGTH) {
      this.#fail("A name is made of visible ASCII characters, without spaces.");
    } else if (subject === this.other.subject) {
      this.#fail("The other one is called that.");
    } else {
      this.#fail("");
      sessionStorage.setItem(`name.${this.#key}`, input.value.trim());
      this.start();
      return;
    }
    input.value = this.name;
  }

  #toggle() {
    if (this.#root.dataset.state === "off") this.#connect();
    else this.#client.close();
  }

  // --- sending -------------------------------------------------------------------------------

  async #send() {
    const input = this.#find(".text");
    const text = input.value;
    if (!text) return;
    // The same text once more after a failure is the same message: it can't arrive twice.
    const again = this.#unsent?.text === text ? this.#unsent : null;
    const id = again?.id ?? randomId();
    again?.note.parentElement.remove();
    input.value = "";
    const trace = this.#begin("message", text);
    underWay.set(id, trace);
    const note = this.#addMessage("own", text, "on its way");
    this.#unsent = { text, id, note };
    trace.onShown = () => {
      note.textContent = `version ${trace.version} · shown after ${formatMs(trace.totalMs)}`;
    };
    try {
      const message = { recipient: this.other.subject, body: { text }, id, ttl_s: MESSAGE_TTL_S };
      const receipt = await this.#api.call("POST", "/v1/messages", message);
      this.#unsent = null;
      this.#fail("");
      this.#committed(trace, receipt.version);
      if (trace.shownAt === null) note.textContent = `version ${receipt.version}`;
      else trace.onShown();
    } catch (error) {
      underWay.delete(id);
      note.textContent = "not sent";
      if (!input.value) input.value = text;
      this.#failed(trace, error);
    }
  }

  /** What is sent to the room comes back from it, to everybody who has joined. */
  async #sendToRoom() {
    const input = this.#find(".text");
    const text = input.value;
    if (!text) return;
    input.value = "";
    const steps = { from: this.name, to: "the room" };
    flow.show("send", steps, `${this.name} sends a message to the room.`);
    try {
      const message = { recipient: ROOM, body: { text }, id: randomId(), ttl_s: MESSAGE_TTL_S };
      const { version } = await this.#api.call("POST", "/v1/messages", message);
      flow.show("commit", steps, `The room's mailbox has committed it as version ${version}.`);
      this.#fail("");
    } catch (error) {
      if (!input.value) input.value = text;
      this.#fail(`Not sent: ${error.message}`);
    }
  }

  async #pokeOnly() {
    const trace = this.#begin("poke");
    this.other.#barePokes.push(trace);
    try {
      await this.#api.call("POST", "/v1/pokes", { recipient: this.other.subject });
      this.#fail("");
      this.#committed(trace, null);
    } catch (error) {
      this.other.#barePokes = this.other.#barePokes.filter((other) => other !== trace);
      this.#failed(trace, error);
    }
  }

  #begin(kind, text) {
    const sentAt = performance.now();
    const trace = new Trace({ kind, from: this.name, to: this.other.name, text, sentAt });
    traceList.show(trace);
    const what = kind === "poke" ? "asks for a poke" : "sends a message";
    flow.show("send", trace, `${trace.from} ${what}.`);
    return trace;
  }

  #committed(trace, version) {
    trace.committedAt = performance.now();
    trace.version = version;
    traceList.show(trace);
    if (trace.kind === "message") showCommit(trace);
  }

  #failed(trace, error) {
    trace.failure = "failed";
    traceList.show(trace);
    this.#fail(`Not sent: ${error.message}`);
  }

  // --- receiving -----------------------------------------------------------------------------

  /** The client's `fetch`: the same, and it notes what is shown of a request. */
  async #fetch(url, options) {
    const pull = isPull(url, options) && !this.#room.asked(options) ? this.#pull : null;
    if (pull) pull.startedAt = performance.now();
    const response = await fetch(url, options);
    if (pull) pull.status = response.status;
    this.#log(`→ ${options.method} ${new URL(url).pathname} ${response.status}`);
    return response;
  }

  #onStep(step) {
    switch (step.type) {
      case "text":
        this.#onFrame(step.text, performance.now());
        break;
      case "closed":
        this.#cause = null;
        this.#log(`closed ${step.code} ${step.reason ?? ""}`);
        this.#showState(step.reason || `closed ${step.code}`);
        break;
      case "disconnect":
        this.#cause = null;
        this.#showState("no answer");
        break;
      case "pull": {
        const at = performance.now();
        this.#pull = { cause: this.#cause ?? { kind: "poll", at }, startedAt: at, hadMessages: false };
        break;
      }
      case "pulled":
        this.#version = step.cursor;
        if (hasMailbox) localStorage.setItem(this.#cursorKey, step.cursor);
        if (!this.#pull.hadMessages) this.#onPulled([]);
        this.#showFacts();
        break;
      case "ack":
        this.#log(`→ ${JSON.stringify(step)}`);
    }
  }

  #onFrame(text, at) {
    const frame = JSON.parse(text);
    if (frame.type !== "pong") this.#log(`← ${text}`);
    if (frame.type === "ready") {
      this.#cause = { kind: "ready", at };
      this.#showPlace(frame);
    }
    if (frame.type === "poke" && frame.recipient === undefined) {
      const news = frame.version === undefined || frame.version > this.#version;
      if (news) this.#cause = { kind: "poke", at };
      this.#onPoke({ version: frame.version, at, news });
    }
  }

  #onPoke({ version, at, news }) {
    if (version !== undefined) this.#pokes.push({ version, at });
    const trace = news && version === undefined ? this.#barePokes.find((t) => !t.wokenAt) : null;
    if (trace) {
      Object.assign(trace, { wokenAt: at, wokenBy: "poke" });
      traceList.show(trace);
      flow.show("poke", trace, `${trace.to} is poked.`);
    }
  }

  /** A page of messages has come; an empty one, when there is nothing new. */
  #onPulled(messages) {
    const { cause, startedAt, status } = this.#pull;
    this.#pull.hadMessages = messages.length > 0;
    const endedAt = performance.now();
    // A poke to somebody who was away is not kept: the pull on `ready` makes up for it.
    for (const trace of this.#barePokes.filter((t) => !t.wokenAt && cause.kind === "ready")) {
      Object.assign(trace, { wokenAt: cause.at, wokenBy: "ready" });
    }
    const pulled = { pullStatus: status, pullStartedAt: startedAt, pullEndedAt: endedAt };
    for (const trace of this.#barePokes.filter((t) => t.wokenAt && t.wokenAt <= startedAt)) {
      Object.assign(trace, pulled);
      traceList.show(trace);
      flow.show("pull", trace, `${trace.to} pulls: ${messages.length || "nothing"} new.`);
    }
    this.#barePokes = this.#barePokes.filter((trace) => trace.pullEndedAt === null);
    const arrived = messages.map((message) => [message, this.#receive(message, cause, pulled)]);
    if (arrived.length > 0) this.#onArrived(arrived);
  }

  async #onArrived(arrived) {
    await painted();
    const shownAt = performance.now();
    for (const [message, { trace, note }] of arrived) {
      if (!trace) continue;
      trace.shownAt = shownAt;
      traceList.show(trace);
      trace.onShown?.();
      note.textContent += ` · ${formatMs(trace.totalMs)}`;
      flow.show("shown", trace, `Shown after ${formatMs(trace.totalMs)}; here in slow motion.`);
      underWay.delete(message.id);
    }
    this.#pokes = this.#pokes.filter((poke) => poke.version > this.#version);
  }

  /** Put a message that was pulled on the page, and its steps so far into its trace. */
  #receive(message, cause, pulled) {
    const { id, version, sender, body, sent_at: sentAt } = message;
    const text = textOf(body);
    const from = nameOf(sender);
    const at = clock.format(new Date(sentAt));
    const note = this.#addMessage("theirs", text, `${from} · ${at} · version ${version}`);
    const poke = this.#pokes.find((candidate) => candidate.version >= version);
    const known = underWay.get(id);
    // What was in the mailbox before this page was opened has no steps to show.
    if (!known && !poke && cause.kind === "ready") return { note };
    const trace = known ?? new Trace({ kind: "message", from, to: this.name, text });
    const woken = poke ?? cause;
    const asleep = trace.sentAt === null || woken.at >= trace.sentAt;
    Object.assign(trace, pulled, {
      version,
      wokenAt: asleep ? woken.at : null,
      wokenBy: poke ? "poke" : cause.kind,
    });
    traceList.show(trace);
    if (known) showCommit(trace);
    if (asleep) {
      const how = trace.wokenBy === "poke" ? "is poked" : "is back";
      flow.show("poke", trace, `${this.name} ${how}: there is something new.`);
    }
    flow.show("pull", trace, `${this.name} pulls what is new.`);
    return { trace, note };
  }

  #showFromRoom({ version, sender, body, sent_at: sentAt }) {
    const from = nameOf(sender);
    const note = `${from} · ${clock.format(new Date(sentAt))} · room, version ${version}`;
    const isOwn = sender === this.#subject;
    this.#addMessage(isOwn ? "own" : "theirs", textOf(body), note);
    if (isOwn) return;
    flow.show("pull", { from, to: this.name }, `${this.name} pulls what is new in the room.`);
  }

  // --- what is shown -------------------------------------------------------------------------

  #addMessage(kind, text, note) {
    const list = this.#find(".messages");
    const item = document.querySelector("#message-template").content.firstElementChild;
    const message = item.cloneNode(true);
    message.classList.add(kind);
    message.querySelector(".body").textContent = text;
    const noteElement = message.querySelector(".note");
    noteElement.textContent = note;
    list.append(message);
    if (list.childElementCount > MAX_MESSAGES) list.firstElementChild.remove();
    const well = this.#find(".log-of-messages");
    well.scrollTop = well.scrollHeight;
    this.#find(".empty").hidden = true;
    return noteElement;
  }

  /** The client's state; `why` it is not connected. */
  #showState(why = "") {
    const { state, stopCode } = this.#client;
    const [shown, words] = {
      connecting: why ? ["waiting", `reconnecting: ${why}`] : ["connecting", "connecting"],
      connected: ["ready", "connected"],
      stopped: ["off", whyStopped(stopCode)],
      closed: ["off", "disconnected"],
    }[state];
    this.#root.dataset.state = shown;
    this.#find(".state").textContent = words;
    this.#find(".state").title = words;
    this.#find(".toggle").textContent = shown === "off" ? "Connect" : "Disconnect";
  }

  async #showPlace({ instance }) {
    this.#root.dataset.instance = instance;
    const info = await this.#api.call("GET", "/v1/connect-info").catch(() => null);
    if (info) this.#root.dataset.shard = info.shard;
    this.#showFacts();
  }

  #showFacts() {
    const { instance, shard } = this.#root.dataset;
    const facts = [this.subject, `shard ${shard ?? "?"}`, `v${this.#version}`, instance];
    this.#find(".facts").textContent = facts.join(" · ");
    this.#find(".facts").title = "recipient · shard · version pulled · instance";
  }

  #fail(text) {
    this.#find(".error").textContent = text;
  }

  #log(text) {
    const list = this.#find(".log ol");
    const line = document.createElement("li");
    line.textContent = `${new Date().toISOString().slice(11, 23)} ${text}`;
    list.prepend(line);
    if (list.childElementCount > MAX_LOG_LINES) list.lastElementChild.remove();
  }
}

document.body.classList.toggle("pokes-only", !hasMailbox);
const left = new User(document.querySelector('[data-user="left"]'), "alice");
const right = new User(document.querySelector('[data-user="right"]'), "bob");
left.other = right;
right.other = left;
flow.name(left.name, right.name);
left.start();
right.start();
