"""CPU of a message from send to ack, on a real instance with each mailbox, beside other servers.

By part: the calls of a message, on connections that are kept alive. As a whole: a message is sent,
and its client receives the poke, pulls and acks. In the same rounds a bare ASGI application on
uvicorn, an httptools protocol and Node's HTTP server answer as many requests, and NATS JetStream
over WebSocket carries as many messages. Then the capacity of a server on one core, and the time
from send to client at a steady rate.

CPU is user and system time of all threads of a server. What follows a call counts as well, such as
the confirmation of its poke.
"""

import asyncio
import contextlib
import shutil
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import psutil

from benchmarks.callers import HttpConnection, request
from benchmarks.carriers import CALLERS, Carrier, Cost, Measured
from benchmarks.harness import (
    PATIENCE_S,
    SECRET,
    Figure,
    Server,
    child,
    compare,
    on_one_core,
    progress,
    tokens,
)
from benchmarks.instances import open_instance
from benchmarks.jetstream import jetstream

RATE_PER_S = 200
P50_AT_MOST_MS = 4.0
ASGI, HTTPTOOLS, NODE = "bare ASGI app on uvicorn", "httptools protocol", "Node http with HMAC"
JETSTREAM, FLUSHED_JETSTREAM = "JetStream", "JetStream with sync_interval: always"
MAILBOXES = ("memory", "SQLite", "PostgreSQL")
AT_MOST = (
    ("pull without news, memory", ASGI, 1.6),
    ("pull, 304, memory", ASGI, 1.5),
    ("pull without news, memory", NODE, 1.2),
    ("send, memory", ASGI, 2.2),
    ("ack over the socket, memory", ASGI, 0.5),
    ("whole message, memory", f"whole message, {JETSTREAM}", 2.0),
    ("whole message, SQLite", f"whole message, {FLUSHED_JETSTREAM}", 0.8),
)
"""What is compared with what, and how much of the other's CPU it may take."""


class Sizes(NamedTuple):
    """How much is measured: ``requests`` of each kind and ``messages`` in each round."""

    requests: int = 1920
    messages: int = 1920
    clients: int = 96
    rounds: int = 5
    steady_s: float = 10.0


async def measure(*, sizes: Sizes | None = None) -> list[Figure]:
    """All of it, after one round that warms up."""
    sizes = sizes or Sizes()
    async with contextlib.AsyncExitStack() as opened:
        parts: dict[str, Measured] = {}
        for name, command in _yardsticks().items():
            yardstick = _yardstick(name, command, sizes.requests)
            parts[name] = await opened.enter_async_context(yardstick)
        carriers = []
        for opening in _carriers(sizes):
            carrier = await opened.enter_async_context(opening)
            progress(f"cycle: {carrier.name} has started")
            carriers.append(carrier)
            parts |= carrier.parts()
        costs = await _rounds(parts, sizes.rounds)
        figures = [_cpu(name, taken) for name, taken in costs.items()] + _ratios(costs)
        for carrier in carriers:
            figures += await _capacity(carrier, sizes)
        return figures


async def _rounds(parts: Mapping[str, Measured], rounds: int) -> dict[str, list[Cost]]:
    costs: dict[str, list[Cost]] = {name: [] for name in parts}
    for number in range(rounds + 1):
        for name, take in parts.items():
            async with asyncio.timeout(PATIENCE_S):
                cost = await take()
            if number:
                costs[name].append(cost)
        progress(f"cycle: round {number} of {rounds}")
    return costs


def _cpu(name: str, taken: Sequence[Cost]) -> Figure:
    engines_us = median(cost.engines_us for cost in taken)
    detail = f"and {engines_us:.0f} us of PostgreSQL and NATS" if engines_us else ""
    value = median(cost.server_us for cost in taken)
    return Figure("cycle", f"CPU: {name}", value, "us", detail=detail)


def _ratios(costs: Mapping[str, Sequence[Cost]]) -> list[Figure]:
    """The comparisons of what was measured: a machine may have no Node."""
    us = {name: [cost.server_us for cost in taken] for name, taken in costs.items()}
    return [
        compare("cycle", f"{name}, to {other}", us[name], us[other], "us", at_most)
        for name, other, at_most in AT_MOST
        if name in us and other in us
    ]


