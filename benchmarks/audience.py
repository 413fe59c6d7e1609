"""Single users beside a large audience: how long their pokes take before and while it is poked.

A real instance has both. The audience is poked ten times a second, and the users one after the
other at a steady rate. The audience is poked once with the default, at the rate of its pulls, and
once so that each poke reaches all of it.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from http import HTTPStatus
from statistics import quantiles
from typing import NamedTuple

import aiohttp

from benchmarks.harness import (
    SECRET,
    BenchmarkError,
    Figure,
    Server,
    herd,
    instance,
    progress,
    recipient,
    tokens,
    waited_s,
)
from benchmarks.latency import Listener, connect, open_http, poke_all
from pokebridge.gateway.audiences import SLICE
from pokebridge.telemetry import Metric
from pokebridge.tokens import sign_token

ROOM = "urn:group:room"
EVERY_S = 0.1
AT_MOST_MS = 20.0
# So many pulls a second that a poke to 10,000 sessions is over before the next one.
UNSPREAD_PER_S = 200_000


class _Taken(NamedTuple):
    """The latencies of single users: percentiles, and the costs while they were taken."""

    p50_ms: float
    p99_ms: float
    cpu: float
    """CPU of the instance, in cores."""
    waited: float
    """The share of the time that the instance waited for a free CPU."""


async def measure(
    *, audience: int = 10_000, users: int = 1000, rate_per_s: float = 200.0, pokes_each: int = 2
) -> list[Figure]:
    """Take the latencies of ``users`` alone, and beside ``audience`` sessions in one room."""
    figures = []
    for kind, more in (
        ("at the rate of its pulls", {}),
        ("all of it", {"audience_pulls_per_s": str(UNSPREAD_PER_S)}),
    ):
        async with instance(group_prefixes="urn:group:", **more) as server:
            before, during, pokes = await _take(server, audience, users, rate_per_s, pokes_each)
        name = f"a user's poke beside {audience:,} in one room, poked 10 times a second, {kind}"
        for label, taken, at_most in (("before", before, None), ("during", during, AT_MOST_MS)):
            made_of = (
                f"p50 {taken.p50_ms:.1f} ms; the instance used {taken.cpu:.2f} cores, and waited"
                f" {taken.waited:.0%} of the time for a free CPU"
            )
            if taken is during:
                made_of += f"; the room heard {pokes:,.0f} pokes a second"
            if taken is during and more:  # else the requests take more than the pokes
                slice_ms = SLICE * (during.cpu - before.cpu) / pokes * 1e3
                made_of += f", {SLICE} in a turn of the loop, which took {slice_ms:.2f} ms of CPU"
            figures.append(
                Figure("audience", f"{name}, p99 {label}", taken.p99_ms, "ms", at_most, made_of)
            )
    return figures


async def _take(
    server: Server, audience: int, users: int, rate_per_s: float, pokes_each: int
) -> tuple[_Taken, _Taken, float]:
    """The latencies before and during the pokes to the room, and the room's pokes a second."""
    room_token = sign_token(SECRET, ROOM)
    async with open_http(server.port) as http, herd(server.port, [room_token] * audience):
        try:
            listeners = [
                Listener(recipient(number), await connect(http, token))
                for number, token in enumerate(tokens(users))
            ]
            progress(f"audience: {users * pokes_each} pokes without the room")
            before = await _latencies(server, http, listeners, pokes_each, rate_per_s)
            delivered, started_s = await _delivered(http), time.monotonic()
            async with _poking_the_room(http):
                progress(f"audience: {users * pokes_each} pokes beside the room")
                during = await _latencies(server, http, listeners, pokes_each, rate_per_s)
                to_room = await _delivered(http) - delivered - users * pokes_each
            return before, during, to_room / (time.monotonic() - started_s)
        except (TimeoutError, aiohttp.ClientError) as error:
            raise BenchmarkError(f"audience: {error!r}") from None


async def _latencies(
    server: Server,
    http: aiohttp.ClientSession,
    listeners: list[Listener],
    pokes_each: int,
    rate_per_s: float,
) -> _Taken:
    for one in listeners:
        one.latencies_ms.clear()
    started_s = time.monotonic()
    cpu_s, waiting_s = server.cpu_s(), waited_s(server.process.pid)
    await poke_all(http, listeners, pokes_each, rate_per_s)
    took_s = time.monotonic() - started_s
    cuts = quantiles([each for one in listeners for each in one.latencies_ms], n=100)
    return _Taken(
        cuts[49],
        cuts[98],
        (server.cpu_s() - cpu_s) / took_s,
        (waited_s(server.process.pid) - waiting_s) / took_s,
    )


@contextlib.asynccontextmanager
async def _poking_the_room(http: aiohttp.ClientSession) -> AsyncIterator[None]:
    """Poke the room every EVERY_S until the block ends."""
    headers = {"Authorization": f"Bearer {sign_token(SECRET, 'urn:service:room', ['poke'])}"}

    async def poke() -> None:
        body = {"recipient": ROOM}
        async with http.post("/v1/pokes", json=body, headers=headers) as response:
            if response.status != HTTPStatus.ACCEPTED:
                raise BenchmarkError(f"POST /v1/pokes: {response.status} {await response.text()}")

    async def keep_poking() -> None:
        next_s = time.monotonic()
        while True:
            await poke()
            next_s += EVERY_S
            await asyncio.sleep(max(0.0, next_s - time.monotonic()))

    task = asyncio.create_task(keep_poking())
    yield
    if task.done():
        await task
    task.cancel()


async def _delivered(http: aiohttp.ClientSession) -> float:
    """How many pokes the instance has delivered since its start."""
    async with http.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    name = Metric.POKES_DELIVERED
    (value,) = (line.split()[-1] for line in lines if line.startswith(name))
    return float(value)
