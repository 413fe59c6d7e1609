// The console: sign in, then watch the cluster, migrate it, drain its instances.

import { devToken, reach } from "../shared/api.js";
import { confirm, withdraw } from "./confirm.js";
import { EventLog } from "./events.js";
import { Figures, loadOf } from "./figures.js";
import { formatCount, formatDuration, formatRate } from "./format.js";
import { Instances } from "./instances.js";
import { Live } from "./live.js";
import { LookUp } from "./lookup.js";
import { ShardGrid } from "./shards.js";

const TOKEN_KEY = "pokebridge.admin-token";
const CONSOLE = { sub: "urn:pokebridge:console", scope: "admin poke" };
const STALE_MS = 30_000;
const MODES = { fanout: "fan-out", partitioned: "partitioned" };

const find = (selector) => document.querySelector(selector);

let live = null;
let view = null;
let seenAt = 0;
let connection = { state: "off" };

const figures = new Figures(find(".figures"));
let charts = null;
const instances = new Instances(find("table"), askToDrain);
const shards = new ShardGrid(find("section:has(.shards)"));
const events = new EventLog(find(".events"));
const lookUp = new LookUp(find(".look-up"), () => live);

// The charts come from a library that some browsers can't run. The rest of the page works without
// them, and does not wait for them.
import("./charts.js")
  .then(({ Charts }) => {
    charts = new Charts(find(".charts"));
    if (view !== null) charts.add(loadOf(view));
  })
  .catch(giveUpCharts);

function draw(what) {
  try {
    if (charts !== null) what(charts);
  } catch (error) {
    giveUpCharts(error);
  }
}

function giveUpCharts(error) {
  charts = null;
  find(".charts").textContent = `This browser can't draw the charts: ${error.message}`;
}

// --- signing in ----------------------------------------------------------------------------------

async function signIn(token) {
  const candidate = new Live(token);
  candidate.addEventListener("view", ({ detail }) => show(detail));
  candidate.addEventListener("mailbox", ({ detail }) => figures.showMailbox(detail));
  candidate.addEventListener("events", ({ detail }) => events.add(detail.events));
  candidate.addEventListener("trouble", ({ detail }) => showConnection(detail));
  candidate.addEventListener("refused", ({ detail }) => signOut(detail.message));
  candidate.addEventListener("state", ({ detail }) => showConnection(detail));
  await candidate.look();
  live = candidate;
  sessionStorage.setItem(TOKEN_KEY, token);
  find(".sign-in").hidden = true;
  find(".cluster").hidden = find(".sign-out").hidden = false;
  live.open();
}

function signOut(why = "") {
  sessionStorage.removeItem(TOKEN_KEY);
  live?.close();
  live = null;
  withdraw();
  lookUp.clear();
  find(".cluster").hidden = find(".sign-out").hidden = true;
  showSignIn(why);
}

function showSignIn(why) {
  find(".sign-in").hidden = false;
  find(".sign-in .error").textContent = why;
  find("#token").value = "";
  find("#token").focus();
  offerDevToken();
}

/** Show the button if the API has the call, which only an instance with --dev has. */
async function offerDevToken() {
  const response = await reach("/openapi.json").catch(() => null);
  const description = response?.ok ? await response.json() : { paths: {} };
  find(".dev-token").hidden = !("/v1/dev/token" in description.paths);
}

async function attemptSignIn(getToken) {
  find(".sign-in .error").textContent = "";
  try {
    await signIn(await getToken());
  } catch (error) {
    showSignIn(error.message);
  }
}

find(".sign-in form").addEventListener("submit", (event) => {
  event.preventDefault();
  const token = find("#token").value.trim();
  attemptSignIn(async () => token);
});
find(".dev-token").addEventListener("click", () => attemptSignIn(() => devToken(CONSOLE)));
find(".sign-out").addEventListener("click", () => signOut());

// --- what there is to see ------------------------------------------------------------------------

