"""A real browser: Debian's Chromium, driven by Playwright."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from playwright.async_api import Browser, Page, async_playwright, expect

from tests.support.missing import missing, require

AXE = Path(__file__).parents[1] / "node" / "node_modules" / "axe-core" / "axe.min.js"

# No sandbox: the tests may run as root, on pages of their own. The rest keeps it off the network.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]

# How long a page may take to show what is expected: a limit for what hangs, as all of them are.
expect.set_options(timeout=30_000)


@pytest.fixture
async def chromium() -> AsyncIterator[Browser]:
    """A headless browser; a test takes ``await chromium.new_page()``."""
    path = require("chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        await browser.close()


# A colour is not its own while it fades in; an animation without an end is never waited for.
_ANIMATIONS_END = """Promise.allSettled(document.getAnimations()
  .filter((each) => each.effect.getComputedTiming().endTime !== Infinity)
  .map((each) => each.finished))"""


async def axe_violations(page: Page) -> list[str]:
    """What axe-core finds wrong with a page: each rule with the elements that break it."""
    if not AXE.exists():
        missing("axe-core (npm ci in tests/node)")
    await page.evaluate(await asyncio.to_thread(AXE.read_text))
    await page.evaluate(_ANIMATIONS_END)
    found = await page.evaluate("axe.run().then(({ violations }) => violations)")
    return [f"{each['id']}: {[node['html'] for node in each['nodes']]}" for each in found]
