"""A process that carries messages from a sender to clients, and its clients, for ``cycle``."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from benchmarks.harness import Server, on_one_core, quiet

CALLERS = 32
"""Connections on which requests are made, each when the last is answered."""


class Cost(NamedTuple):
    """CPU of a request or a message in µs; the CPU of the engines is separate."""

    server_us: float
    engines_us: float


Measured = Callable[[], Awaitable[Cost]]


class Receiver(Protocol):
    """A client that hears of a message, fetches it and acknowledges it."""

    async def cycle(self) -> float:
        """Send it a message, and wait until it has acknowledged it.

        Returns the seconds from the send until the client heard of it.
        """


class Carrier:
    """A server that carries messages, and its clients.

    - ``name``: how the table calls it
    - ``server``: its process
    - ``engines``: those of the engines that it uses, a database for example
    - ``receivers``: its clients
    - ``_messages``: how many are carried in a round
    """

    def __init__(
        self,
        name: str,
        server: Server,
        receivers: Sequence[Receiver],
        messages: int,
        engines: Sequence[Server] = (),
    ) -> None:
        self.name = name
        self.server = server
        self.engines = engines
        self.receivers = receivers
        self._messages = messages

    def on_one_core(self) -> AbstractContextManager[None]:
        """Give the server one core for itself."""
        return on_one_core(self.server, self.engines)

    def parts(self) -> dict[str, Measured]:
        """What is measured in every round, in this order, by name."""
        return {f"whole message, {self.name}": self._carry_all}

    async def carry(self, messages: int) -> list[float]:
        """Send ``messages``, with one under way for each client; the latencies in seconds."""
        each = messages // len(self.receivers)

        async def send_some(receiver: Receiver) -> list[float]:
            return [await receiver.cycle() for _ in range(each)]

        return list(itertools.chain(*await asyncio.gather(*map(send_some, self.receivers))))

    async def cost(self, work: Callable[[], Awaitable[int]]) -> Cost:
        """CPU of ``work``, which returns its amount, and of everything that follows it."""
        with self.on_one_core():
            server_s, engines_s = self._cpu_s()
            count = await work()
            await quiet(self.server)
            server_after_s, engines_after_s = self._cpu_s()
        each_us = 1e6 / count
        return Cost((server_after_s - server_s) * each_us, (engines_after_s - engines_s) * each_us)

    def _cpu_s(self) -> tuple[float, float]:
        return self.server.cpu_s(), sum(engine.cpu_s() for engine in self.engines)

    async def _carry_all(self) -> Cost:
        async def work() -> int:
            return len(await self.carry(self._messages))

        return await self.cost(work)
