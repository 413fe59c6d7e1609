"""The shell's part of the rules, in Node, against a bridge that misbehaves."""

import json
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest
import pytest_asyncio

from tests.client.between import STRANGERS, Between, FirstProtocolOnly
from tests.client.between import problem as refused
from tests.client.faulty_bridge import Bad, FaultyBridge, problem
from tests.js.driving import QUICK, Client, NodeRuntime, run_node
from tests.support import Instance, free_port, wait_until
from tests.support.silence import Silence

pytestmark = pytest.mark.asyncio(loop_scope="session")

TOKEN = "header.payload.signature"


@pytest_asyncio.fixture(loop_scope="session")
async def bridge() -> AsyncIterator[FaultyBridge]:
    """A bridge that does as it should, for now."""
    async with FaultyBridge().run() as bridge:
        yield bridge


async def start(node: NodeRuntime, bridge: FaultyBridge, **settings: object) -> Client:
    """A client with a token that lasts."""
    client = Client(node)
    await client.start(bridge.url, "", token=TOKEN, **settings)
    return client


async def test_what_is_sent(node: NodeRuntime, bridge: FaultyBridge) -> None:
    """The device goes everywhere, the cursor and the ETag with pulls, an ack after each page."""
    bridge.page_size = 2
    bridge.commit(*"abcde")
    client = await start(node, bridge, device="my+phone&tablet")
    await client.wait_shown(*"abcde")
    await client.idle()
    await bridge.say(type="poke")
    await wait_until(lambda: len(bridge.pulls) == 4)
    assert bridge.connects[0]["device"] == "my+phone&tablet"
    common = {"token": TOKEN, "device": "my+phone&tablet", "limit": "50"}
    assert bridge.pulls == [
        {**common, "after": after, "etag": etag}
        for after, etag in (("0", ""), ("2", ""), ("4", ""), ("5", '"5"'))
    ]
    assert bridge.acks == [2, 4, 5]


async def test_moved(node: NodeRuntime, bridge: FaultyBridge) -> None:
    """``move`` and 4307 lead to another address with ``moved=1``, and the next time home again."""
    async with FaultyBridge().run() as other:
        client = await start(node, bridge)
        await bridge.say(type="move", url=f"{other.url.replace('http', 'ws')}/v1/connect?room=1")
        await bridge.close(4307)
        await wait_until(lambda: other.connects)
        assert {"device": "default", "moved": "1", "room": "1"}.items() <= other.connects[0].items()
        await client.wait_state("connected")
        other.cut()
        await wait_until(lambda: len(bridge.connects) == 2)
        assert "moved" not in bridge.connects[1]


async def test_an_address_that_is_none(node: NodeRuntime, bridge: FaultyBridge) -> None:
    """After a move to an unreachable address the client returns."""
    client = await start(node, bridge)
    await bridge.say(type="move", url="nonsense")
    await bridge.close(4307)
    await wait_until(lambda: len(bridge.connects) == 2)
    await client.wait_state("connected")


async def test_what_the_handler_throws_at_comes_again(
    node: NodeRuntime, bridge: FaultyBridge
) -> None:
    """A page is acked when it was handled, and not before; the error is told as it was thrown."""
    bridge.commit("rejected once")
    await node.evaluate(
        """void (globalThis.harness.start = ((start) => (settings) => {
          let rejections = 1;
          start({ ...settings, onMessages: async (messages) => {
            if (rejections-- > 0) throw new Error("not now");
            harness.shown.push(...messages.map(({ body }) => body));
          } });
        })(harness.start))"""
    )
    client = await start(node, bridge)
    await client.wait_shown("rejected once")
    await wait_until(lambda: bridge.acks == [1])
    assert await client.errors() == ["Error: not now"]


@pytest.mark.parametrize(
    "bad",
    [
        Bad(500),
        Bad(200, body=b"<html>"),
        Bad(200, body=b"{}"),
        Bad(200, body=b"null"),
        Bad(503, {"Retry-After": "0"}),
    ],
)
async def test_a_pull_that_fails_is_repeated(
    node: NodeRuntime, bridge: FaultyBridge, bad: Bad
) -> None:
    """Whatever comes instead of a page."""
    bridge.commit("in the end")
    bridge.bad_pulls = [bad]
    client = await start(node, bridge)
    await client.wait_shown("in the end")
    assert len(bridge.pulls) == 2