function show(seen) {
  view = seen;
  seenAt = Date.now();
  const load = loadOf(view);
  figures.show(load);
  draw((charts) => charts.add(load));
  instances.show(view);
  shards.show(view);
  showMode();
  showBanner(".trouble", view.trouble && `${view.seen_by}: ${view.trouble}`);
  showBanner(".over", load.isOver && adviceOn(load));
  find(".seen-by").textContent =
    `As ${view.seen_by} sees it; the figures of the others are as of their last report.`;
  if (connection.state !== "waiting") showConnection(connection);
}

function showMode() {
  find(".cluster-name").textContent = view.name ?? "";
  find(".mode-name").textContent = MODES[view.mode];
  const arrived = view.instances.filter((each) => each.settled && each.epoch >= view.epoch).length;
  const everyone = view.instances.length;
  find(".progress").textContent =
    arrived === everyone || view.trouble
      ? `epoch ${view.epoch}`
      : `epoch ${view.epoch}: ${arrived} of ${everyone} instances have settled`;
  find(".migrate").textContent = `Migrate to ${MODES[otherMode()]}…`;
}

const otherMode = () => (view.mode === "fanout" ? "partitioned" : "fanout");

function showBanner(kind, text) {
  const banner = find(`.banner${kind}`);
  banner.hidden = !text;
  // A screen reader announces each change, so the same text is not set again.
  if (text && banner.textContent !== text) banner.textContent = text;
}

function adviceOn({ opsPerS, redLine, instances: count }) {
  const load = `${formatRate(opsPerS)} deliveries/s of ${formatCount(redLine)}`;
  // The API reports the red line as crossed until the rate has been below it for a while.
  if (opsPerS <= redLine) return `The red line was crossed a moment ago. Now: ${load}.`;
  const advice =
    view.mode === "fanout"
      ? `${count} instances each hear everything; partitioned mode would spare most of it.`
      : "That is what there is to deliver: more instances share it, and batching lessens it.";
  return `Over the red line: ${load}. ${advice}`;
}

function showConnection(detail) {
  if (detail.state) connection = detail;
  const status = find(".live");
  const [state, text] = connectionNow(detail);
  status.dataset.state = state;
  if (status.textContent !== text) status.textContent = text;
}

function connectionNow({ message, why }) {
  if (live === null && connection.state === "off") return ["off", ""];
  if (message) return ["trouble", `no answer: ${message}`];
  if (Date.now() - seenAt > STALE_MS) {
    return ["trouble", `last seen ${formatDuration((Date.now() - seenAt) / 1000)} ago`];
  }
  switch (connection.state) {
    case "ready":
      return view?.trouble ? ["trouble", `live; ${view.seen_by} is in trouble`] : ["ready", "live"];
    case "waiting":
      return ["trouble", `reconnecting: ${connection.why ?? why}`];
    case "off":
      return ["off", connection.why ?? ""];
  }
  return ["connecting", "connecting"];
}

// Ages, marks and the charts' right edge depend on the time alone: no request is made for them.
setInterval(() => {
  if (live === null || document.hidden) return;
  instances.refresh();
  shards.refresh();
  draw((charts) => charts.extend());
  if (Date.now() - seenAt > STALE_MS) showConnection({});
}, 1000);

// --- what an operator does ------------------------------------------------------------------------

function askToMigrate() {
  const mode = otherMode();
  confirm({
    title: `Migrate to ${MODES[mode]}?`,
    what:
      mode === "partitioned"
        ? "Every instance subscribes to its own shards, proves that they arrive, then lets the" +
          " rest go. Sessions follow their shard. No poke is missed, and the way back is the same."
        : "Every instance subscribes to everything again, then lets its single shards go. No poke" +
          " is missed. Each signal is delivered once an instance from then on.",
    yes: "Migrate",
    force: "Migrate all the same: those signals go on to every instance.",
    act: (force) => live.migrate(mode, force),
  });
}

function askToDrain(instance) {
  confirm({
    title: `Drain ${instance}?`,
    what:
      "It takes no new sessions, gives its shards up, and sends its sessions to other instances." +
      " It stays that way until it is restarted.",
    yes: "Drain",
    act: () => live.drain(instance),
  });
}

find(".migrate").addEventListener("click", askToMigrate);

const remembered = sessionStorage.getItem(TOKEN_KEY);
if (remembered) attemptSignIn(async () => remembered);
else showSignIn("");
