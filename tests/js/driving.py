"""Drives the JavaScript client where it runs: in a page of a browser, or in a Node process."""

import asyncio
import json
import os
import threading
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from playwright.async_api import BrowserContext, Page

from tests.support import Instance, wait_until
from tests.support.missing import require

HERE = Path(__file__).parent
# Reconnects soon; and polls only where a test is about that.
QUICK = {"base_s": 0.05, "cap_s": 0.2, "poll_after_s": 60}
TIMEOUT_S = 20.0
# A reply of the harness with a long list of steps is a long line.
LINE_LIMIT_BYTES = 2**22

released = threading.Event()
"""Until it is set, pages that have called ``hold()`` stand still."""


class Runtime(Protocol):
    """Where a client runs."""

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited."""


class PageRuntime:
    """A tab of a browser."""

    def __init__(self, page: Page) -> None:
        self.page = page

    async def evaluate(self, expression: str) -> Any:
        """In the page."""
        return await self.page.evaluate(expression)

    async def set_offline(self, *, offline: bool) -> None:
        """The browser's own emulation: connections break, and ``navigator.onLine`` says so."""
        await self.page.context.set_offline(offline)


async def open_page(context: BrowserContext, site: str) -> PageRuntime:
    """A new tab with the harness in it."""
    page = await context.new_page()
    await page.goto(f"{site}/tests/js/page.html")
    await page.wait_for_function("globalThis.harness")
    return PageRuntime(page)


async def open_pages(context: BrowserContext, site: str, number: int) -> list[PageRuntime]:
    """So many new tabs with the harness in them."""
    return await asyncio.gather(*(open_page(context, site) for _ in range(number)))


class NodeRuntime:
    """A Node process."""

    def __init__(self, process: Process) -> None:
        self.process = process

    async def evaluate(self, expression: str) -> Any:
        """In the process, one expression after the other."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(expression).encode() + b"\n")
        line = await self.process.stdout.readline()
        assert line, "node has ended"
        return json.loads(line)


@asynccontextmanager
async def run_node(*, own_websocket: bool = False) -> AsyncIterator[NodeRuntime]:
    """A Node process with the harness in it, with the WebSocket of `ws` or with Node's own."""
    flags, env = [], dict(os.environ)
    if own_websocket:
        flags = ["--experimental-websocket"]  # Node 20 needs it; later releases have it by default
        env["OWN_WEBSOCKET"] = "1"
    process = await asyncio.create_subprocess_exec(
        require("node"),
        *flags,
        str(HERE / "node.mjs"),
        stdin=PIPE,
        stdout=PIPE,
        env=env,
        limit=LINE_LIMIT_BYTES,
    )
    try:
        yield NodeRuntime(process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


class Client:
    """A client in a runtime, and what it has said and shown."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    async def start(self, url: str, sub: str, **settings: Any) -> None:
        """Connect, and wait until pokes are heard."""
        settings = {"policy": QUICK, **settings}
        await self.begin(url, sub, **settings)
        await self.wait_state("connected")

    async def begin(self, url: str, sub: str, **settings: Any) -> None:
        """Connect, and wait for nothing."""
        await self._runtime.evaluate(
            f"void harness.start({json.dumps({'url': url, 'sub': sub, **settings})})"
        )

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression where the client runs."""
        return await self._runtime.evaluate(expression)

    async def shown(self) -> Any:
        """All that was shown, in this order."""
        return await self._runtime.evaluate("harness.shown")

    async def count(self, kind: str) -> int:
        """How many events or actions of that kind there were."""
        return int(await self._runtime.evaluate(f"harness.count({json.dumps(kind)})"))

    async def steps(self) -> list[dict[str, Any]]:
        """All events and actions."""
        return list(await self._runtime.evaluate("harness.steps"))

    async def wait_state(self, state: str) -> None:
        """Wait until things stand so."""

        async def is_so() -> bool:
            return bool(await self._runtime.evaluate("harness.client.state") == state)

        await wait_until(is_so, TIMEOUT_S, f"the client being {state}")

    async def wait_shown(self, *bodies: Any) -> None:
        """Wait until exactly this was shown."""
        expected = list(bodies)

        async def is_shown() -> bool:
            return bool(await self.shown() == expected)

        try:
            await wait_until(is_shown, TIMEOUT_S)
        except TimeoutError:
            assert await self.shown() == expected
            raise

    async def wait_count(self, kind: str, at_least: int) -> None:
        """Wait until there were so many events or actions of that kind."""

        async def has_come() -> bool:
            return await self.count(kind) >= at_least

        await wait_until(has_come, TIMEOUT_S, f"{at_least} times {kind}")

    async def errors(self) -> list[str]:
        """What the ``error`` event has told."""
        return list(await self._runtime.evaluate("harness.errors.map(({ text }) => text)"))

    async def connects_before_error(self) -> int:
        """How many handshakes had begun when the first error was told."""
        return int(await self._runtime.evaluate("harness.errors[0].connects"))

    async def wait_errors(self, at_least: int) -> None:
        """Wait until so many errors were told."""

        async def are_told() -> bool:
            return len(await self.errors()) >= at_least

        await wait_until(are_told, TIMEOUT_S, f"{at_least} errors")

    async def heard(self) -> int:
        """How many reasons to pull the socket has brought: ``ready`` and pokes."""
        texts = [json.loads(step["text"]) for step in await self.steps() if step["type"] == "text"]
        return sum(text["type"] in {"ready", "poke"} for text in texts)

    async def idle(self) -> None:
        """Wait until no pull is under way: then their number is final until something is heard."""

        async def is_idle() -> bool:
            kinds = [step["type"] for step in await self.steps()]
            ended = kinds.count("pulled") + kinds.count("pull_failed")
            return kinds.count("pull") == ended

        await wait_until(is_idle, TIMEOUT_S, "the last pull's end")

    async def close(self) -> None:
        """Let go of everything."""
        await self._runtime.evaluate("harness.client.close()")


async def send(instance: Instance, sub: str, *bodies: Any) -> None:
    """Send messages, one after the other."""
    async with instance.async_http("urn:backend", "send") as http:
        for body in bodies:
            answer = await http.post("/v1/messages", json={"recipient": sub, "body": body})
            answer.raise_for_status()


async def poke(instance: Instance, sub: str) -> None:
    """Poke without a message, as a backend with data of its own would."""
    async with instance.async_http("urn:backend", "poke") as http:
        (await http.post("/v1/pokes", json={"recipient": sub})).raise_for_status()


async def pulls(instance: Instance) -> int:
    """How many pulls the instance has answered."""
    return int(
        await _metric(
            instance,
            "pokebridge_http_request_duration_seconds_count",
            'route="/v1/messages"',
            'method="GET"',
        )
    )


async def sessions(instance: Instance) -> int:
    """How many sockets the instance holds."""
    return int(await _metric(instance, "pokebridge_sessions "))


async def wait_sessions(instance: Instance, number: int) -> None:
    """Wait until the instance holds so many sockets."""

    async def are_there() -> bool:
        return await sessions(instance) == number

    await wait_until(are_there, TIMEOUT_S, f"{number} sessions")


async def _metric(instance: Instance, *parts: str) -> float:
    async with instance.async_http() as http:
        lines = (await http.get("/metrics")).text.splitlines()
    matching = (line for line in lines if line.startswith(parts[0]))
    return sum(float(line.split()[-1]) for line in matching if all(part in line for part in parts))
