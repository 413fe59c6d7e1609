"""Three real instances on each of three real engines, with cables between them that can be cut.

Starting nine instances takes longer than most of what is asked of them, so a module's tests share
them: each uses recipients of its own, and leaves all instances and engines running. What takes
long is done on all engines at the same time (:func:`on_each`).
"""

import asyncio
import os
import re
import secrets
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from pokebridge.telemetry import Metric
from tests.support import CutProxy, Daemon, Instance, wait_until
from tests.support.engines import run_nats, run_pubsub_emulator, run_valkey
from tests.support.forking import Completed, run_forked
from tests.support.serving import JWT_SECRET

NAMES = ("one", "two", "three")
TOPIC = "pokes"
ENGINES = {"nats": run_nats, "valkey": run_valkey, "pubsub": run_pubsub_emulator}


class Cable:
    """The connection between an instance and its engine; a thread's loop carries what flows."""

    def __init__(self, proxy: CutProxy, loop: asyncio.AbstractEventLoop) -> None:
        self._proxy = proxy
        self._loop = loop
        self.address = proxy.address

    def cut(self) -> None:
        """Let nothing through any more."""
        self._loop.call_soon_threadsafe(self._proxy.cut)

    def heal(self) -> None:
        """Let everything through again, what was held first."""
        self._loop.call_soon_threadsafe(self._proxy.heal)


class Cluster(NamedTuple):
    """An engine and the instances on it; ``project`` is the one on Pub/Sub."""

    name: str
    engine: Daemon
    project: str
    instances: Sequence[Instance]
    cables: Sequence[Cable]

    async def counts(self, *wanted: Metric) -> list[list[float]]:
        """What each instance has counted of ``wanted``."""
        return [await metrics(instance, *wanted) for instance in self.instances]


Clusters = Mapping[str, Cluster]


@pytest.fixture(scope="module")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clusters]:
    """Three instances, which share a mailbox, on each engine."""
    with ExitStack() as stack, ThreadPoolExecutor() as threads:

        def start(name: str, directory: Path) -> Cluster:
            engine = stack.enter_context(ENGINES[name](directory))
            return _start(stack, threads, name, engine, directory)

        # Not the pool in which the instances start, because it would wait for itself.
        with ThreadPoolExecutor() as starters:
            # Not in threads: two first calls of `mktemp` delete each other's directory.
            started = [
                starters.submit(start, name, tmp_path_factory.mktemp(name)) for name in ENGINES
            ]
        yield {cluster.name: cluster for each in started if (cluster := _unless_missing(each))}


def _unless_missing(started: Future[Cluster]) -> Cluster | None:
    """``None`` when its engine can't be had here; the tests that need that one say so."""
    try:
        return started.result()
    except pytest.skip.Exception:
        return None


def _start(
    stack: ExitStack, threads: ThreadPoolExecutor, name: str, engine: Daemon, directory: Path
) -> Cluster:
    project = f"test-{secrets.token_hex(4)}"
    cables = stack.enter_context(_cables(engine.port, len(NAMES)))

    def start(own_name: str, cable: Cable) -> Instance:
        schemes = {
            "nats": "nats://{}",
            "valkey": "redis://{}/0",
            "pubsub": f"pubsub://{project}/{TOPIC}",
        }
        env = os.environ | {
            "PUBSUB_EMULATOR_HOST": cable.address,
            "POKEBRIDGE_JWT_SECRET": JWT_SECRET,
            "POKEBRIDGE_TRANSPORT": schemes[name].format(cable.address),
            "POKEBRIDGE_MAILBOX": "sqlite:///shared.db",
            "POKEBRIDGE_INSTANCE": own_name,
        }
        instance = Instance(own_name, ["--dev"], env, directory)
        stack.callback(instance.kill)
        instance.start()
        return instance

    return Cluster(name, engine, project, list(threads.map(start, NAMES, cables)), cables)


@contextmanager
def _cables(port: int, count: int) -> Iterator[list[Cable]]:
    """Proxies to ``port`` in a loop of their own, as a module's fixture outlives a test's."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def call(work: Awaitable[object]) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result()  # type: ignore[arg-type]

    stack = AsyncExitStack()
    proxies = [CutProxy("127.0.0.1", port) for _ in range(count)]
    try:
        for proxy in proxies:
            call(stack.enter_async_context(proxy))
        yield [Cable(proxy, loop) for proxy in proxies]
        call(stack.aclose())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def on_each(
    clusters: Clusters, act: Callable[[Cluster], Awaitable[str]], timeout_s: float
) -> list[str]:
    """Do ``act`` on all the clusters at once; returns what each has to report, a line each."""

    async def named(cluster: Cluster) -> str:
        try:
            async with asyncio.timeout(timeout_s):
                return f"{cluster.name}: {await act(cluster)}"
        except Exception as error:
            error.add_note(f"on {cluster.name}")
            raise

    return await asyncio.gather(*map(named, clusters.values()))


async def metrics(instance: Instance, *wanted: Metric) -> list[float]:
    """What ``instance`` has counted."""
    async with instance.async_http() as http:
        text = (await http.get("/metrics")).text
    return [float(re.findall(rf"^{name} (\S+)$", text, re.MULTILINE)[0]) for name in wanted]


async def until_quiet(cluster: Cluster, pause_s: float) -> None:
    """Return when no instance has had a poke or a gap for ``pause_s``: nothing is owed any more."""
    loop = asyncio.get_running_loop()
    last, since_s = await cluster.counts(Metric.POKES, Metric.GAPS), loop.time()

    async def is_quiet() -> bool:
        nonlocal last, since_s
        if (counted := await cluster.counts(Metric.POKES, Metric.GAPS)) != last:
            last, since_s = counted, loop.time()
        return loop.time() - since_s > pause_s

    await wait_until(is_quiet, what="no pokes")


def run_command(instance: Instance, *words: str) -> Completed:
    """``pokebridge`` with the address of ``instance`` and the secret to sign its own token with."""
    environ = os.environ | {"POKEBRIDGE_URL": instance.url, "POKEBRIDGE_JWT_SECRET": JWT_SECRET}
    return run_forked(words, environ)
