"""From ``POST /v1/messages`` to the message at its recipient: by a call that waits, by a socket.

Half of the clients hear a poke and pull, the other half have a pull that waits, and the next when
it is answered. They get messages in turn at a steady rate, so both halves see the same machine.
"""

import asyncio
import time
from collections import deque
from contextlib import ExitStack
from statistics import median

import msgspec

from benchmarks.callers import HttpConnection, Socket, request
from benchmarks.harness import (
    PATIENCE_S,
    SECRET,
    BenchmarkError,
    Figure,
    instance,
    progress,
    recipient,
)
from pokebridge.tokens import sign_token

AT_MOST_MS = 3.0


async def measure(
    *, clients: int = 100, messages_each: int = 20, rate_per_s: float = 200.0
) -> list[Figure]:
    """Send ``messages_each`` to every one of ``clients``, one client after the other."""
    async with instance(max_connections_per_address="0") as server:
        with ExitStack() as opened:
            receivers: list[_Receiver] = []
            for number in range(clients):
                http = HttpConnection(server.port)
                opened.callback(http.close)
                if number % 2:
                    receivers.append(_Receiver(number, http))
                else:
                    socket = await Socket(server.port).shake_hands(_token(number))
                    opened.callback(socket.close)
                    receivers.append(_Poked(number, http, socket))
            progress(f"polling: {clients * messages_each} messages at {rate_per_s:.0f} a second")
            try:
                await _send_all(server.port, receivers, messages_each, rate_per_s)
            except (TimeoutError, OSError) as error:
                raise BenchmarkError(f"polling: {error!r}") from None
    poked_ms, waited_ms = (
        median(ms for each in half for ms in each.latencies_ms)
        for half in (receivers[::2], receivers[1::2])
    )
    name = "POST to a call that waits, p50 beyond a socket's"
    made_of = f"{waited_ms:.1f} to {poked_ms:.1f} ms"
    return [Figure("polling", name, waited_ms - poked_ms, "ms", AT_MOST_MS, made_of)]


def _token(number: int) -> str:
    return sign_token(SECRET, recipient(number))


class _Receiver:
    """A client whose pulls wait for the next message.

    - ``latencies_ms``: from the POST of each message until it was here
    """

    def __init__(self, number: int, http: HttpConnection) -> None:
        self.latencies_ms: list[float] = []
        self._name = recipient(number)
        self._http = http
        self._version = 0
        self._posted_s: deque[float] = deque()
        self._token = _token(number)

    async def send(self, sender: HttpConnection, token: str) -> None:
        """Have ``sender`` send a message to this client."""
        self._posted_s.append(time.perf_counter())
        body = {"recipient": self._name, "body": "hello"}
        await sender.expect(202, request("POST", "/v1/messages", token, body))

    async def receive(self, messages: int) -> None:
        """Return when so many messages are here."""
        while len(self.latencies_ms) < messages:
            await self._pull("&wait_s=30")

    async def _pull(self, waits: str = "") -> None:
        path = f"/v1/messages?after={self._version}{waits}"
        answer = await self._http.expect(200, request("GET", path, self._token))
        arrived_s = time.perf_counter()
        page = msgspec.json.decode(answer.body)
        self._version = page["version"]
        for _ in page["messages"]:
            self.latencies_ms.append((arrived_s - self._posted_s.popleft()) * 1e3)


class _Poked(_Receiver):
    """A client that sleeps on a socket, and pulls when it is poked."""

    def __init__(self, number: int, http: HttpConnection, socket: Socket) -> None:
        super().__init__(number, http)
        self._poked = asyncio.Event()
        socket.on_text = self._on_text

    async def receive(self, messages: int) -> None:
        """Return when so many messages are here."""
        while len(self.latencies_ms) < messages:
            await self._poked.wait()
            self._poked.clear()
            await self._pull()

    def _on_text(self, text: bytes) -> None:
        if b'"poke"' in text:
            self._poked.set()


async def _send_all(
    port: int, receivers: list[_Receiver], messages_each: int, rate_per_s: float
) -> None:
    token = sign_token(SECRET, "urn:service:bench", ["send"])
    idle: asyncio.LifoQueue[HttpConnection] = asyncio.LifoQueue()

    async def send(receiver: _Receiver) -> None:
        sender = HttpConnection(port) if idle.empty() else idle.get_nowait()
        await receiver.send(sender, token)
        idle.put_nowait(sender)

    tasks = [asyncio.create_task(each.receive(messages_each)) for each in receivers]
    start_s = time.perf_counter()
    for number in range(messages_each * len(receivers)):
        ahead_s = start_s + number / rate_per_s - time.perf_counter()
        await asyncio.sleep(max(0.0, ahead_s))
        tasks.append(asyncio.create_task(send(receivers[number % len(receivers)])))
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*tasks)
    while not idle.empty():
        idle.get_nowait().close()
