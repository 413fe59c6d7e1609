"""One life of a client after the other, in browsers and in Node, against real instances.

No pull may be missed, and none may be needless: every scenario counts them.
"""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from uuid import uuid4

import pytest

from tests.js.driving import (
    QUICK,
    Client,
    NodeRuntime,
    PageRuntime,
    poke,
    pulls,
    run_node,
    send,
    wait_sessions,
)
from tests.support import CutProxy, Instance, Serve, wait_until
from tests.support.browser import in_chromium

# Only the event that the network is back can bring a socket in time.
LAZY = {"base_s": 1e4, "cap_s": 1e4}

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_message_poke_pull_shown(client: Client, instance: Instance) -> None:
    """Each message is shown, in order and once; one by one they cost one pull each."""
    before = await pulls(instance)
    await client.start(instance.url, "urn:user:ann")
    await client.idle()
    await client.wait_shown()
    for number in range(1, 4):
        await send(instance, "urn:user:ann", number)
        await client.wait_shown(*range(1, number + 1))
    await client.idle()
    assert await client.count("pull") == 1 + 3
    assert await pulls(instance) - before == 1 + 3

    await asyncio.gather(*(send(instance, "urn:user:ann", "burst") for _ in range(20)))
    await client.wait_shown(1, 2, 3, *["burst"] * 20)
    await client.idle()
    assert await client.count("pull") <= 1 + 3 + 20
    await client.close()


async def test_own_pulls(client: Client, instance: Instance) -> None:
    """``onPoke`` is called once on ready and once for a poke; pokes during a call cost one more."""
    await client.start(instance.url, "urn:user:own", kind="own", cursor=5)
    await client.wait_shown(5)
    await poke(instance, "urn:user:own")
    await client.wait_shown(5, 5)
    await client.close()


async def test_killed_restarted_drained(
    page: PageRuntime, node: NodeRuntime, serve: Serve, tmp_path: Path
) -> None:
    """Nothing is lost when the instance is killed, restarted and drained."""
    mailbox = f"sqlite:///{tmp_path / 'mailbox.db'}"
    instance = await asyncio.to_thread(serve, mailbox=mailbox, drain_s=0.1)
    clients = {"urn:user:browser": Client(page), "urn:user:node": Client(node)}

    async def for_each(step: Callable[[str, Client], Awaitable[object]]) -> None:
        await asyncio.gather(*(step(sub, client) for sub, client in clients.items()))

    async def get(sub: str, client: Client, *bodies: str) -> None:
        await send(instance, sub, bodies[-1])
        await client.wait_shown(*bodies)
        await client.wait_state("connected")
        await client.idle()

    # Otherwise a client that returned by polling would switch to a socket, with another pull.
    await for_each(lambda sub, client: client.start(instance.url, sub, transport="websocket"))
    await for_each(lambda sub, client: get(sub, client, "before"))

    await asyncio.to_thread(instance.kill)
    await for_each(lambda _, client: client.wait_state("connecting"))
    await asyncio.to_thread(instance.start)
    await for_each(lambda sub, client: get(sub, client, "before", "killed"))

    await asyncio.to_thread(instance.terminate)
    await for_each(lambda _, client: client.wait_state("connecting"))
    await asyncio.to_thread(instance.start)
    await for_each(lambda sub, client: get(sub, client, "before", "killed", "drained"))

    for client in clients.values():
        closes = [step["code"] for step in await client.steps() if step["type"] == "closed"]
        assert 1012 in closes
        assert 3 <= await client.count("pull") <= await client.heard() <= 3 + 3


async def test_offline_and_back_in_a_browser(page: PageRuntime, instance: Instance) -> None:
    """Back online, missed messages are pulled at once. The browser emulates the outage."""
    client, sub = Client(page), f"urn:user:offline-{uuid4().hex}"
    await client.start(instance.url, sub, policy=LAZY)
    await client.idle()
    await page.set_offline(offline=True)
    await client.wait_state("connecting")
    await send(instance, sub, "missed")
    await page.set_offline(offline=False)
    await client.wait_shown("missed")
    await send(instance, sub, "heard")
    await client.wait_shown("missed", "heard")
    assert await client.count("pull") == 3


@in_chromium  # under WebDriver Firefox loads the page anew
async def test_the_way_back_to_a_page_that_was_kept(
    page: PageRuntime, site: str, instance: Instance
) -> None:
    """A page from the back/forward cache has a new socket at once, and pulls what it missed."""
    client, tab = Client(page), page.page
    await client.start(instance.url, "urn:user:kept", policy=LAZY, share=False)
    await client.idle()
    await tab.goto(f"{site}/deploy/")
    await wait_sessions(instance, 0)
    await send(instance, "urn:user:kept", "missed")
    await tab.evaluate("history.back()")
    await tab.wait_for_function("globalThis.harness?.shown.length")
    assert await client.shown() == ["missed"]
    assert await client.count("connect") == 2, "the page was kept, not loaded anew"


