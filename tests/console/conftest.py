"""Three instances that the console's tests share, and a browser page that may not complain."""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import websockets
from playwright.async_api import Browser, Page, Request

from pokebridge.sharding import shard_of
from tests.support import Daemon, Instance, wait_until
from tests.support.engines import run_nats
from tests.support.serving import JWT_SECRET

NAMES = ("one", "two", "three")
WITH_WORKERS, WORKERS = "three", 2
SHARDS = 60
RED_LINE = 150


@dataclass
class Trio:
    """Instances on NATS; each test finds them all up, in fan-out and settled."""

    instances: Mapping[str, Instance]
    nats: Daemon
    mailbox: Path
    """The file that they share."""

    @property
    def one(self) -> Instance:
        """The one that the console is opened on."""
        return self.instances["one"]

    async def admin_token(self) -> str:
        """What an operator signs in with whose shard is another instance's, once partitioned."""
        owned = next(
            each["shards"] for each in (await self.view())["instances"] if each["id"] == "one"
        )
        subjects = (f"urn:user:operator-{number}" for number in itertools.count())
        elsewhere = next(each for each in subjects if shard_of(each, SHARDS) not in owned)
        return self.one.token(elsewhere, "admin poke")

    async def view(self) -> Any:
        """The cluster as the first instance sees it."""
        async with self.one.async_http("urn:user:test", "admin") as http:
            return (await http.get("/v1/cluster")).json()

    async def migrate(self, mode: str) -> None:
        """Have the cluster change its mode, and wait until it has."""
        async with self.one.async_http("urn:user:test", "admin") as http:
            answer = await http.put("/v1/cluster/mode", json={"mode": mode, "force": True})
            assert answer.status_code == 202
        await self.settled(mode)

    async def settled(self, mode: str = "fanout") -> None:
        """Return when all three are active, and hold what an even map gives them."""

        async def is_settled() -> bool:
            view = await self.view()
            members = view["instances"]
            return view["mode"] == mode and all(
                len(members) == len(NAMES)
                and each["state"] == "active"
                and each["settled"]
                and each["epoch"] == view["epoch"]
                and len(each["shards"]) == SHARDS // len(NAMES)
                for each in members
            )

        await wait_until(is_settled, 20, f"three instances, {mode}")

    async def restore(self) -> None:
        """Undo what a test did."""
        for instance in self.instances.values():
            if not instance.is_running():
                await asyncio.to_thread(instance.start)
        view = await self.view()
        for each in view["instances"]:
            if each["state"] != "active":
                await asyncio.to_thread(self.instances[each["id"]].restart)
        if view["mode"] != "fanout":
            await self.migrate("fanout")
        await self.settled()

    @asynccontextmanager
    async def sessions(self, recipients: Sequence[str]) -> AsyncIterator[None]:
        """A session of each at one of the instances, in turn; it reads, and comes back."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(_listen(self.instances[NAMES[number % len(NAMES)]], recipient))
                for number, recipient in enumerate(recipients)
            ]
            yield
            for task in tasks:
                task.cancel()

    async def poke(self, recipients: Sequence[str]) -> None:
        """Publish a poke for each, each a signal of its own."""
        async with self.one.async_http("urn:user:backend", "poke") as http:
            await http.post("/v1/pokes", json={"recipients": list(recipients)})


async def _listen(instance: Instance, recipient: str) -> None:
    url = instance.ws_url + "?moved=1"
    async for socket in websockets.connect(url, additional_headers=instance.headers(recipient)):
        with suppress(websockets.ConnectionClosed):
            async for _ in socket:
                pass


@pytest.fixture(scope="module")
def shared_trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    """The three, for all tests of a module."""
    with ExitStack() as opened, ThreadPoolExecutor(len(NAMES)) as threads:
        yield start_trio(tmp_path_factory.mktemp("trio"), opened, threads)


def start_trio(directory: Path, opened: ExitStack, threads: ThreadPoolExecutor) -> Trio:
    """NATS and the three on it; ``opened`` stops them all."""
    (directory / "nats").mkdir()
    nats = opened.enter_context(run_nats(directory / "nats"))
    starts = [threads.submit(_start, name, nats.url, directory, opened) for name in NAMES]
    instances = {name: start.result() for name, start in zip(NAMES, starts, strict=True)}
    return Trio(instances, nats, directory / "shared.db")


def _start(name: str, nats_url: str, directory: Path, opened: ExitStack) -> Instance:
    settings = {
        "jwt_secret": JWT_SECRET,
        "transport": nats_url,
        "coordination": nats_url,
        "mailbox": "sqlite:///shared.db",
        "cluster": "console",
        "instance": name,
        "shard_count": SHARDS,
        "lease_s": 1,
        "verify_every_s": 1,
        "red_line_ops_per_s": RED_LINE,
        "drain_s": 0.2,
        "workers": WORKERS if name == WITH_WORKERS else 1,
    }
    env = os.environ | {f"POKEBRIDGE_{key.upper()}": str(value) for key, value in settings.items()}
    instance = Instance(name, ["--dev"], env, directory)
    opened.callback(instance.kill)
    instance.start()
    return instance


@pytest_asyncio.fixture(loop_scope="session")
async def trio(shared_trio: Trio) -> AsyncIterator[Trio]:
    """The three, settled in fan-out, and so again afterwards."""
    await shared_trio.settled()
    yield shared_trio
    await shared_trio.restore()


@dataclass
class Complaints:
    """What a page did that it should not."""

    lines: list[str]
    urls: list[str]

    def listen(self, page: Page) -> None:
        """Note errors, refusals of the content policy among them, and all that is asked for."""
        page.on("pageerror", lambda error: self.lines.append(str(error)))
        page.on(
            "console", lambda line: self.lines.append(line.text) if line.type == "error" else None
        )
        page.on("request", self._note)
        page.on("websocket", lambda socket: self.urls.append(socket.url))

    def forget(self, text: str) -> None:
        """Drop the lines with ``text``, which only Chromium writes."""
        self.lines = [line for line in self.lines if text not in line]

    def _note(self, request: Request) -> None:
        self.urls.append(request.url)


@pytest.fixture
def complaints() -> Complaints:
    """Nothing so far."""
    return Complaints([], [])


@pytest_asyncio.fixture(loop_scope="session")
async def page(browser: Browser, complaints: Complaints) -> Page:
    """An empty page, 1280 px wide, in a profile of its own."""
    context = await browser.new_context(viewport={"width": 1280, "height": 900})
    page = await context.new_page()
    complaints.listen(page)
    return page
