"""The probe of a storm: a process whose few clients time pokes on the instances that survive.

It is a process of its own because the process that generates the storm is busy with thousands of
broken connections. A poke would wait there, and the instances would be blamed for it.

The probe reads its :class:`ProbeConfig` from stdin, in a line of JSON. It writes a line to stdout
when its clients are ready, sends messages to them until stdin ends, and then writes its
:class:`ProbeResult` in another line.
"""

import asyncio
import gc
import sys
from collections.abc import Mapping
from time import monotonic

import msgspec
import uvloop

from pokebridge.bench.clients import StormClient
from pokebridge.bench.fleet import Balancer, Endpoint
from pokebridge.bench.traffic import Sender, Watcher, make_clients, start_clients
from pokebridge.errors import UnavailableError

READY = b"ready\n"
_POLL_S = 0.05
_STRAGGLERS_S = 15.0
_TIMEOUT_S = 120.0


class ProbeConfig(msgspec.Struct, frozen=True):
    """What the probe does: ``ports`` are the instances that survive, by name."""

    secret: str
    ports: Mapping[str, int]
    clients: int
    clients_per_s: float
    messages_per_s: float


class PokeTime(msgspec.Struct, frozen=True, array_like=True):
    """When a message was sent, on the monotonic clock, and how long its poke took; in seconds."""

    asked_s: float
    took_s: float


class ProbeResult(msgspec.Struct, frozen=True):
    """What the probe measured: ``lost`` messages were accepted and never pulled."""

    sent: int
    lost: int
    poke_times: list[PokeTime]


class Probe:
    """Starts and ends the process of the probe."""

    def __init__(self, config: ProbeConfig) -> None:
        self._config = config
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the process; returns when its clients are ready.

        Raises:
            UnavailableError: its clients could not connect.
        """
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            __name__,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=2**26,  # the result is one line
        )
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None  # noqa: S101 - it was asked for
        assert stdout is not None  # noqa: S101 - it was asked for
        stdin.write(msgspec.json.encode(self._config) + b"\n")
        if await stdout.readline() != READY:
            raise UnavailableError("the probe could not connect its clients to the instances")

    async def finish(self) -> ProbeResult:
        """Let the probe stop, and return what it measured.

        Raises:
            UnavailableError: the process has ended.
        """
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise UnavailableError("the probe was not started: await start() first")
        process.stdin.close()
        line = await process.stdout.readline()
        if not line:
            raise UnavailableError("the process of the probe ended before it reported a result")
        return msgspec.json.decode(line, type=ProbeResult)

    async def close(self) -> None:
        """Kill the process if it still runs."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


class _Clock(Watcher):
    """A watcher that also times pokes."""

    def __init__(self) -> None:
        super().__init__()
        self._heard: set[str] = set()
        self.poke_times: list[PokeTime] = []

    def on_poke(self, client: StormClient) -> None:
        """Time the poke: a client has at most one message under way."""
        message = self.under_way.get(client)
        if message is not None and message.id not in self._heard:
            self._heard.add(message.id)
            took_s = monotonic() - message.asked_s
            self.poke_times.append(PokeTime(message.asked_s, took_s))


async def _run_probe() -> None:
    loop = asyncio.get_running_loop()
    stdin = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    config = msgspec.json.decode(await stdin.readline(), type=ProbeConfig)
    balancer = Balancer([Endpoint(name, port) for name, port in config.ports.items()])
    clock = _Clock()
    clients = make_clients(config.clients, config.secret, balancer, clock)
    await start_clients(clients, config.clients_per_s)
    async with asyncio.timeout(_TIMEOUT_S):
        while not all(client.caught_up for client in clients):  # noqa: ASYNC110 - as they come
            await asyncio.sleep(_POLL_S)
    # In partitioned mode some were moved to the instance that will be killed: leave them out.
    clients = [client for client in clients if client.where in balancer.up]
    gc.collect()
    gc.freeze()
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    sender = Sender(config.messages_per_s, config.secret, balancer, clock)
    sending = loop.create_task(sender.run(clients))
    await stdin.read()
    sending.cancel()
    until_s = monotonic() + _STRAGGLERS_S
    while clock.under_way and monotonic() < until_s:  # noqa: ASYNC110 - as they come
        await asyncio.sleep(_POLL_S)
    probe_result = ProbeResult(sender.sent, clock.owed, clock.poke_times)
    sys.stdout.buffer.write(msgspec.json.encode(probe_result) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    uvloop.run(_run_probe())
