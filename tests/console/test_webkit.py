"""The page and the console in WebKitGTK."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.console.conftest import Trio
from tests.console.pages import (
    look_up,
    open_console,
    open_playground,
    send_message,
    sticks_out_px,
)
from tests.support import Serve
from tests.support.browser import axe_violations
from tests.support.webkit import WebKit, run_webkit

pytestmark = [pytest.mark.long, pytest.mark.asyncio(loop_scope="session")]


@pytest_asyncio.fixture(loop_scope="session")
async def webkit() -> AsyncIterator[WebKit]:
    """A window of its own."""
    async with run_webkit() as webkit:
        yield webkit


async def is_well(webkit: WebKit) -> None:
    """Axe finds nothing, and nothing sticks out, on a desk or in a hand."""
    assert await axe_violations(webkit) == []
    for width in (1280, 390):
        await webkit.resize(width, 844)
        assert await webkit.evaluate("innerWidth") == width
        assert await sticks_out_px(webkit) <= 0


async def test_the_page(webkit: WebKit, serve: Serve) -> None:
    """Both users get each other's messages, and the page is accessible and fits."""
    instance = await asyncio.to_thread(serve, "--mailbox", "memory://")
    await open_playground(webkit, instance.url)
    await send_message(webkit, "left", "hello")
    await send_message(webkit, "right", "hello yourself")
    await is_well(webkit)


async def test_the_console(webkit: WebKit, trio: Trio) -> None:
    """It is live, finds a recipient, draws its charts, and is accessible and fits."""
    await open_console(webkit, trio.one.url)
    async with trio.sessions(["urn:user:webkit"]):
        await look_up(webkit, "urn:user:webkit")
    await is_well(webkit)