async def test_retry_after(node: NodeRuntime, bridge: FaultyBridge) -> None:
    """A server that asks for time gets it."""
    bridge.bad_pulls = [Bad(503, {"Retry-After": "250"})]
    client = await start(node, bridge)
    await client.wait_count("pull_failed", 1)
    failed = next(step for step in await client.steps() if step["type"] == "pull_failed")
    assert failed["retry_after_s"] == 250


async def test_an_ack_that_fails_is_repeated_alone(node: NodeRuntime, bridge: FaultyBridge) -> None:
    """The message does not come twice, its ack does."""
    bridge.commit("once")
    bridge.bad_acks = [Bad(500)]
    client = await start(node, bridge)
    await wait_until(lambda: bridge.acks == [1])
    await client.wait_shown("once")


async def test_a_mailbox_begun_anew(node: NodeRuntime, bridge: FaultyBridge) -> None:
    """A mailbox that is behind the cursor is read from its beginning."""
    bridge.commit("new")
    client = await start(node, bridge, cursor=40)
    await client.wait_shown("new")
    assert await node.evaluate("harness.client.cursor") == 1


async def test_slow_polling(node: NodeRuntime, bridge: FaultyBridge) -> None:
    """Without a socket the client pulls by itself, so the messages still arrive."""
    bridge.refusals = [Bad(503)] * 1000
    client = Client(node)
    policy = {**QUICK, "poll_after_s": 0.1, "poll_every_s": 0.2}
    await client.begin(bridge.url, "", token=TOKEN, policy=policy)
    bridge.commit("first")
    await client.wait_shown("first")
    bridge.commit("second")
    await client.wait_shown("first", "second")
    assert await node.evaluate("harness.client.state") == "connecting"


async def test_nothing_after_close(node: NodeRuntime, bridge: FaultyBridge) -> None:
    """A closed client has no socket, shows nothing, and stays closed."""
    client = await start(node, bridge)
    await client.close()
    await wait_until(lambda: bridge.closes)
    steps = len(await client.steps())
    await node.evaluate("harness.client.wake()")
    assert len(await client.steps()) == steps
    assert await node.evaluate("harness.states") == ["connected", "closed"]


async def test_a_token_that_cannot_be_had(node: NodeRuntime, bridge: FaultyBridge) -> None:
    """Without a token nothing is sent; it is asked for again, and the failure is told."""
    client = Client(node)
    policy = json.dumps(QUICK)
    await node.evaluate(
        f"""void (() => {{
          const tokens = ["two words", undefined, {json.dumps(TOKEN)}];
          const token = async () => tokens.shift() ?? Promise.reject(new Error("down"));
          harness.start({{ url: {json.dumps(bridge.url)}, token, policy: {policy} }});
        }})()"""
    )
    await client.wait_state("connected")
    assert await client.count("token_failed") == 2
    assert len(await client.errors()) == 2
    assert len(bridge.connects) == 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"url": None}, "http://"),
        ({"url": "bridge.example"}, "http://"),
        ({"url": "https://"}, "http://"),
        ({"url": "https://bridge.example/?cluster=1"}, "without user, ? and #"),
        ({"url": "https://shop:secret@bridge.example"}, "without user, ? and #"),
        ({"token": None}, "`token` must be a JWT"),
        ({"token": 5}, "`token` must be a JWT"),
        ({"token": "two words"}, "`token` must be a JWT"),
        ({"onMessages": None}, "either onMessages or onPoke"),
        ({"onMessages": "show"}, "`onMessages` must be a function"),
        ({"onMessages": None, "onPoke": 7}, "`onPoke` must be a function"),
        ({"device": ""}, "`device` must be"),
        ({"device": "my phone"}, "visible ASCII"),
        ({"device": "x" * 129}, "1 to 128"),
        ({"cursor": "7"}, "`cursor` must be a version"),
        ({"WebSocket": None}, "pass that of the ws package"),
    ],
)
async def test_wrong_options(node: NodeRuntime, options: dict[str, object], complaint: str) -> None:
    """An option that is missing or invalid throws at once, and the error names it."""
    options = {"url": "https://bridge.example", "token": "t"} | options
    written = json.dumps(options).replace("null", "undefined")
    said = await node.evaluate(
        f"""(() => {{
          const WebSocket = class {{}};
          try {{ connect({{ WebSocket, onMessages() {{}}, ...{written} }}); }}
          catch (error) {{ return String(error); }}
        }})()"""
    )
    assert said.startswith("TypeError")
    assert complaint in said
    assert "secret" not in said


