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

from tests.fuzz import borders
from tests.gateway.harness import Client
from tests.support import Daemon, Instance, wait_until
from tests.support.engines import run_nats, run_valkey
from tests.support.serving import JWT_SECRET

BORDERS = ("http", "handshakes", "frames", "nats", "redis", "tokens", "key_sets", "settings")
GROWTH_BYTES = 48 * 2**20
"""What a process may keep: buffers, caches that are bounded, and what the allocator holds back."""

Tell = Callable[[str], None]


async def run(chosen: Sequence[str], count: int, seed: int, directory: Path, tell: Tell) -> None:
    """Send ``count`` inputs to each of the ``chosen`` borders. Raises when something is wrong."""
    for border in chosen:
        began_s = time.monotonic()
        with ExitStack() as stack:
            engine = _engine(border, directory, stack)
            if border in {"http", "handshakes", "frames"} or engine is not None:
                judged = await _on_an_instance(border, count, seed, directory, engine)
            else:
                judged = await _in_this_process(border, count, seed, directory)
        took_s = time.monotonic() - began_s
        tell(f"{border}: {count} inputs, seed {seed}, {took_s:.0f} s, {judged}")


def _engine(border: str, directory: Path, stack: ExitStack) -> Daemon | None:
    starts = {"nats": run_nats, "redis": run_valkey}
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
            else:
                async with _publisher(engine) as publish:
                    await borders.signals(publish, seed + first, inputs)

        await send(0, count // 5)
        before = await asyncio.to_thread(instance.rss_bytes)
        await send(1, count - count // 5)
        await _check(instance)
        grown = await asyncio.to_thread(instance.rss_bytes) - before
    assert grown < GROWTH_BYTES, f"{border}: {grown} bytes more"
    slow_ms.sort()
    return (
        f"memory {grown / 2**20:+.1f} MB, /healthz median {slow_ms[len(slow_ms) // 2]:.0f} ms,"
        f" longest {slow_ms[-1]:.0f} ms"
    )


@asynccontextmanager
async def _instance(border: str, directory: Path, engine: Daemon | None) -> AsyncIterator[Instance]:
    settings = {
        "jwt_secret": JWT_SECRET,
        "mailbox": "memory://",
        "transport": "memory://" if engine is None else engine.url,
        "max_messages_per_recipient": 50,
    }
    env = {**os.environ, **{f"POKEBRIDGE_{k.upper()}": str(v) for k, v in settings.items()}}
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


@asynccontextmanager
async def _publisher(engine: Daemon) -> AsyncIterator[borders.PublishRaw]:
    """What publishes a body as it is."""
    if engine.url.startswith("nats"):
        connection = await nats.connect(engine.url)
        yield connection.publish
        await connection.drain()
    else:
        client: Any = redis.from_url(engine.url)
        yield client.publish
        await client.aclose()


async def _check(instance: Instance) -> None:
    """No session is left, nothing unforeseen has happened, and a poke is delivered."""
    async with instance.async_http() as http:

        async def metric(name: str) -> float:
            text = (await http.get("/metrics")).text
            return sum(
                float(each)
                for each in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
            )

        async def has_none() -> bool:
            return await metric("pokebridge_sessions") == 0

        await wait_until(has_none, what="all sessions having ended")
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
