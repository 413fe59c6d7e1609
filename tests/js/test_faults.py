"""The shell's part of the rules, in Node, against a bridge that misbehaves."""

import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.client.faulty_bridge import Bad, FaultyBridge
from tests.js.driving import QUICK, Client, NodeRuntime
from tests.support import wait_until

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
    client = await start(node, bridge, device="my phone")
    await client.wait_shown(*"abcde")
    await client.idle()
    await bridge.say(type="poke")
    await wait_until(lambda: len(bridge.pulls) == 4)
    assert bridge.connects[0]["device"] == "my phone"
    common = {"token": TOKEN, "device": "my phone", "limit": "50"}
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
    """Moved to where no socket can be had, the client comes back."""
    client = await start(node, bridge)
    await bridge.say(type="move", url="nonsense")
    await bridge.close(4307)
    await wait_until(lambda: len(bridge.connects) == 2)
    await client.wait_state("connected")


async def test_what_the_handler_throws_at_comes_again(
    node: NodeRuntime, bridge: FaultyBridge
) -> None:
    """A page is acked when it was dealt with, and not before; the error is told."""
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
    assert await node.evaluate("harness.errors") == ["Error: Error: not now"]


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
    """Without a socket the messages come all the same, by pulls that nobody asked for."""
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
    assert len(await node.evaluate("harness.errors")) == 2
    assert len(bridge.connects) == 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"url": "bridge.example"}, "http://"),
        ({"url": "https://bridge.example", "onMessages": None}, "either onMessages or onPoke"),
        ({"url": "https://bridge.example", "WebSocket": None}, "pass that of the ws package"),
    ],
)
async def test_wrong_options(node: NodeRuntime, options: dict[str, None], complaint: str) -> None:
    """What can't work is said at once."""
    written = json.dumps(options).replace("null", "undefined")
    said = await node.evaluate(
        f"""(() => {{
          const WebSocket = class {{}};
          try {{ connect({{ token: "t", WebSocket, onMessages() {{}}, ...{written} }}); }}
          catch (error) {{ return String(error); }}
        }})()"""
    )
    assert said.startswith("TypeError")
    assert complaint in said
