"""Several tabs of a browser, and one that nobody looks at."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import websockets
from playwright.async_api import BrowserContext

from tests.js.driving import (
    QUICK,
    Client,
    open_pages,
    poke,
    pulls,
    released,
    send,
    sessions,
    wait_sessions,
)
from tests.support import Instance, free_port, wait_until
from tests.support.browser import in_chromium, run_browser

pytestmark = pytest.mark.asyncio(loop_scope="session")


@in_chromium  # on a busy machine Firefox may delay timers of hidden tabs by 15 s
async def test_four_tabs_one_socket(context: BrowserContext, site: str, instance: Instance) -> None:
    """Four tabs share one socket and one pull per message. Another tab takes over."""
    await wait_sessions(instance, 0)
    before = await pulls(instance)
    tabs = await open_pages(context, site, 4)
    clients = [Client(tab) for tab in tabs]
    for client in clients:
        await client.start(instance.url, "urn:user:tabs")
        await client.idle()
    assert await sessions(instance) == 1
    assert await pulls(instance) - before == 4  # each tab's first

    for number in range(1, 4):
        await send(instance, "urn:user:tabs", number)
        for client in clients:
            await client.wait_shown(*range(1, number + 1))
    assert await pulls(instance) - before == 4 + 3

    await tabs[0].page.close()
    left = clients[1:]

    async def one_leads() -> bool:
        connects = [await client.count("closed") for client in left]
        return sorted(connects) == [0, 0, 1]

    await wait_until(one_leads, what="one tab taking over")
    for client in left:
        await client.wait_state("connected")
        await client.idle()
    assert await sessions(instance) == 1
    assert await pulls(instance) - before == 4 + 3 + 1
    await send(instance, "urn:user:tabs", "on")
    for client in left:
        await client.wait_shown(1, 2, 3, "on")
    assert await pulls(instance) - before == 4 + 3 + 1 + 1
    for client in left:
        assert await client.count("fetch_token") == 1


async def test_a_new_leader_with_an_old_token(
    context: BrowserContext, site: str, instance: Instance
) -> None:
    """A tab that takes over gets a new token first, so no handshake is refused."""
    await wait_sessions(instance, 0)
    first, second = await open_pages(context, site, 2)
    await Client(first).start(instance.url, "urn:user:old", ttl_s=20)
    client = Client(second)
    await client.start(instance.url, "urn:user:old", ttl_s=20)
    await first.page.close()
    await client.wait_count("connect", 2)
    await client.wait_state("connected")
    kinds = [step["type"] for step in await client.steps()]
    end = kinds.index("closed")
    assert kinds[end : kinds.index("opened", end)].count("token") == 1
    assert kinds.count("closed") == 1


async def test_each_tab_pulls_its_own(
    context: BrowserContext, site: str, instance: Instance
) -> None:
    """With ``onPoke`` every tab is told of each poke, through one socket."""
    await wait_sessions(instance, 0)
    clients = [Client(tab) for tab in await open_pages(context, site, 2)]
    for client in clients:
        await client.start(instance.url, "urn:user:own-tabs", kind="own")
        await client.wait_count("pulled", 1)
    await poke(instance, "urn:user:own-tabs")
    for client in clients:
        await client.wait_count("pulled", 2)
        assert await client.count("pull") == 2
    assert await sessions(instance) == 1


async def test_who_does_not_share(context: BrowserContext, site: str, instance: Instance) -> None:
    """Another user, another device and a browser without Web Locks have sockets of their own."""
    await wait_sessions(instance, 0)
    first, second, third, fourth = await open_pages(context, site, 4)
    await Client(first).start(instance.url, "urn:user:one")
    await Client(second).start(instance.url, "urn:user:two")
    await Client(third).start(instance.url, "urn:user:one", device="phone")
    await fourth.evaluate("void Object.defineProperty(navigator, 'locks', { value: undefined })")
    await Client(fourth).start(instance.url, "urn:user:one")
    assert await sessions(instance) == 4
    await send(instance, "urn:user:two", "for two")
    await Client(second).wait_shown("for two")
    assert await Client(first).count("pull") == 1


class RawTab:
    """A tab over Chromium's own protocol: Playwright would have every tab believe it is seen."""

    def __init__(self, socket: websockets.ClientConnection, devtools: str, target: str) -> None:
        self._socket = socket
        self._devtools = devtools
        self._target = target
        self._number = 0

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command, one answer."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": params}
        await self._socket.send(json.dumps(command))
        while (answer := json.loads(await self._socket.recv())).get("id") != self._number:
            pass
        return dict(answer["result"])

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        answer = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        return answer["result"].get("value")

    async def show(self) -> None:
        """Bring it to the front: the other one is hidden then."""
        async with httpx.AsyncClient(trust_env=False) as http:
            await http.get(f"{self._devtools}/json/activate/{self._target}")


@asynccontextmanager
async def raw_tab(port: int, url: str) -> AsyncIterator[RawTab]:
    """A new tab in front of all others."""
    devtools = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=devtools, trust_env=False) as http:
        target = (await http.put(f"/json/new?{url}")).json()
        try:
            async with websockets.connect(target["webSocketDebuggerUrl"], max_size=None) as socket:
                yield RawTab(socket, devtools, target["id"])
        finally:
            await http.get(f"/json/close/{target['id']}")


async def test_a_tab_in_the_background(site: str, instance: Instance) -> None:
    """A hidden tab, throttled by Chromium, is poked as ever; a frozen one pulls when it thaws."""
    port = free_port()
    async with (
        run_browser("chromium", f"--remote-debugging-port={port}"),
        raw_tab(port, f"{site}/tests/js/page.html") as tab,
        raw_tab(port, "about:blank"),
    ):
        await wait_until(lambda: tab.evaluate("!!globalThis.harness && document.hidden"))
        client = Client(tab)
        await client.start(instance.url, "urn:user:hidden")
        await send(instance, "urn:user:hidden", "while hidden")
        await client.wait_shown("while hidden")

        await tab.call("Page.enable")
        await tab.call("Page.setWebLifecycleState", state="frozen")
        await send(instance, "urn:user:hidden", 1, 2, 3)
        await tab.call("Page.setWebLifecycleState", state="active")
        await tab.show()
        await client.wait_shown("while hidden", 1, 2, 3)
        assert await client.count("wake") >= 1  # it became visible
        await client.idle()
        assert await client.count("pull") <= 2 + 3
        await client.close()


@in_chromium  # the tabs of a site share a process in Firefox, so that none sleeps alone
async def test_a_leading_tab_that_sleeps(
    context: BrowserContext, site: str, instance: Instance
) -> None:
    """Phones stop pages in the background, locks and all: a tab that is looked at takes over."""
    await wait_sessions(instance, 0)
    asleep, awake = await open_pages(context, site, 2)
    old, new = Client(asleep), Client(awake)
    policy = {**QUICK, "ping_after_s": 0.2}
    await old.start(instance.url, "urn:user:phone", policy=policy)
    await new.start(instance.url, "urn:user:phone", policy=policy)
    assert await sessions(instance) == 1

    released.clear()
    await asleep.evaluate("void setTimeout(hold)")
    await new.wait_count("connect", 2)
    await new.wait_state("connected")
    await send(instance, "urn:user:phone", "are you there?")
    await new.wait_shown("are you there?")

    released.set()
    await old.wait_shown("are you there?")
    await wait_sessions(instance, 1)
    await send(instance, "urn:user:phone", "good")
    for client in (old, new):
        await client.wait_shown("are you there?", "good")
