"""The client in both runtimes, and an instance that tests share."""

import os
import threading
from collections.abc import AsyncIterator, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, BrowserContext, async_playwright

from tests.js.driving import (
    TIMEOUT_S,
    Client,
    NodeRuntime,
    PageRuntime,
    open_page,
    released,
    run_node,
)
from tests.support import Instance, free_port
from tests.support.browser import FLAGS
from tests.support.missing import require
from tests.support.npm import ROOT
from tests.support.serving import JWT_SECRET

# What Playwright switches off, and users have.
NOT_AS_A_USERS = [
    "--disable-background-timer-throttling",
    "--disable-backgrounding-occluded-windows",
    "--disable-renderer-backgrounding",
]


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
    env = {k: v for k, v in os.environ.items() if not k.startswith("POKEBRIDGE_")}
    instance = Instance(
        "shared",
        ["--dev", "--mailbox", "memory://"],
        env | {"POKEBRIDGE_JWT_SECRET": JWT_SECRET},
        tmp_path_factory.mktemp("shared"),
    )
    instance.start()
    yield instance
    instance.kill()


@pytest.fixture(scope="session")
def devtools_port() -> int:
    """Where Chromium can be asked for a tab that Playwright has no hand in."""
    return free_port()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser(devtools_port: int) -> AsyncIterator[Browser]:
    """A headless browser that the tests share. It throttles what is hidden, as a user's does."""
    path = require("chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=path,
            args=[*FLAGS, f"--remote-debugging-port={devtools_port}"],
            ignore_default_args=NOT_AS_A_USERS,
        )
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="session")
async def context(browser: Browser) -> AsyncIterator[BrowserContext]:
    """A fresh profile: its tabs know each other, and none of another test's."""
    context = await browser.new_context()
    yield context
    await context.close()


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


@pytest.fixture(params=["page", "node"])
def client(request: pytest.FixtureRequest) -> Client:
    """A client that is not started yet: in a browser, and once more in Node."""
    return Client(request.getfixturevalue(request.param))
