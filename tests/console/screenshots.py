"""Take the pictures of the console in the documentation: ``python -m tests.console.screenshots``.

Three real instances with a crowd of clients that send, are poked, and pull. With ``--browsers
DIRECTORY`` it takes pictures for the eyes alone instead: of the console and of the page, on a desk
and in a hand, in Chromium, Firefox and WebKitGTK.
"""

import argparse
import asyncio
import tempfile
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

from PIL import Image
from playwright.async_api import Page

from tests.console.conftest import Trio, start_trio
from tests.console.pages import look_up, open_console, open_playground, send_message
from tests.support.browser import BROWSERS, run_browser
from tests.support.webkit import WebKit, run_webkit

IMAGES = Path(__file__).parents[2] / "docs" / "img"
USERS = [f"urn:user:{number}" for number in range(30)]
COLORS = 128
MAX_BYTES = 150_000


WIDTHS = (1280, 390)


def main() -> None:
    """Take what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--browsers", type=Path, metavar="DIRECTORY")
    directory = parser.parse_args().browsers
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
    asyncio.run(take_for_the_docs() if directory is None else take_in_every_browser(directory))


async def take_for_the_docs() -> None:
    """Everything, from the sign-in to the drain."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as opened:
        threads = opened.enter_context(ThreadPoolExecutor())
        trio = start_trio(Path(directory), opened, threads)
        await trio.settled()
        async with run_browser("chromium") as browser:
            page = await browser.new_page(viewport={"width": 1280, "height": 800})
            await page.goto(f"{trio.one.url}/console")
            await page.get_by_role("button", name="development token").wait_for()
            await _shoot(page, "sign-in", full=False)
            await page.get_by_role("button", name="development token").click()
            async with trio.sessions(USERS), _traffic(trio, USERS):
                await _tour(page, trio)


async def _tour(page: Page, trio: Trio) -> None:
    await asyncio.sleep(50)
    await _shoot(page, "fanout")
    await look_up(page, USERS[0])
    await _shoot(page, "look-up", of=".look-up")
    await page.locator("#recipient").evaluate("it => it.blur()")
    await page.locator(".migrate").click()
    await _shoot(page, "migrate", full=False)
    await page.keyboard.press("Escape")
    await trio.migrate("partitioned")
    await asyncio.sleep(12)
    await page.emulate_media(color_scheme="dark")
    await asyncio.sleep(1.5)
    await _shoot(page, "partitioned-dark")
    await page.emulate_media(color_scheme="light")
    await asyncio.to_thread(trio.instances["two"].kill)
    await page.locator("tr[data-instance=two]").wait_for(state="detached")
    await page.locator(".shards .moved").first.wait_for()
    await asyncio.sleep(1)
    await _shoot(page, "died")
    await page.set_viewport_size({"width": 390, "height": 844})
    await asyncio.sleep(1.5)
    await _shoot(page, "narrow", full=False)
    await page.locator(".shards").scroll_into_view_if_needed()
    await _shoot(page, "narrow-shards", full=False)


@asynccontextmanager
async def _traffic(trio: Trio, users: Sequence[str]) -> AsyncIterator[None]:
    """Messages, and pulls of them, as long as the block lasts."""

    async def run() -> None:
        async with (
            trio.one.async_http("urn:user:backend", "send") as sender,
            trio.instances["three"].async_http(users[0]) as reader,
        ):
            number = 0
            while True:
                number += 1
                body = {"recipient": users[number % len(users)], "body": number, "ttl_s": 60}
                await sender.post("/v1/messages", json=body)
                await reader.get("/v1/messages", params={"after": number})

    task = asyncio.create_task(run())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _shoot(page: Page, name: str, *, full: bool = True, of: str = "") -> None:
    path = IMAGES / f"console-{name}.png"
    if of:
        await page.locator(of).screenshot(path=path)
    else:
        await page.screenshot(path=path, full_page=full)
    with Image.open(path) as image:
        smaller = image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    smaller.save(path, optimize=True)
    size_bytes = path.stat().st_size
    assert size_bytes < MAX_BYTES, f"{path.name}: {size_bytes} bytes"


class _PageTab:
    """A page of Playwright's, used as :class:`WebKit` is."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self.goto = page.goto
        self.evaluate = page.evaluate

    async def resize(self, width: int, height: int) -> None:
        """Give the page this size."""
        await self._page.set_viewport_size({"width": width, "height": height})

    async def screenshot(self) -> bytes:
        """What can be seen of the page, as PNG."""
        return await self._page.screenshot()


async def take_in_every_browser(directory: Path) -> None:
    """The same things done in each of the three."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        threads = opened.enter_context(ThreadPoolExecutor())
        trio = start_trio(Path(folder), opened, threads)
        await trio.settled()
        async with trio.sessions(USERS), _traffic(trio, USERS):
            for name in BROWSERS:
                async with run_browser(name) as browser:
                    await _take_both(_PageTab(await browser.new_page()), trio, directory, name)
            async with run_webkit() as webkit:
                await _take_both(webkit, trio, directory, "webkit")


async def _take_both(tab: _PageTab | WebKit, trio: Trio, directory: Path, browser: str) -> None:
    await tab.resize(WIDTHS[0], 900)
    await open_playground(tab, trio.one.url)
    for number in range(3):
        await send_message(tab, "left", f"Are you there? ({number})")
        await send_message(tab, "right", f"I am, and pull what is new. ({number})")
    await _take(tab, directory, f"{browser}-page")
    await open_console(tab, trio.one.url)
    await look_up(tab, USERS[0])
    await asyncio.sleep(20)  # for the charts
    await _take(tab, directory, f"{browser}-console")


async def _take(tab: _PageTab | WebKit, directory: Path, name: str) -> None:
    for width in WIDTHS:
        await tab.resize(width, 900)
        await asyncio.sleep(1.5)
        await tab.resize(width, await tab.evaluate("document.documentElement.scrollHeight"))
        await asyncio.sleep(0.5)
        (directory / f"{name}-{width}.png").write_bytes(await tab.screenshot())


if __name__ == "__main__":
    main()
