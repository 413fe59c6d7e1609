"""The example of a shared document: its app and its page, beside a bridge without a mailbox."""

import asyncio
from pathlib import Path

import pytest
from playwright.async_api import Browser, Page, Route, expect

from tests.docs.blocks import ROOT
from tests.examples.apps import run_app
from tests.support import Daemon, Instance, Serve, free_port

pytestmark = pytest.mark.asyncio(loop_scope="session")

TIMEOUT_S = 120.0


@pytest.fixture
def bridge(serve: Serve) -> Instance:
    """An instance that keeps no messages."""
    return serve("--no-mailbox")


async def open_page(browser: Browser, app: Daemon, bridge: Instance, user: str) -> Page:
    """The page of ``user``, in a browser profile of its own, once it is connected."""
    page = await (await browser.new_context()).new_page()
    await page.goto(f"{app.url}/?bridge={bridge.url}&user={user}")
    await expect(page.locator("#state")).to_have_text("connected")
    return page


async def open_document(page: Page, title: str) -> None:
    """Show a document of the list, once its pokes are heard."""
    await page.get_by_role("button", name=title).click()
    await expect(page.locator("#document output")).to_have_text("connected")


async def submit(page: Page, label: str, text: str, button: str) -> None:
    """Fill a form in and send it."""
    await page.get_by_label(label).fill(text)
    await page.get_by_role("button", name=button, exact=True).click()


@pytest.mark.usefixtures("client_package")
async def test_two_browsers(browser: Browser, bridge: Instance, tmp_path: Path) -> None:
    """Each sees what the other writes, also what was written while the bridge was away."""
    async with asyncio.timeout(TIMEOUT_S):
        with run_app("document", bridge, tmp_path) as app:
            ann, bob = [await open_page(browser, app, bridge, user) for user in ("ann", "bob")]
            await submit(ann, "Title", "Plans", "New document")
            await open_document(ann, "Plans")
            await submit(ann, "Share it with", "bob", "Share")
            await open_document(bob, "Plans")
            assert "/documents/1/token?user=bob" in app.log()

            await submit(ann, "Next paragraph", "Water the plants.", "Add")
            first = "Paragraph 1"
            await expect(bob.get_by_label(first)).to_have_value("Water the plants.")
            await bob.get_by_label(first).fill("Water all plants.")
            await bob.get_by_label(first).blur()
            await expect(ann.get_by_label(first)).to_have_value("Water all plants.")

            await asyncio.to_thread(bridge.kill)
            for page in (ann, bob):
                await expect(page.locator("#state")).to_have_text("connecting")
            await submit(bob, "Next paragraph", "Even the cactus.", "Add")
            await asyncio.to_thread(bridge.start)
            await expect(ann.get_by_label("Paragraph 2")).to_have_value("Even the cactus.")
            await expect(bob.get_by_label("Paragraph 2")).to_have_value("Even the cactus.")


@pytest.mark.usefixtures("client_package")
async def test_who_may_not_read_hears_nothing(
    browser: Browser, bridge: Instance, tmp_path: Path
) -> None:
    """A user who is not a member gets neither the document nor a token for its pokes."""
    async with asyncio.timeout(TIMEOUT_S):
        with run_app("document", bridge, tmp_path) as app:
            ann, eve = [await open_page(browser, app, bridge, user) for user in ("ann", "eve")]
            await submit(ann, "Title", "Plans", "New document")
            await open_document(ann, "Plans")
            assert await eve.locator("#documents li").count() == 0
            for method, path in (("POST", "documents/1/token"), ("GET", "documents/1")):
                answer = await eve.request.fetch(f"{app.url}/{path}?user=eve", method=method)
                assert answer.status == 404


@pytest.mark.parametrize("example", ["document", "page"])
async def test_a_page_without_its_client_says_what_to_build(browser: Browser, example: str) -> None:
    """Otherwise it would say "connecting" for ever."""
    text = (ROOT / "examples" / example / "index.html").read_text()

    async def answer(route: Route) -> None:
        is_page = route.request.resource_type == "document"
        await route.fulfill(status=200 if is_page else 404, content_type="text/html", body=text)

    page = await (await browser.new_context()).new_page()
    await page.route("**", answer)
    await page.goto(f"http://127.0.0.1:{free_port()}/examples/")
    await expect(page.locator("#state")).to_contain_text("npm run build in clients/js")
