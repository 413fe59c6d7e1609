"""One host with two workers, beside one process that serves alone (docs/cores.md).

Memory of a session, CPU of a handshake and of a poke for another instance: all processes of the
host together. The capacity of the whole message: CPU of the process that uses most of it, since
that one is the first to fill its core. For this all processes of a host share one core, which is
busy all the time, because a process that finds more to do in a turn needs less for each message.
Memory is measured with as many sessions on one port as two processes can open, and half of that.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

import httpx
from nats.aio.client import Client as NatsClient

from benchmarks.callers import HttpConnection, request
from benchmarks.carriers import Carrier
from benchmarks.harness import (
    PATIENCE_S,
    SECRET,
    BenchmarkError,
    Figure,
    Herd,
    Server,
    compare,
    connect_and_leave,
    instance,
    progress,
    quiet,
    recipient,
    tokens,
)
from benchmarks.instances import open_instance
from benchmarks.memory import growth_kb
from benchmarks.transports import run_engine
from pokebridge.model import Poke
from pokebridge.tokens import sign_token
from pokebridge.wire import encode_pokes

WORKERS = "2"
MEMORY_AT_MOST_KB = 2.57
"""1.1 times what a session of the single process took before there were workers."""
FOREIGN_POKE_AT_MOST = 1.1
CAPACITY_AT_LEAST = 1.7
UNEVEN_AT_MOST = 10.0
MAILBOXES = ("memory", "SQLite", "PostgreSQL")
_AT_ONCE = 500
_NOBODY = 500_000  # the recipients from this number on have no sessions
_POKES_A_CALL = 1000
_POKES = re.compile(r"^pokebridge_pokes_total (\S+)$", re.MULTILINE)
_SESSIONS = re.compile(r'^pokebridge_worker_sessions\{worker="\d+"\} (\S+)$', re.MULTILINE)


_Pair = tuple[list[float], list[float]]
"""The results of the rounds, with workers and with one process."""


class Sizes(NamedTuple):
    """How much is measured, in each round where there are rounds."""

    sessions: Sequence[int] = (9_000, 9_000)
    warm_up: int = 300
    handshakes: int = 2000
    signals: int = 10_000
    messages: int = 1920
    listeners: int = 96
    rounds: int = 5
    crowd: Sequence[int] = (10_000, 14_000, 14_000)
    """The sessions of the host: the clients of each process that has clients. ``sessions`` are
    those of one process."""


async def measure(*, sizes: Sizes | None = None) -> list[Figure]:
    """All of it."""
    sizes = sizes or Sizes()
    figures = await _handshakes_and_noise(sizes)
    for mailbox in MAILBOXES:
        figures += await _capacity(mailbox, sizes)
    return figures + await crowd(sizes)


def _compare(name: str, pair: _Pair, unit: str, at_most: float | None = None) -> Figure:
    return compare("workers", f"{name}, to one process", *pair, unit, at_most)


# --- CPU of the host ------------------------------------------------------------------------------


async def _handshakes_and_noise(sizes: Sizes) -> list[Figure]:
    handshakes: _Pair = ([], [])
    pokes: _Pair = ([], [])
    async with (
        run_engine("nats") as url,
        instance(transport=url) as alone,
        instance(transport=url, workers=WORKERS) as host,
        _publisher(url) as nats,
    ):
        hosts = (host, alone)
        for number in range(sizes.rounds + 1):  # the first warms up
            bearers = tokens(sizes.handshakes, first=number * sizes.handshakes)
            used_s = [await connect_and_leave(server, bearers) for server in hosts]
            noise_s = await _foreign_pokes(nats, hosts, sizes.signals)
            if number:
                for each, taken in zip(handshakes, used_s, strict=True):
                    each.append(taken / sizes.handshakes * 1e6)
                for each, taken in zip(pokes, noise_s, strict=True):
                    each.append(taken / sizes.signals * 1e6)
            progress(f"workers: round {number} of {sizes.rounds}")
    return [
        _compare("CPU of 1,000 handshakes", handshakes, "ms"),
        _compare("CPU of a foreign poke", pokes, "us", FOREIGN_POKE_AT_MOST),
    ]


@contextlib.asynccontextmanager
async def _publisher(url: str) -> AsyncIterator[NatsClient]:
    client = NatsClient()
    await client.connect(url)
    try:
        yield client
    finally:
        await client.close()


async def _foreign_pokes(
    nats: NatsClient, hosts: Sequence[Server], signals: int
) -> Sequence[float]:
    """Publish ``signals`` for nobody's sessions. Returns the CPU seconds that each host took."""
    seen = [await _pokes(server.port) for server in hosts]
    await _rest(hosts)
    before_s = [server.cpu_s() for server in hosts]
    for number in range(signals):
        poke = Poke(recipient(_NOBODY + number), 1)
        await nats.publish("push-notifications.7", encode_pokes([poke]))
        if number % _AT_ONCE == 0:
            await nats.flush()
    await nats.flush()
    await _rest(hosts)
    used_s = [server.cpu_s() - s for server, s in zip(hosts, before_s, strict=True)]
    for server, count in zip(hosts, seen, strict=True):
        if await _pokes(server.port) != count + signals:
            raise BenchmarkError("a foreign poke was lost, or has not arrived yet")
    return used_s


