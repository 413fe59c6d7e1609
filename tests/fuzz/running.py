"""Run the borders on real instances and engines, and judge what is left of them."""

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import nats
import psutil
import redis.asyncio as redis
from google.pubsub_v1.types import PubsubMessage

from pokebridge.transport.google_pubsub_topic import SHARD_ATTRIBUTE
from tests.fuzz import borders
from tests.gateway.harness import Client
from tests.support import Daemon, Instance, wait_until
from tests.support.engines import run_nats, run_pubsub_server, run_valkey
from tests.support.serving import JWT_SECRET
from tests.transport.pubsub_world import TOPIC, World

SIGNALS = ("nats", "redis", "pubsub")
ON_A_SOCKET = ("http", "handshakes", "frames", "waiting")
BORDERS = (
    *ON_A_SOCKET,
    *SIGNALS,
    *("ingress", "tokens", "key_sets", "settings"),
)
PROJECT, STREAM = "fuzz", "ORDERS"
MESSAGES_A_REQUEST = 250
TIMEOUT_S = 1200.0
GROWTH_BYTES = 48 * 2**20
"""What a process may keep: buffers, caches that are bounded, and what the allocator holds back."""

Tell = Callable[[str], None]


async def run(chosen: Sequence[str], count: int, seed: int, directory: Path, tell: Tell) -> None:
    """Send ``count`` inputs to each of the ``chosen`` borders. Raises when something is wrong."""
    for border in chosen:
        began_s = time.monotonic()
        with ExitStack() as stack:
            engine = _engine(border, directory, stack)
            if border in ON_A_SOCKET or engine is not None:
                judged = await _on_an_instance(border, count, seed, directory, engine)
            else:
                judged = await _in_this_process(border, count, seed, directory)
        took_s = time.monotonic() - began_s
        tell(f"{border}: {count} inputs, seed {seed}, {took_s:.0f} s, {judged}")


def _engine(border: str, directory: Path, stack: ExitStack) -> Daemon | None:
    starts = {
        "nats": run_nats,
        "redis": run_valkey,
        "pubsub": run_pubsub_server,
        "ingress": run_nats,
    }
    return stack.enter_context(starts[border](directory)) if border in starts else None


