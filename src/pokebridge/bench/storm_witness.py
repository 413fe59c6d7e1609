"""The witnesses of a storm: a few clients of instances that are not killed, in a process apart.

They time the pokes. In the process that generates the storm a poke would wait for thousands of
broken connections to be dealt with, and the instances would be blamed for it.

It is told what to do in a line of JSON on stdin, says when its clients are ready in a line on
stdout, sends messages to them until stdin ends, and then says what it has seen.
"""

import asyncio
import gc
import sys
from collections.abc import Mapping
from time import monotonic

import msgspec
import uvloop

from pokebridge.bench.storm_clients import StormClient
from pokebridge.bench.storm_fleet import Balancer, Endpoint
from pokebridge.bench.storm_sender import Sender, make_clients, start_clients
from pokebridge.bench.storm_watch import Watcher
from pokebridge.errors import UnavailableError

READY = b"ready\n"
_POLL_S = 0.05
_STRAGGLERS_S = 15.0
_TIMEOUT_S = 120.0


class Orders(msgspec.Struct, frozen=True):
    """What the witnesses do."""

    secret: str
    ports: Mapping[str, int]
    clients: int
    clients_per_s: float
    messages_per_s: float


class PokeTime(msgspec.Struct, frozen=True, array_like=True):
    """When a message was asked for, by the machine's clock, and how long its poke took then."""

    asked_s: float
    took_s: float


class Testimony(msgspec.Struct, frozen=True):
    """What the witnesses have seen."""

    sent: int
    lost: int
    poke_times: list[PokeTime]


class Witness:
    """The process of the witnesses, as the storm sees it."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it; returns when its clients are ready.

        Raises:
            UnavailableError: they did not become ready.
        """
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            __name__,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=2**26,  # the testimony is one line
        )
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None  # noqa: S101 - it was asked for
        assert stdout is not None  # noqa: S101 - it was asked for
        stdin.write(msgspec.json.encode(self._orders) + b"\n")
        if await stdout.readline() != READY:
            raise UnavailableError("the clients that time the pokes could not connect")

    async def finish(self) -> Testimony:
        """Have it stop, and say what it has seen.

        Raises:
            UnavailableError: it is gone.
        """
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise UnavailableError("the clients that time the pokes were not started")
        process.stdin.close()
        line = await process.stdout.readline()
        if not line:
            raise UnavailableError("the clients that time the pokes are gone")
        return msgspec.json.decode(line, type=Testimony)

    async def close(self) -> None:
        """End it, if it still runs."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


class _Clock(Watcher):
    """Times the pokes."""

    def __init__(self) -> None:
        super().__init__()
        self._heard: set[str] = set()
        self.poke_times: list[PokeTime] = []

    def on_poke(self, client: StormClient) -> None:
        """It can only be that of the one message that is under way."""
        message = self.under_way.get(client)
        if message is not None and message.id not in self._heard:
            self._heard.add(message.id)
            took_s = monotonic() - message.asked_s
            self.poke_times.append(PokeTime(message.asked_s, took_s))


async def _testify() -> None:
    loop = asyncio.get_running_loop()
    stdin = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    orders = msgspec.json.decode(await stdin.readline(), type=Orders)
    balancer = Balancer([Endpoint(name, port) for name, port in orders.ports.items()])
    clock = _Clock()
    clients = make_clients(orders.clients, orders.secret, balancer, clock)
    await start_clients(clients, orders.clients_per_s)
    async with asyncio.timeout(_TIMEOUT_S):
        while not all(client.caught_up for client in clients):  # noqa: ASYNC110 - as they come
            await asyncio.sleep(_POLL_S)
    # In partitioned mode some were sent to the one that will be killed: they are no witnesses.
    clients = [client for client in clients if client.where in balancer.up]
    gc.collect()
    gc.freeze()
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    sender = Sender(orders.messages_per_s, orders.secret, balancer, clock)
    sending = loop.create_task(sender.run(clients))
    await stdin.read()
    sending.cancel()
    until_s = monotonic() + _STRAGGLERS_S
    while clock.under_way and monotonic() < until_s:  # noqa: ASYNC110 - as they come
        await asyncio.sleep(_POLL_S)
    testimony = Testimony(sender.sent, clock.owed, clock.poke_times)
    sys.stdout.buffer.write(msgspec.json.encode(testimony) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    uvloop.run(_testify())
