"""Real browsers, driven by Playwright: Debian's Chromium and, over WebDriver BiDi, its Firefox."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest
import pytest_asyncio
from playwright.async_api import Browser, async_playwright, expect

from tests.support.missing import missing, require

BROWSERS = ("chromium", "firefox")
AXE = Path(__file__).parents[1] / "node" / "node_modules" / "axe-core" / "axe.min.js"

# No sandbox: the tests may run as root, on pages of their own. The rest keeps it off the network.
_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
# Flags of Playwright that users' browsers do not have: those cache pages, and throttle them.
_NOT_AS_A_USERS = [
    "--disable-back-forward-cache",
    "--disable-background-timer-throttling",
    "--disable-backgrounding-occluded-windows",
    "--disable-renderer-backgrounding",
]

# How long a page may take to show what is expected. A limit for hangs, like all limits here.
expect.set_options(timeout=30_000)


@asynccontextmanager
async def run_browser(name: str, *flags: str) -> AsyncIterator[Browser]:
    """A headless browser, one of ``BROWSERS``; ``flags`` are for its command line."""
    async with async_playwright() as playwright:
        if name == "firefox":
            path = require("firefox-esr")
            starting = playwright.firefox.launch(
                channel="moz-firefox", executable_path=path, args=flags
            )
        else:
            starting = playwright.chromium.launch(
                executable_path=require("chromium"),
                args=[*_FLAGS, *flags],
                ignore_default_args=_NOT_AS_A_USERS,
            )
        browser = await starting
        try:
            yield browser
        finally:
            await browser.close()


class Browsers:
    """Starts each browser when a test first asks for it, and keeps it for the tests after it."""

    def __init__(self) -> None:
        self._running: dict[str, Browser] = {}
        self._opened = AsyncExitStack()

    async def start(self, name: str) -> Browser:
        """One of ``BROWSERS``."""
        if name not in self._running:
            self._running[name] = await self._opened.enter_async_context(run_browser(name))
        return self._running[name]

    async def close(self) -> None:
        """Stop them all."""
        await self._opened.aclose()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browsers() -> AsyncIterator[Browsers]:
    """The browsers that the tests share."""
    browsers = Browsers()
    yield browsers
    await browsers.close()


@pytest_asyncio.fixture(
    loop_scope="session", params=["chromium", pytest.param("firefox", marks=pytest.mark.long)]
)
async def browser(request: pytest.FixtureRequest, browsers: Browsers) -> AsyncIterator[Browser]:
    """A browser without a page: Chromium, and in the long run once more Firefox.

    The profiles that a test opens in it are closed for the test.
    """
    browser = await browsers.start(request.param)
    yield browser
    for context in browser.contexts:
        await context.close()


in_chromium = pytest.mark.parametrize("browser", ["chromium"], indirect=True)
"""Marks a test of what Chromium alone can be told to do, or of what is no browser's matter."""


class Page(Protocol):
    """A page that evaluates JavaScript, whatever drives it."""

    async def evaluate(self, expression: str, /) -> Any:
        """The value of an expression, awaited."""


# A colour is not final while it fades in. Endless animations are not waited for.
_ANIMATIONS_END = """Promise.allSettled(document.getAnimations()
  .filter((each) => each.effect.getComputedTiming().endTime !== Infinity)
  .map((each) => each.finished))"""


async def axe_violations(page: Page) -> list[str]:
    """What axe-core finds wrong with a page: each rule with the elements that break it."""
    if not AXE.exists():
        missing("axe-core (npm ci in tests/node)")
    source = await asyncio.to_thread(AXE.read_text)
    await page.evaluate(f"void (() => {{ {source}\n}})()")
    await page.evaluate(_ANIMATIONS_END)
    found = await page.evaluate("axe.run().then(({ violations }) => violations)")
    return [f"{each['id']}: {[node['html'] for node in each['nodes']]}" for each in found]
