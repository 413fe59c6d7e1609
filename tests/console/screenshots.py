"""Take the pictures of the console in the documentation: ``python -m tests.console.screenshots``.

Three real instances with a crowd of clients that send, are poked, and pull. Needs Chromium.
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

from PIL import Image
from playwright.async_api import Page, async_playwright

from tests.console.conftest import Trio, start_trio
from tests.support.browser import FLAGS
from tests.support.missing import require

IMAGES = Path(__file__).parents[2] / "docs" / "img"
USERS = [f"urn:user:{number}" for number in range(30)]
COLORS = 128
MAX_BYTES = 150_000


async def main() -> None:
    """Everything, from the sign-in to the drain."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as opened:
        threads = opened.enter_context(ThreadPoolExecutor())
        trio = start_trio(Path(directory), opened, threads)
        await trio.settled()
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(
                executable_path=require("chromium"), args=FLAGS
            )
            page = await browser.new_page(viewport={"width": 1280, "height": 800})
            await page.goto(f"{trio.one.url}/console")
            await page.get_by_role("button", name="development token").wait_for()
            await _shoot(page, "sign-in", full=False)
            await page.get_by_role("button", name="development token").click()
            async with trio.sessions(USERS), _traffic(trio, USERS):
                await _tour(page, trio)
            await browser.close()


async def _tour(page: Page, trio: Trio) -> None:
    await asyncio.sleep(50)
    await _shoot(page, "fanout")
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


async def _shoot(page: Page, name: str, *, full: bool = True) -> None:
    path = IMAGES / f"console-{name}.png"
    await page.screenshot(path=path, full_page=full)
    with Image.open(path) as image:
        smaller = image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    smaller.save(path, optimize=True)
    size_bytes = path.stat().st_size
    assert size_bytes < MAX_BYTES, f"{path.name}: {size_bytes} bytes"


if __name__ == "__main__":
    asyncio.run(main())
