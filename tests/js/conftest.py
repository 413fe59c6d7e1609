"""The client in both runtimes, and an instance that tests share."""

import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, BrowserContext

from tests.js.driving import (
    TIMEOUT_S,
    Client,
    NodeRuntime,
    PageRuntime,
    open_page,
    released,
    run_node,
)
from tests.support import Instance, wait_until
from tests.support.browser import Browsers
from tests.support.npm import ROOT
from tests.support.serving import JWT_SECRET
from tests.support.webkit import run_webkit


class Site(SimpleHTTPRequestHandler):
    """The checkout, as pages see it."""

    def do_GET(self) -> None:
        """A file; or, for a page that waits for nothing else, the end of its wait."""
        if self.path == "/hold":
            released.wait(2 * TIMEOUT_S)
        super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Say nothing."""


@pytest.fixture(scope="session")
def site(client_package: Path) -> Iterator[str]:
    """Where the checkout is served: another origin than the instances'."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Site, directory=str(ROOT)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="session")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """A running instance that the tests share, each with recipients of its own."""
    instance = Instance(
        "shared",
        ["--dev", "--mailbox", "memory://"],
        os.environ | {"POKEBRIDGE_JWT_SECRET": JWT_SECRET},
        tmp_path_factory.mktemp("shared"),
    )
    instance.start()
    yield instance
    instance.kill()


@pytest_asyncio.fixture(loop_scope="session")
async def context(browser: Browser) -> BrowserContext:
    """A fresh profile: its tabs know each other, and none of another test's."""
    return await browser.new_context()


@pytest_asyncio.fixture(loop_scope="session")
async def page(context: BrowserContext, site: str) -> PageRuntime:
    """A tab with the harness in it."""
    return await open_page(context, site)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_node(client_package: Path) -> AsyncIterator[NodeRuntime]:
    """A Node process that the tests share."""
    async with run_node() as node:
        yield node


@pytest_asyncio.fixture(loop_scope="session")
async def node(shared_node: NodeRuntime) -> AsyncIterator[NodeRuntime]:
    """Node with a fresh harness in it."""
    await shared_node.evaluate("void renew()")
    yield shared_node
    await shared_node.evaluate("harness.client?.close()")


@asynccontextmanager
async def _page(browsers: Browsers, name: str, site: str) -> AsyncIterator[PageRuntime]:
    context = await (await browsers.start(name)).new_context()
    yield await open_page(context, site)
    await context.close()


@pytest_asyncio.fixture(
    loop_scope="session",
    params=[
        "chromium",
        "node",
        pytest.param("firefox", marks=pytest.mark.long),
        pytest.param("webkit", marks=pytest.mark.long),
    ],
)
async def client(
    request: pytest.FixtureRequest, browsers: Browsers, site: str, node: NodeRuntime
) -> AsyncIterator[Client]:
    """A client that is not started yet: in Chromium and Node, in the long run in the others."""
    if request.param == "node":
        yield Client(node)
    elif request.param == "webkit":
        async with run_webkit() as webkit:
            await webkit.goto(f"{site}/tests/js/page.html")
            await wait_until(lambda: webkit.evaluate("!!globalThis.harness"))
            yield Client(webkit)
    else:
        async with _page(browsers, request.param, site) as page:
            yield Client(page)
