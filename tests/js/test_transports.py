"""The JavaScript client on networks that break WebSockets, in browsers and in Node."""

import asyncio
import json
from uuid import uuid4

import pytest

from tests.client.middlebox import Middlebox, Mode
from tests.client.switching import switch_under_traffic
from tests.js.driving import TIMEOUT_S, Client, NodeRuntime, send
from tests.support import Instance, Serve, wait_until

pytestmark = pytest.mark.asyncio(loop_scope="session")

QUICK = {
    "base_s": 0.01,
    "cap_s": 0.05,
    "poll_after_s": 300,  # what arrives is poked
    "idle_pull_s": 3000,
    "open_within_s": 1,
    "ready_within_s": 0.5,
    "try_base_s": 0.02,
    "try_cap_s": 0.05,
}


async def wait_polls(client: Client, *, polls: bool) -> None:
    """Wait until the client is connected in this way."""

    async def does() -> bool:
        state = await client.evaluate("[harness.client.state, harness.client.polls]")
        return bool(state == ["connected", polls])

    await wait_until(does, TIMEOUT_S, f"polling being {polls}")


@pytest.mark.parametrize("mode", ["refuse", "kill", "buffer"])
async def test_where_no_websocket_gets_through_it_polls(
    client: Client, instance: Instance, mode: Mode
) -> None:
    """A message is poked and pulled, and once the network lets sockets pass there is one again."""
    sub = f"urn:user:{mode}-{uuid4().hex}"
    async with Middlebox(instance.port, mode).run() as box:
        await client.begin(box.url, sub, policy=QUICK)
        await wait_polls(client, polls=True)
        await send(instance, sub, "over HTTP")
        await client.wait_shown("over HTTP")
        box.mode = "pass"
        await wait_polls(client, polls=False)
        await send(instance, sub, "through a socket")
        await client.wait_shown("over HTTP", "through a socket")
        await client.close()


async def test_a_token_that_is_refused_as_a_protocol_goes_into_the_query(
    client: Client, instance: Instance
) -> None:
    """Once HTTP is known to work the next WebSocket carries its token in another way."""
    sub = f"urn:user:token-{uuid4().hex}"
    async with Middlebox(instance.port, "token").run() as box:
        await client.begin(box.url, sub, policy=QUICK)
        await wait_polls(client, polls=False)
        await send(instance, sub, "hello")
        await client.wait_shown("hello")
        await client.close()


async def test_no_message_is_missed_while_it_switches(
    node: NodeRuntime, instance: Instance
) -> None:
    """Changes between the two, each in the midst of traffic: all messages come, once, in order."""
    sub, sent = f"urn:user:switch-{uuid4().hex}", 0
    client = Client(node)
    async with Middlebox(instance.port, "pass").run() as box:
        await client.begin(box.url, sub, policy=QUICK)

        async def traffic() -> None:
            nonlocal sent
            while True:
                await send(instance, sub, sent)
                sent += 1

        sending = asyncio.create_task(traffic())
        for number in range(10):
            polls = number % 2 == 0
            box.mode = "refuse" if polls else "pass"
            if polls:
                box.cut()
            await wait_polls(client, polls=polls)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)

        async def is_all_shown() -> bool:
            return len(await client.shown()) >= sent

        await wait_until(is_all_shown, TIMEOUT_S, "all messages")
        shown = await client.shown()
        assert shown == list(range(len(shown)))
        await client.close()


@pytest.mark.long
async def test_no_message_is_missed_while_the_bridge_comes_and_goes(
    client: Client, serve: Serve
) -> None:
    """A hundred changes under traffic, and the instance killed and drained: all come, in order."""
    sub = f"urn:user:comes-and-goes-{uuid4().hex}"
    instance = await asyncio.to_thread(serve, mailbox="sqlite:///mailbox.db", drain_s=0.1)
    async with Middlebox(instance.port, "pass").run() as box:
        await client.begin(box.url, sub, policy=QUICK)

        async def until_it_polls(polls: bool) -> None:  # noqa: FBT001 - a callback
            await wait_polls(client, polls=polls)

        sent = await switch_under_traffic(instance, box, sub, until_it_polls)
        await client.wait_shown(*range(sent))
        await client.close()


async def test_a_poll_without_end_is_given_up(node: NodeRuntime, instance: Instance) -> None:
    """Whatever stands between may answer more than a page: it is not kept, the next counts."""
    start = """harness.start({
      url: URL, sub: "urn:user:endless", transport: "poll",
      fetch: (url, options) => {
        if (!url.includes("/v1/pokes") || globalThis.flooded) return fetch(url, options);
        globalThis.flooded = 0;
        return Promise.resolve(new Response(new ReadableStream({
          pull(stream) {
            stream.enqueue(new Uint8Array(2 ** 20));
            if (++globalThis.flooded === 30) stream.close();
          },
        })));
      },
    })"""
    await node.evaluate(start.replace("URL", json.dumps(instance.url)))
    client = Client(node)
    await client.wait_state("connected")
    assert "more than 8388608 characters" in str(await client.steps())
    assert await node.evaluate("flooded") < 12
