"""From ``POST /v1/pokes`` to the client's frame, through a real instance.

Pokes are sent at a steady rate, whether or not earlier ones have been answered. So a slow answer
does not hide the ones behind it.
"""

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import AsyncIterator
from http import HTTPStatus
from statistics import median, quantiles

import aiohttp

from benchmarks.harness import (
    PATIENCE_S,
    SECRET,
    BenchmarkError,
    Figure,
    instance,
    progress,
    recipient,
    tokens,
    waited_s,
)
from pokebridge.tokens import sign_token

HEALTH_CHECKS = 200


async def measure(
    *, clients: int = 100, pokes_each: int = 20, rate_per_s: float = 200.0
) -> list[Figure]:
    """Send ``pokes_each`` to every one of ``clients``, one client after the other."""
    async with instance() as server, open_http(server.port) as http:
        try:
            health_ms = median([await _health_ms(http) for _ in range(HEALTH_CHECKS)])
            listeners = [
                Listener(recipient(number), await connect(http, token))
                for number, token in enumerate(tokens(clients))
            ]
            progress(f"latency: {clients * pokes_each} pokes at {rate_per_s:.0f} a second")
            pids = server.process.pid, os.getpid()
            started_s, before_s = time.monotonic(), [waited_s(pid) for pid in pids]
            await poke_all(http, listeners, pokes_each, rate_per_s)
            took_s = time.monotonic() - started_s
            ours_s, clients_s = (waited_s(pid) - s for pid, s in zip(pids, before_s, strict=True))
        except (TimeoutError, aiohttp.ClientError) as error:
            raise BenchmarkError(f"latency: {error!r}") from None
    cuts = quantiles([each for one in listeners for each in one.latencies_ms], n=100)
    name = f"POST to frame at {rate_per_s:.0f} a second"
    made_of = f"GET /healthz takes {health_ms:.1f} ms"
    waits = (
        f"of {took_s:.0f} s the instance waited {ours_s:.1f} s for a free CPU,"
        f" the clients {clients_s:.1f} s"
    )
    return [
        Figure("latency", f"{name}, p50", cuts[49], "ms", detail=made_of),
        Figure("latency", f"{name}, p99", cuts[98], "ms", detail=waits),
    ]


@contextlib.asynccontextmanager
async def open_http(port: int) -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client of the instance, without a limit on its connections."""
    async with aiohttp.ClientSession(
        f"http://127.0.0.1:{port}", connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        yield session


async def _health_ms(http: aiohttp.ClientSession) -> float:
    started_s = time.perf_counter()
    async with http.get("/healthz") as response:
        await response.read()
    return (time.perf_counter() - started_s) * 1e3


async def connect(http: aiohttp.ClientSession, token: str) -> aiohttp.ClientWebSocketResponse:
    """A session that has received ``ready``."""
    socket = await http.ws_connect("/v1/connect", headers={"Authorization": f"Bearer {token}"})
    await socket.receive()
    return socket


class Listener:
    """A client that records when its pokes arrive."""

    def __init__(self, recipient: str, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.recipient = recipient
        self.latencies_ms: list[float] = []
        self._socket = socket
        self._posted_s: deque[float] = deque()

    async def poke(self, http: aiohttp.ClientSession, headers: dict[str, str]) -> None:
        """Ask the API for a poke to this client."""
        self._posted_s.append(time.perf_counter())
        body = {"recipient": self.recipient}
        async with http.post("/v1/pokes", json=body, headers=headers) as response:
            if response.status != HTTPStatus.ACCEPTED:
                raise BenchmarkError(f"POST /v1/pokes: {response.status} {await response.text()}")

    async def listen(self, pokes: int) -> None:
        """Receive ``pokes`` pokes; each answers the oldest POST without one."""
        for _ in range(pokes):
            await self._socket.receive()
            heard_s = time.perf_counter()
            self.latencies_ms.append((heard_s - self._posted_s.popleft()) * 1e3)


async def poke_all(
    http: aiohttp.ClientSession, listeners: list[Listener], pokes_each: int, rate_per_s: float
) -> None:
    """Send so many pokes to each of ``listeners``, at a steady rate, and wait until they arrive."""
    headers = {"Authorization": f"Bearer {sign_token(SECRET, 'urn:service:bench', ['poke'])}"}
    tasks = [asyncio.create_task(one.listen(pokes_each)) for one in listeners]
    start_s = time.perf_counter()
    for number in range(pokes_each * len(listeners)):
        ahead_s = start_s + number / rate_per_s - time.perf_counter()
        await asyncio.sleep(max(0.0, ahead_s))
        one = listeners[number % len(listeners)]
        tasks.append(asyncio.create_task(one.poke(http, headers)))
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*tasks)
