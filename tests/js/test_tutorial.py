"""docs/tutorial.md: the app that it writes works, with both of its pages in a browser."""

import asyncio
import os
import re
import sys
from pathlib import Path

import httpx
import pytest
from playwright.async_api import BrowserContext, Page, expect

from tests.docs.blocks import ROOT, blocks
from tests.support import Serve, free_port, wait_until
from tests.support.serving import JWT_SECRET

pytestmark = pytest.mark.asyncio(loop_scope="session")

PAGE = ROOT / "docs" / "tutorial.md"


async def sign_in(page: Page, url: str, user: str, password: str) -> Page:
    """The app's page, with ``user`` signed in and listening."""
    await page.goto(url)
    await page.get_by_placeholder("alice or bob").fill(user)
    await page.get_by_placeholder("wonderland or builder").fill(password)
    await page.get_by_role("button", name="Sign in").click()
    await expect(page.locator("output")).to_have_text("connected")
    return page


def _with_todos(page: str) -> str:
    """The page as the tutorial has its reader change it."""
    (listen,) = [each.text for each in blocks(PAGE) if each.language == "js"]
    changed, count = re.subn(
        r"^  function listen\(\) \{\n.*?^  \}\n",
        lambda _: listen,
        page,
        flags=re.DOTALL | re.MULTILINE,
    )
    assert count == 1
    assert changed.count('"/messages"') == 1
    return changed.replace('"/messages"', '"/todos"')


async def test_the_app_of_the_tutorial(
    context: BrowserContext, serve: Serve, tmp_path: Path
) -> None:
    """What one user sends the other sees, on a bridge that knows no user.

    With the other ``listen`` of the tutorial, both see the list that the app keeps.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    instance = serve(dev=False, mailbox="sqlite:///tutorial.db", allowed_origins=url)
    (app,) = [each.text for each in blocks(PAGE) if each.language == "python"]
    (page,) = [each.text for each in blocks(PAGE) if each.language == "html"]

    def save(name: str, text: str) -> None:
        own = text.replace("http://127.0.0.1:8080", instance.url).replace("8000", str(port))
        (tmp_path / name).write_text(own)

    save("app.py", app)
    save("index.html", page)
    env = os.environ | {"POKEBRIDGE_JWT_SECRET": JWT_SECRET}
    process = await asyncio.create_subprocess_exec(sys.executable, "app.py", cwd=tmp_path, env=env)
    try:
        async with httpx.AsyncClient(base_url=url) as http:

            async def is_up() -> bool:
                try:
                    return (await http.get("/todos")).status_code == httpx.codes.UNAUTHORIZED
                except httpx.ConnectError:
                    return False

            await wait_until(is_up, what="the app")
            alice = await sign_in(await context.new_page(), url, "alice", "wonderland")
            assert context.browser is not None
            other = await context.browser.new_context()
            bob = await sign_in(await other.new_page(), url, "bob", "builder")
            await alice.get_by_placeholder("to").fill("bob")
            await alice.get_by_placeholder("message").fill("hello")
            await alice.get_by_role("button", name="Send").click()
            await expect(bob.locator("#messages li")).to_have_text(["alice: hello"])
            save("index.html", _with_todos(page))
            for each, user, word in ((alice, "alice", "wonderland"), (bob, "bob", "builder")):
                await sign_in(each, url, user, word)
            await alice.get_by_placeholder("message").fill("tea")
            await alice.get_by_role("button", name="Send").click()
            for each in (alice, bob):
                await expect(each.locator("#messages li")).to_have_text(["tea"])
            await other.close()
    finally:
        process.kill()
        await process.wait()