async def _in_this_process(border: str, count: int, seed: int, directory: Path) -> str:
    async def send(first: int, inputs: int) -> None:
        if border == "tokens":
            await borders.verify_tokens(seed + first, inputs)
        elif border == "key_sets":
            await borders.key_sets(seed + first, inputs)
        else:
            await asyncio.to_thread(borders.read_settings, directory, seed + first, inputs)

    await send(0, count // 5)
    before = psutil.Process().memory_info().rss
    await send(1, count - count // 5)
    grown = psutil.Process().memory_info().rss - before
    assert grown < GROWTH_BYTES, f"{border}: {grown} bytes more"
    return f"memory {grown / 2**20:+.1f} MB"


async def _on_an_instance(
    border: str, count: int, seed: int, directory: Path, engine: Daemon | None
) -> str:
    async with _instance(border, directory, engine) as instance, _watched(instance) as slow_ms:

        async def send(first: int, inputs: int) -> None:
            if engine is None:
                await getattr(borders, border)(instance, seed + first, inputs)
                return
            make = borders.ingress if border == "ingress" else borders.signals
            async with _publisher(border, engine) as publish:
                await make(publish, seed + first, inputs)

        await send(0, count // 5)
        before = await asyncio.to_thread(_memory_bytes, instance)
        await send(1, count - count // 5)
        await _check(instance, border, count)
        grown = await asyncio.to_thread(_memory_bytes, instance) - before
    assert grown < GROWTH_BYTES, f"{border}: {grown} bytes more"
    slow_ms.sort()
    return (
        f"memory {grown / 2**20:+.1f} MB, /healthz median {slow_ms[len(slow_ms) // 2]:.0f} ms,"
        f" longest {slow_ms[-1]:.0f} ms"
    )


def _memory_bytes(instance: Instance) -> int:
    """The resident memory of an instance and its workers."""
    process = psutil.Process(instance.pid)
    each = (process, *process.children(recursive=True))
    return sum(one.memory_info().rss for one in each)


@asynccontextmanager
async def _instance(border: str, directory: Path, engine: Daemon | None) -> AsyncIterator[Instance]:
    settings = {
        "jwt_secret": JWT_SECRET,
        "mailbox": "memory://",
        "max_messages_per_recipient": 50,
    }
    env = dict(os.environ)
    if engine is not None and border == "pubsub":
        env["PUBSUB_EMULATOR_HOST"] = engine.address
        settings["transport"] = f"pubsub://{PROJECT}/{TOPIC}"
    elif engine is not None and border == "ingress":
        settings["ingress"] = f"{engine.url}/{STREAM}"
        await _make_stream(engine)
    elif engine is not None:
        settings["transport"] = engine.url
    elif border == "waiting":  # workers pass these calls on, and leave sessions for a while
        settings |= {"workers": 2, "pong_timeout_s": 2}
    env |= {f"POKEBRIDGE_{k.upper()}": str(v) for k, v in settings.items()}
    instance = Instance(f"fuzz-{border}", ["--dev"], env, directory)
    await asyncio.to_thread(instance.start)
    try:
        yield instance
    finally:
        await asyncio.to_thread(instance.kill)


@asynccontextmanager
async def _watched(instance: Instance) -> AsyncIterator[list[float]]:
    """How long each ``/healthz`` took, in milliseconds."""
    took_ms: list[float] = []

    async def watch() -> None:
        async with instance.async_http() as http:
            while True:
                began_s = time.perf_counter()
                (await http.get("/healthz")).raise_for_status()
                took_ms.append((time.perf_counter() - began_s) * 1000)
                await asyncio.sleep(0.1)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(watch())
        yield took_ms
        task.cancel()


async def _make_stream(engine: Daemon) -> None:
    connection = await nats.connect(engine.url)
    await connection.jetstream().add_stream(name=STREAM, subjects=["orders"])
    await connection.close()


@asynccontextmanager
async def _publisher(border: str, engine: Daemon) -> AsyncIterator[borders.PublishRaw]:
    """What publishes a body as it is."""
    if border == "redis":
        client: Any = redis.from_url(engine.url)
        yield client.publish
        await client.aclose()
    elif border == "pubsub":
        async with World(engine.address) as world:
            publisher = PubSubPublisher(world)
            yield publisher.publish
            await publisher.flush()
    else:
        connection = await nats.connect(engine.url)
        yield connection.publish
        await connection.drain()


class PubSubPublisher:
    """Publishes many messages a request. A subject's tag becomes the attribute of a shard."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._messages: list[PubsubMessage] = []

    async def publish(self, subject: str, body: bytes) -> None:
        """Publish ``body`` sooner or later."""
        tag = subject.partition(".")[2]
        if body or tag:  # the service refuses a message without both
            attributes = {SHARD_ATTRIBUTE: tag} if tag else {}
            self._messages.append(PubsubMessage(data=body, attributes=attributes))
        if len(self._messages) == MESSAGES_A_REQUEST:
            await self.flush()

    async def flush(self) -> None:
        """Publish what was not."""
        messages, self._messages = self._messages, []
        topic = f"projects/{PROJECT}/topics/{TOPIC}"
        await self._world.publisher.publish(topic=topic, messages=messages)


async def _check(instance: Instance, border: str, count: int) -> None:
    """All is settled, nothing unforeseen has happened, and a poke is delivered."""
    async with instance.async_http() as http:

        async def metric(name: str, *labels: str) -> float:
            """The sum of a metric, or of what it is for some values of its label."""
            text = (await http.get("/metrics")).text
            wanted = f'{{\\w+="(?:{"|".join(labels)})"}}' if labels else "(?:{.*})?"
            values = re.findall(rf"^{name}{wanted} (\S+)$", text, re.MULTILINE)
            return sum(map(float, values))

        async def has_none() -> bool:
            return await metric("pokebridge_sessions") == 0

        async def has_settled_all() -> bool:
            results = ("committed", "duplicate", "refused")
            return await metric("pokebridge_ingress_messages_total", *results) >= count

        await wait_until(has_none, what="all sessions having ended")
        if border == "ingress":
            await wait_until(has_settled_all, TIMEOUT_S, "each message being settled")
        if border in SIGNALS:  # an engine may drop some
            assert await metric("pokebridge_signals_malformed_total") > count / 4
        assert await metric("pokebridge_unforeseen_inputs_total") == 0
        assert await metric("pokebridge_task_failures_total") == 0
    assert "Traceback" not in instance.log()
    client = await Client.dial(instance.port)
    bearer = f"Authorization: Bearer {instance.token('urn:user:last')}"
    assert await client.handshake(headers=(bearer,)) == 101
    assert (await client.message(60))["type"] == "ready"
    async with instance.async_http("urn:user:last", "poke") as http:
        (await http.post("/v1/pokes", json={"recipient": "urn:user:last"})).raise_for_status()
    assert (await client.message(60))["type"] == "poke"
    await client.close()