async def _rest(hosts: Sequence[Server]) -> None:
    for server in hosts:
        await quiet(server)


async def _pokes(port: int) -> float:
    """How many pokes the signals carried so far."""
    (count,) = await _metric(port, _POKES)
    return count


async def _metric(port: int, sample: re.Pattern[str]) -> list[float]:
    """The values of the samples that match."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
        text = (await http.get("/metrics", timeout=PATIENCE_S)).text
    return [float(value) for value in sample.findall(text)]


# --- capacity -------------------------------------------------------------------------------------


async def _capacity(mailbox: str, sizes: Sizes) -> list[Figure]:
    """How many whole messages a second fit, where every process may have a core."""
    busiest: _Pair = ([], [])
    together: _Pair = ([], [])
    size = (sizes.listeners, sizes.messages, sizes.messages)
    async with (
        open_instance(mailbox, *size, workers=WORKERS) as host,
        open_instance(mailbox, *size) as alone,
    ):
        for number in range(sizes.rounds + 1):  # the first warms up
            for index, carrier in enumerate((host, alone)):
                with carrier.on_one_core():
                    used_us = await _cpu_us(carrier, sizes.messages)
                if number:
                    busiest[index].append(max(used_us))
                    together[index].append(sum(used_us))
        progress(f"workers: capacity with {mailbox}")
    name = f"CPU of a whole message, {mailbox}"
    return [
        _compare(f"{name}, the busiest process", busiest, "us", round(1 / CAPACITY_AT_LEAST, 2)),
        _compare(f"{name}, all processes", together, "us"),
    ]


async def _cpu_us(carrier: Carrier, messages: int) -> list[float]:
    """CPU of each process for a message, in µs."""
    before_s = carrier.server.cpu_s_by_process()
    async with asyncio.timeout(PATIENCE_S):
        count = len(await carrier.carry(messages))
    await quiet(carrier.server)
    after_s = carrier.server.cpu_s_by_process()
    return [(after_s[pid] - used_s) / count * 1e6 for pid, used_s in before_s.items()]


# --- one port -------------------------------------------------------------------------------------


async def crowd(sizes: Sizes) -> list[Figure]:
    """Fill a host, and poke each session. Returns how even they are, and what they weigh.

    Raises:
        BenchmarkError: a session or a poke is missing.
    """
    alone_kb = await growth_kb(instance(), sizes.sessions, sizes.warm_up)
    progress(f"workers: {sum(sizes.sessions):,} sessions of one process")
    figures = []

    async def look(host: Server, herds: Sequence[Herd]) -> None:
        total = sum(sizes.crowd[: len(herds)])
        sessions = await _metric(host.port, _SESSIONS)
        if sum(sessions) != total:
            raise BenchmarkError(f"{sessions} sessions are open where {total} are connected")
        progress(f"workers: {total:,} sessions on one port")
        figures.append(_evenness(total, sessions))
        if len(herds) == len(sizes.crowd):
            await _poke_all(host.port, total)
            for each, count in zip(herds, sizes.crowd, strict=True):
                await each.hear(count)

    host_kb = await growth_kb(instance(workers=WORKERS), sizes.crowd, sizes.warm_up, look)
    name = f"RSS of an idle session, at {sum(sizes.crowd):,}"
    detail = f"{host_kb / alone_kb:.2f} times one process with {sum(sizes.sessions):,}"
    return [*figures, Figure("workers", name, host_kb, "KB", MEMORY_AT_MOST_KB, detail)]


def _evenness(total: int, sessions: Sequence[float]) -> Figure:
    uneven = (max(sessions) - min(sessions)) / (total / int(WORKERS)) * 100
    detail = " + ".join(f"{each:,.0f}" for each in sessions)
    return Figure(
        "workers", f"unevenness of {total:,} sessions", uneven, "%", UNEVEN_AT_MOST, detail
    )


async def _poke_all(port: int, recipients: int) -> None:
    token = sign_token(SECRET, "urn:service:bench", ["poke"])
    connection = HttpConnection(port)
    for first in range(0, recipients, _POKES_A_CALL):
        names = [recipient(n) for n in range(first, min(first + _POKES_A_CALL, recipients))]
        body = {"recipients": names}
        await connection.expect(202, request("POST", "/v1/pokes", token, body))
    connection.close()