async def test_a_padded_token_goes_into_the_query(node: NodeRuntime, bridge: FaultyBridge) -> None:
    """No sub-protocol may have a = in it."""
    client = Client(node)
    await client.start(bridge.url, "", token=f"{TOKEN}=")
    await client.wait_state("connected")
    assert bridge.connects[0]["access_token"] == f"{TOKEN}="


async def test_empty_answers_that_come_at_once_make_no_storm(node: NodeRuntime) -> None:
    """Something answers polls without waiting: the next call comes after a pause."""
    calls = await node.evaluate(
        """new Promise((done) => {
          let calls = 0;
          const fetch = async (url) => {
            calls += url.includes("/v1/pokes");
            await new Promise((next) => setTimeout(next, 1));
            return new Response(JSON.stringify({ session: "s", frames: [] }));
          };
          const WebSocket = class {};
          const options = { url: "https://x.invalid", token: "a.b.c", onPoke() {} };
          const client = connect({ ...options, fetch, WebSocket, transport: "poll" });
          setTimeout(() => { client.close(); done(calls); }, 300);
        })"""
    )
    assert calls == 1


async def test_no_step_shows_the_token(node: NodeRuntime) -> None:
    """Not even when a browser's error does."""
    steps = await node.evaluate(
        """new Promise((done) => {
          const steps = [];
          const WebSocket = class {
            constructor(url, protocols) { throw new Error(`refused: ${url} ${protocols}`); }
          };
          const options = { url: "https://bridge.invalid", onMessages() {}, WebSocket };
          for (const token of ["se.cr.et", "se.cr.et="]) {
            const client = connect({ ...options, token, transport: "websocket" });
            client.on("error", () => {});
            client.on("step", (step) => {
              steps.push(step);
              if (step.type !== "closed") return;
              client.close();
              if (token.endsWith("=")) done(steps);
            });
          }
        })"""
    )
    assert "se.cr.et" not in json.dumps(steps)
    reasons = [step["reason"] for step in steps if step["type"] == "closed"]
    assert all(reason.startswith("Error: refused: wss://bridge.invalid/") for reason in reasons)


async def test_a_dead_port_is_told_at_once(client: Client) -> None:
    """The first handshake that fails tells the URL and the reason, long before the first poll."""
    url = f"http://127.0.0.1:{free_port()}"
    await client.begin(url, "", token=TOKEN)
    await client.wait_errors(1)
    errors = await client.errors()
    assert errors[0].startswith(f"Error: {url}/v1/connect-info can't be reached: ")
    assert "TypeError" not in errors[0]
    assert await client.connects_before_error() == 1
    await client.close()


async def test_a_refused_token_is_told_at_once(client: Client, instance: Instance) -> None:
    """The first handshake that a token is refused for tells the URL and the server's reason."""
    await client.begin(instance.url, "", token="not.a.token")
    await client.wait_errors(1)
    errors = await client.errors()
    assert errors[0].startswith(f"Error: {instance.url}/v1/connect-info answered 401: the token")
    await client.close()


@pytest_asyncio.fixture(loop_scope="session")
async def between(bridge: FaultyBridge) -> AsyncIterator[Between]:
    """What stands before the bridge."""
    async with Between(urlsplit(bridge.url).port or 0).run() as between:
        yield between