async def test_offline_and_back_in_node(node: NodeRuntime, instance: Instance) -> None:
    """Node has no online event, so the client notices the silence."""
    client = Client(node)
    async with CutProxy("127.0.0.1", instance.port) as proxy:
        policy = {**QUICK, "ping_after_s": 0.3, "pong_within_s": 1}
        await client.start(f"http://{proxy.address}", "urn:user:node-offline", policy=policy)
        await client.idle()
        proxy.cut()
        await client.wait_state("connecting")
        await send(instance, "urn:user:node-offline", "missed")
        proxy.heal()
        await client.wait_shown("missed")
        await send(instance, "urn:user:node-offline", "heard")
        await client.wait_shown("missed", "heard")
        assert await client.count("pull") == 3
        await client.close()


async def test_revoked(client: Client, instance: Instance) -> None:
    """4401 costs a new token and one pull, and no message."""
    await client.start(instance.url, "urn:user:ann-revoked")
    async with instance.async_http("root", "admin") as http:
        (await http.delete("/v1/sessions/urn:user:ann-revoked")).raise_for_status()
    await client.wait_count("closed", 1)
    await client.wait_state("connected")
    await client.wait_count("pulled", 2)  # else the pull after `ready` may bring the message
    await send(instance, "urn:user:ann-revoked", "still there")
    await client.wait_shown("still there")
    assert await client.count("fetch_token") == 2
    assert await client.count("pull") == 3
    await client.close()


async def test_nodes_own_websocket(client_package: Path, instance: Instance) -> None:
    """Node's own WebSocket is used where it exists: opened, closed, opened again."""
    async with run_node(own_websocket=True) as node:
        client = Client(node)
        await client.start(instance.url, "urn:user:native")
        async with instance.async_http("root", "admin") as http:
            (await http.delete("/v1/sessions/urn:user:native")).raise_for_status()
        await client.wait_count("closed", 1)
        await client.wait_state("connected")
        await send(instance, "urn:user:native", "hello")
        await client.wait_shown("hello")
        closes = [step["code"] for step in await client.steps() if step["type"] == "closed"]
        assert closes == [4401]


async def test_a_refused_token(client: Client, instance: Instance) -> None:
    """A handshake does not say in a browser that its token was refused: it is found out."""
    await client.start(instance.url, "urn:user:sly", kind="own", bad_tokens=1)
    assert await client.count("fetch_token") == 2
    assert await client.count("connect") == 2
    await client.close()


async def test_replaced(page: PageRuntime, node: NodeRuntime, serve: Serve) -> None:
    """4409 stops a client for good: it does not fight with the one that replaced it."""
    instance = await asyncio.to_thread(serve, mailbox="memory://", max_sessions_per_recipient=1)
    first, second, third = Client(page), Client(node), Client(page)
    await first.start(instance.url, "urn:user:ann")
    await second.start(instance.url, "urn:user:ann")
    await first.wait_state("stopped")
    assert (await first.steps())[-1] == {"type": "stop", "code": 4409}
    assert await page.evaluate("harness.client.stopCode") == 4409
    await third.start(instance.url, "urn:user:ann", share=False)
    await second.wait_state("stopped")


async def test_time_passes(page: PageRuntime, node: NodeRuntime, instance: Instance) -> None:
    """Tokens are renewed over the socket before they run out, and a process that slept wakes up.

    Both take seconds, so all clients do it side by side.
    """
    async with run_node() as sleeper:
        await asyncio.gather(
            renew(Client(page), instance, "urn:user:browser-renews"),
            renew(Client(node), instance, "urn:user:node-renews"),
            sleep(sleeper, instance),
        )


async def renew(client: Client, instance: Instance, sub: str) -> None:
    """The socket outlives the first token."""
    ttl_s = 7
    await client.start(instance.url, sub, ttl_s=ttl_s)
    first_runs_out_at = time.monotonic() + ttl_s
    await client.wait_count("authenticate", 1)
    await wait_until(lambda: time.monotonic() > first_runs_out_at + 0.2)
    await send(instance, sub, "on a renewed token")
    await client.wait_shown("on a renewed token")
    assert await client.count("closed") == 0
    assert await client.count("pull") == 2


async def sleep(node: NodeRuntime, instance: Instance) -> None:
    """While a process is stopped its connection is lost, which it finds out when it goes on."""
    client = Client(node)
    async with CutProxy("127.0.0.1", instance.port) as proxy:
        policy = {**QUICK, "ping_after_s": 0.5, "pong_within_s": 1}
        await client.start(f"http://{proxy.address}", "urn:user:sleepy", policy=policy)
        await client.idle()
        node.process.send_signal(signal.SIGSTOP)
        proxy.cut()
        await asyncio.sleep(6)  # the sleep itself is what is tested
        await send(instance, "urn:user:sleepy", "good morning")
        node.process.send_signal(signal.SIGCONT)
        await client.wait_count("wake", 1)
        await client.wait_count("disconnect", 1)
        proxy.heal()
        await client.wait_shown("good morning")
        await client.idle()
        assert await client.count("pull") == 2
        await client.close()
