"""The Replicache example: its app and its page as they stand, beside a bridge without a mailbox."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.async_api import Browser, Page, Response, expect

from tests.examples.apps import EXAMPLES, run_app
from tests.support import Daemon, Instance, Serve, wait_until
from tests.support.browser import in_chromium
from tests.support.npm import build

pytestmark = pytest.mark.asyncio(loop_scope="session")

WEB = EXAMPLES / "replicache" / "web"
TIMEOUT_S = 120.0
POLL_AFTER_S = 10  # how often a client pulls that can't connect


@pytest.fixture
def bridge(serve: Serve) -> Instance:
    """An instance that keeps no messages."""
    return serve("--no-mailbox")


@pytest.fixture(scope="session")
def page_built(client_package: Path) -> None:
    """The page, with the client in it."""
    assert client_package.is_dir()
    build(WEB)


def answered(app: Daemon, call: str) -> int:
    """How often the app has answered ``POST /replicache/CALL``."""
    return app.log().count(f'"POST /replicache/{call} HTTP/1.1" 200')


async def open_list(browser: Browser, app: Daemon, bridge: Instance) -> Page:
    """The list, in a browser profile of its own, once pokes are heard."""
    page = await (await browser.new_context()).new_page()
    await page.clock.install()  # it runs normally, except in a test that moves it
    await page.goto(f"{app.url}/?bridge={bridge.url}")
    await expect(page.locator("output")).to_have_text("connected")
    return page


async def add(page: Page, text: str) -> None:
    """Write something into the list."""
    await page.get_by_label("What to do").fill(text)
    await page.get_by_role("button", name="Add").click()


async def expect_list(page: Page, *texts: str) -> None:
    """Wait until the list is exactly this; each entry has its button."""
    await expect(page.locator("li")).to_have_text([f"{text} Done" for text in texts])


@pytest.mark.usefixtures("page_built")
async def test_two_browsers(browser: Browser, bridge: Instance, tmp_path: Path) -> None:
    """What one changes the other shows, for one pull each; without a poke hardly anybody pulls."""
    async with asyncio.timeout(TIMEOUT_S):
        with run_app("replicache", bridge, tmp_path) as app:
            ann, bob = [await open_list(browser, app, bridge) for _ in range(2)]
            await add(ann, "water the plants")
            await expect_list(bob, "water the plants")
            await bob.get_by_role("button", name="Done").click()
            await expect_list(ann)
            for page in (ann, bob):
                await page.clock.fast_forward("30:00")
            await add(bob, "half an hour later")
            await expect_list(ann, "half an hour later")
            # Replicache pulls when it starts, and when its client is connected.
            # In half an hour each page also pulls by itself; the clock jumps over a second time.
            at_start, for_pokes, by_itself = 2 * 2, 2 * 3, 2
            assert answered(app, "pull") <= at_start + for_pokes + by_itself


@pytest.mark.usefixtures("page_built")
async def test_the_bridge_is_away(browser: Browser, bridge: Instance, tmp_path: Path) -> None:
    """Pushes go on meanwhile; once it is back all is shown, for a pull on ready and one poke."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(TIMEOUT_S):
        with run_app("replicache", bridge, tmp_path) as app:
            ann, bob = [await open_list(browser, app, bridge) for _ in range(2)]
            killed_s = loop.time()
            await asyncio.to_thread(bridge.kill)
            for page in (ann, bob):
                await expect(page.locator("output")).to_have_text("connecting")
            await add(ann, "on my own")
            await expect_list(ann, "on my own")
            await wait_until(lambda: answered(app, "push") == 1, what="a push")
            await expect_list(bob)

            await asyncio.to_thread(bridge.start)
            for page in (ann, bob):  # they needn't wait to try again
                await page.evaluate("dispatchEvent(new Event('online'))")
            await expect_list(bob, "on my own")
            for page in (ann, bob):
                await expect(page.locator("output")).to_have_text("connected")
            polls = 2 * int((loop.time() - killed_s) / POLL_AFTER_S)
            await add(bob, "together")
            await expect_list(ann, "on my own", "together")
            at_start, on_ready, for_pokes = 2 * 2, 2, 2 * 2
            assert answered(app, "pull") <= at_start + on_ready + for_pokes + polls


@in_chromium  # which shows the bodies of answers
@pytest.mark.usefixtures("page_built")
async def test_the_app_is_restarted(browser: Browser, bridge: Instance, tmp_path: Path) -> None:
    """Its list is in memory: pages that show the old one go on with the new one."""
    async with asyncio.timeout(TIMEOUT_S):
        with run_app("replicache", bridge, tmp_path) as app:
            ann, bob = [await open_list(browser, app, bridge) for _ in range(2)]
            pulls: list[Response] = []
            ann.on("response", lambda each: pulls.append(each) if "pull" in each.url else None)

            async def is_confirmed() -> bool:
                told = [await each.json() for each in pulls]
                return any(each["lastMutationIDChanges"] for each in told)

            await add(ann, "old")
            await expect_list(bob, "old")
            # Otherwise Replicache pushes it again, and the new list rightly contains it.
            await wait_until(is_confirmed, what="Ann's page learning that her push is applied")
            await asyncio.to_thread(app.kill)
            await asyncio.to_thread(app.start)
            await add(ann, "new")
            for page in (ann, bob):
                await expect_list(page, "new")


async def test_a_push_that_comes_twice(bridge: Instance, tmp_path: Path) -> None:
    """It is applied once. Each browser profile learns only of its own clients' mutations."""
    created = {"id": 1, "name": "putTodo", "args": {"id": "a", "text": "sleep"}, "clientID": "c1"}
    deleted = {"id": 2, "name": "deleteTodo", "args": {"id": "a"}, "clientID": "c1"}
    async with asyncio.timeout(TIMEOUT_S):
        with run_app("replicache", bridge, tmp_path) as app:
            async with httpx.AsyncClient(base_url=app.url) as http:

                async def push(*mutations: object) -> None:
                    body = {"clientGroupID": "ann", "mutations": mutations}
                    (await http.post("/replicache/push", json=body)).raise_for_status()

                async def pull(group: str, cookie: int | None) -> dict[str, Any]:
                    body = {"clientGroupID": group, "cookie": cookie}
                    return dict((await http.post("/replicache/pull", json=body)).json())

                await push(created)
                await push(created)
                put = {"op": "put", "key": "todo/a", "value": created["args"]}
                first = await pull("ann", None)
                version = first["cookie"]
                assert first["lastMutationIDChanges"] == {"c1": 1}
                assert first["patch"] == [{"op": "clear"}, put]
                assert await pull("bob", None) == {**first, "lastMutationIDChanges": {}}
                await push(created, deleted)
                gone = [{"op": "del", "key": "todo/a"}]
                second = {"cookie": version + 1, "lastMutationIDChanges": {"c1": 2}, "patch": gone}
                assert await pull("ann", version) == second
                third = {**second, "lastMutationIDChanges": {}, "patch": []}
                assert await pull("ann", version + 1) == third
