"""Debian's WebKitGTK, driven by its own WebDriver on a screen that nobody sees."""

import asyncio
import base64
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.support.daemon import Daemon, free_port
from tests.support.missing import missing, require

LIMIT_S = 60.0

_ASYNC = """const done = arguments[0];
(async () => (%s))().then((value) => done({ value }), (error) => done({ error: String(error) }));"""


class WebKit:
    """A window of WebKitGTK, with one page."""

    def __init__(self, http: httpx.AsyncClient, session: str) -> None:
        self._http = http
        self._session = session

    async def goto(self, url: str) -> None:
        """Open a page, and return when it has loaded."""
        await self._call("POST", "url", url=url)

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        done = await self._call("POST", "execute/async", script=_ASYNC % expression, args=[])
        if "error" in done:
            raise AssertionError(f"{expression}: {done['error']}")
        return done.get("value")

    async def resize(self, width: int, height: int) -> None:
        """Give the page this size."""
        window = await self._call("GET", "window/rect")
        inner = await self.evaluate("[innerWidth, innerHeight]")
        frame = window["width"] - inner[0], window["height"] - inner[1]
        await self._call(
            "POST", "window/rect", width=width + frame[0], height=height + frame[1], x=0, y=0
        )

    async def screenshot(self) -> bytes:
        """What can be seen of the page, as PNG."""
        return base64.b64decode(await self._call("GET", "screenshot"))

    async def close(self) -> None:
        """Close the window."""
        (await self._http.delete(f"/session/{self._session}")).raise_for_status()

    async def _call(self, method: str, command: str, **body: Any) -> Any:
        path = f"/session/{self._session}/{command}"
        answer = await self._http.request(method, path, json=body if method == "POST" else None)
        value = answer.json()["value"]
        assert answer.is_success, value
        return value


@asynccontextmanager
async def run_webkit() -> AsyncIterator[WebKit]:
    """A window with an empty page, in a profile of its own."""
    driver = require("WebKitWebDriver")
    browser = _browser()
    with tempfile.TemporaryDirectory() as directory, _screen() as display:
        await asyncio.to_thread(_narrow, Path(directory))
        port = free_port()
        daemon = Daemon(
            "WebKitWebDriver",
            [driver, "--host=127.0.0.1", f"--port={port}"],
            port=port,
            url=f"http://127.0.0.1:{port}",
            directory=Path(directory),
            env=os.environ
            | {
                "DISPLAY": display,
                "GDK_BACKEND": "x11",
                "HOME": directory,
                "LANG": "en_US.UTF-8",  # its pages would find the language "C"
                "NO_AT_BRIDGE": "1",
            },
        )
        await asyncio.to_thread(daemon.start)
        try:
            async with httpx.AsyncClient(
                base_url=daemon.url, timeout=LIMIT_S, trust_env=False
            ) as http:
                yield await _window(http, browser)
        finally:
            await asyncio.to_thread(daemon.kill)


def _browser() -> Path:
    """The browser that comes with the driver, in a directory of the machine's kind."""
    found = Path("/usr/lib").glob("*-linux-gnu*/webkit2gtk-4.1/MiniBrowser")
    return next(found, None) or missing("WebKit's MiniBrowser")


def _narrow(home: Path) -> None:
    """Let the window be as narrow as a phone, which its row of buttons would prevent."""
    theme = home / ".config" / "gtk-3.0" / "gtk.css"
    theme.parent.mkdir(parents=True)
    theme.write_text("button, entry { min-width: 0; margin: 0; padding: 0; border: 0 }")


async def _window(http: httpx.AsyncClient, browser: Path) -> WebKit:
    options = {"binary": str(browser), "args": ["--automation"]}
    wanted = {"alwaysMatch": {"webkitgtk:browserOptions": options}}
    answer = await http.post("/session", json={"capabilities": wanted})
    assert answer.is_success, answer.text
    return WebKit(http, answer.json()["value"]["sessionId"])


@contextmanager
def _screen() -> Iterator[str]:
    """An X server without a screen; yields its display."""
    command = [require("Xvfb"), "-displayfd", "1", "-nolisten", "tcp", "-screen", "0"]
    with subprocess.Popen([*command, "1600x4800x24"], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        try:
            yield f":{int(server.stdout.readline())}"
        finally:
            server.kill()