# --- capacity -----------------------------------------------------------------------------------


async def _capacity(carrier: Carrier, sizes: Sizes) -> list[Figure]:
    """On one core: messages a second, and the latency at a rate that is far below."""
    progress(f"cycle: {carrier.name} on one core")
    with carrier.on_one_core():
        began_s = time.perf_counter()
        latencies_s = await carrier.carry(sizes.messages)
        per_s = len(latencies_s) / (time.perf_counter() - began_s)
        p50_ms, p99_ms = _percentiles_ms(latencies_s)
        detail = (
            f"send to client: p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms, {sizes.clients} under way"
        )
        capacity = Figure(
            "cycle", f"capacity of one core, {carrier.name}", per_s, "/s", detail=detail
        )
        p50_ms, p99_ms = _percentiles_ms(await _carry_steadily(carrier, sizes.steady_s))
    at_most = P50_AT_MOST_MS if carrier.name in MAILBOXES else None
    name = f"send to client at {RATE_PER_S} a second, {carrier.name}"
    return [
        capacity,
        Figure("cycle", f"{name}, p50", p50_ms, "ms", at_most),
        Figure("cycle", f"{name}, p99", p99_ms, "ms"),
    ]


async def _carry_steadily(carrier: Carrier, for_s: float) -> list[float]:
    """Send at a steady rate, whether or not earlier messages have arrived."""
    tasks = []
    start_s = time.perf_counter()
    for number in range(int(for_s * RATE_PER_S)):
        await asyncio.sleep(max(0.0, start_s + number / RATE_PER_S - time.perf_counter()))
        receiver = carrier.receivers[number % len(carrier.receivers)]
        tasks.append(asyncio.create_task(receiver.cycle()))
    async with asyncio.timeout(PATIENCE_S):
        return await asyncio.gather(*tasks)


def _percentiles_ms(latencies_s: Sequence[float]) -> tuple[float, float]:
    cuts = quantiles(latencies_s, n=100)
    return cuts[49] * 1e3, cuts[98] * 1e3


# --- what is measured ---------------------------------------------------------------------------


def _carriers(sizes: Sizes) -> Iterator[AbstractAsyncContextManager[Carrier]]:
    for mailbox in MAILBOXES:
        yield open_instance(mailbox, sizes.clients, sizes.requests, sizes.messages)
    for name in (JETSTREAM, FLUSHED_JETSTREAM):
        flushes_each = name == FLUSHED_JETSTREAM
        yield jetstream(name, sizes.clients, sizes.messages, flushes_each=flushes_each)


def _yardsticks() -> dict[str, tuple[str | Path, ...]]:
    program = (sys.executable, "-m", "benchmarks.yardsticks")
    commands: dict[str, tuple[str | Path, ...]] = {
        ASGI: (*program, "asgi"),
        HTTPTOOLS: (*program, "httptools"),
    }
    if node := shutil.which("node"):
        commands[NODE] = (node, Path(__file__).with_name("yardstick.cjs"), SECRET)
    else:
        progress("cycle: without Node's figure, since there is no node")
    return commands


@contextlib.asynccontextmanager
async def _yardstick(
    name: str, command: Sequence[str | Path], requests: int
) -> AsyncIterator[Measured]:
    """A server that answers everything alike: the CPU of a request."""
    pulls = [request("GET", "/v1/messages?after=7", token) for token in tokens(CALLERS)]
    async with child(name, *command) as it, contextlib.AsyncExitStack() as opened:
        port = int(await it.line())
        server = Server(port, psutil.Process(it.pid))
        callers = [HttpConnection(port) for _ in pulls]
        for caller in callers:
            opened.callback(caller.close)

        async def ask(caller: HttpConnection, pull: bytes) -> None:
            for _ in range(requests // CALLERS):
                await caller.expect(200, pull)

        async def take() -> Cost:
            with on_one_core(server):
                before_s = server.cpu_s()
                await asyncio.gather(*map(ask, callers, pulls))
                used_s = server.cpu_s() - before_s
            return Cost(used_s / (requests // CALLERS * CALLERS) * 1e6, 0.0)

        yield take