@pytest.mark.parametrize("stranger", STRANGERS)
async def test_what_is_not_the_bridge_ends_nothing(
    node: NodeRuntime, bridge: FaultyBridge, between: Between, stranger: str
) -> None:
    """Whatever it answers to sockets, pulls and acks, the client comes through."""
    bridge.commit("a")
    strange = STRANGERS[stranger]
    between.answers |= {"/v1/connect": [strange] * 2, "/v1/messages": [strange] * 2}
    between.answers["/v1/connect-info"] = [strange]
    if stranger != "an empty 204":  # this is how the bridge answers an ack
        between.answers["/v1/messages/ack"] = [strange] * 2
    client = Client(node)
    await client.begin(between.url, "", token=TOKEN, policy=QUICK)
    await wait_until(lambda: bridge.acks == [1])
    await client.wait_state("connected")
    assert await client.count("fetch_token") == 1
    assert not any(between.answers.values())


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/ack", "/v1/connect-info"])
async def test_the_bridges_own_401_is_about_the_token(
    node: NodeRuntime, bridge: FaultyBridge, between: Between, path: str
) -> None:
    """Its problem has the client fetch a new token, also with parameters in the media type."""
    bridge.commit("a")
    refusal = refused(401, media_type='Application/Problem+JSON; charset="utf-8"')
    between.answers[path] = [refusal]
    if path == "/v1/connect-info":
        between.answers["/v1/connect"] = [refusal]
    client = Client(node)
    await client.begin(between.url, "", token=TOKEN, policy=QUICK)
    await wait_until(lambda: bridge.acks == [1])
    await client.wait_state("connected")
    assert await client.count("fetch_token") == 2


async def test_a_proxy_that_keeps_the_first_sub_protocol(
    client: Client, instance: Instance
) -> None:
    """The token is in the first of them, so it arrives."""
    async with FirstProtocolOnly(instance.port).run() as proxy:
        await client.start(proxy.url, "urn:user:first-only", token=instance.token("urn:user:one"))
        await client.wait_state("connected")
    assert proxy.handshakes == 1
    await client.close()


async def test_a_proxy_that_drops_the_sub_protocols(client: Client, instance: Instance) -> None:
    """The token does not arrive, and the client reports that at once."""
    async with FirstProtocolOnly(instance.port, kept=0).run() as proxy:
        await client.begin(proxy.url, "", token=instance.token("urn:user:one"))
        await client.wait_errors(1)
    assert "Sec-WebSocket-Protocol" in (await client.errors())[0]
    await client.close()


async def test_a_problem_is_told(node: NodeRuntime, bridge: FaultyBridge) -> None:
    """The error of a pull holds the URL, the status and the server's detail."""
    bridge.bad_pulls = [problem(507, "the disk is full")]
    client = await start(node, bridge)
    await client.wait_errors(1)
    expected = f"Error: {bridge.url}/v1/messages answered 507: the disk is full"
    assert await client.errors() == [expected]


# Time in the client runs this much faster than it does here.
HASTE = 10


@pytest_asyncio.fixture(loop_scope="session")
async def hasty(client_package: object) -> AsyncIterator[NodeRuntime]:
    """Node with timers that end early."""
    async with run_node() as node:
        await node.evaluate(
            "void (globalThis.setTimeout = ((set) => (callback, ms, ...rest) =>"
            f" set(callback, ms / {HASTE}, ...rest))(setTimeout))"
        )
        yield node


async def test_a_slow_line_gets_through(
    hasty: NodeRuntime, bridge: FaultyBridge, silence: Silence
) -> None:
    """A page that takes longer than the deadline is pulled once: the deadline is between bytes."""
    bodies = [f"{number:02}" + "x" * 60_000 for number in range(16)]
    bridge.commit(*bodies)
    bridge.bytes_per_s = 60_000 * HASTE
    pulled = silence("a page of 960 KB on a line of 600 kB/s: JavaScript client")
    client = await start(hasty, bridge)
    await client.wait_shown(*bodies)
    pulled()
    assert [pull["limit"] for pull in bridge.pulls] == ["50"]
    assert await client.errors() == []


@pytest.mark.parametrize("stall", ["silence", "drip", "cut"])
async def test_after_an_incomplete_page_a_smaller_one(
    hasty: NodeRuntime, bridge: FaultyBridge, stall: str
) -> None:
    """An answer that stands still, drips or breaks off is given up; the next page is smaller."""
    bridge.commit(*"abcdefghij")
    bridge.stalls = [stall, stall]
    client = await start(hasty, bridge)
    await client.wait_shown(*"abcdefghij")
    await client.idle()
    assert [pull["limit"] for pull in bridge.pulls] == ["50", "12", "3", "6", "12"]
    errors = await client.errors()
    assert len(errors) == 2
    assert all(error.startswith(f"Error: {bridge.url}/v1/messages") for error in errors)
