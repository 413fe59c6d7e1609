"""Processes, the servers that they call, and when either is in trouble.

A :class:`Server` (broker, coordination store, mailbox) answers calls over a network that may be
slow or cut, or lose an answer. It does what its port promises, and no more.
"""

import asyncio
from collections.abc import Callable
from random import Random
from typing import TypeVar

from pokebridge.errors import PokebridgeError, UnavailableError
from pokebridge.model import Selection
from simulation.loop import VirtualLoop
from simulation.trace import Trace

T = TypeVar("T")

# How long a caller waits for an answer that does not come, as the deadline of a driver.
_HANG_S = (1.0, 5.0)
_REFUSAL_S = 0.02
_UNANSWERED_SHARE = 0.4


class Trouble:
    """Whether something is in trouble now, and when it last was; troubles may overlap."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._active = 0
        self._over_at = float("-inf")
        self._since = float("-inf")

    @property
    def active(self) -> bool:
        """Whether it is in trouble now."""
        return self._active > 0

    @property
    def over_at(self) -> float:
        """Since when it is out of trouble; infinity while it is in it."""
        return float("inf") if self._active else self._over_at

    @property
    def lasts_s(self) -> float:
        """How long it has been in trouble; 0 when it is not."""
        return self._loop.scheduler.now - self._since if self._active else 0.0

    def begin(self) -> None:
        """One trouble more."""
        if not self._active:
            self._since = self._loop.scheduler.now
        self._active += 1

    def end(self) -> None:
        """One trouble less."""
        self._active -= 1
        self._over_at = self._loop.scheduler.now

    def happen(self) -> None:
        """There was one just now."""
        self.begin()
        self.end()


class Peer:
    """A process as the servers know it."""

    denied: frozenset[Selection] = frozenset()
    """What the broker does not let it subscribe to."""

    def __init__(self, loop: VirtualLoop, name: str) -> None:
        self.loop = loop
        self.name = name
        self.trouble = Trouble(loop)
        """Trouble of the process itself, or of its way to the mailbox."""
        self.line = Trouble(loop)
        """Trouble of its way to the broker, which the broker reports as a gap."""


class Server:
    """What processes call over the network.

    Args:
        outside: the loop of the world that no process is in.
        name: for people.
        error: raised to callers when the server is unavailable.
        rng: decides about delays and losses.
    """

    def __init__(
        self,
        outside: VirtualLoop,
        name: str,
        error: type[UnavailableError],
        rng: Random,
        trace: Trace,
    ) -> None:
        self.outside = outside
        self.name = name
        self.rng = rng
        self.trace = trace
        self.trouble = Trouble(outside)
        self.up = True
        self.slow_s = 0.0
        """The mean of an additional delay of every answer."""
        self.forgetful = 0.0
        """The share of calls that are carried out, but answered with an error."""
        self._error = error
        self._cut: dict[Peer, None] = {}

    def cut(self, peer: Peer) -> None:
        """``peer`` can't reach it any more."""
        self._cut[peer] = None

    def heal(self, peer: Peer) -> None:
        """``peer`` can reach it again."""
        self._cut.pop(peer, None)

    def is_reached_by(self, peer: Peer) -> bool:
        """Whether a call of ``peer`` would get here."""
        return self.up and peer not in self._cut

    def latency_s(self) -> float:
        """One way through the network."""
        delay_s = self.rng.uniform(0.0005, 0.004)
        if self.rng.random() < 0.01:
            delay_s += self.rng.uniform(0.02, 0.3)
        if self.slow_s:
            delay_s += self.rng.expovariate(1 / self.slow_s)
        return delay_s

    async def call(self, peer: Peer, operation: Callable[[], T]) -> T:
        """Carry out ``operation`` here, at one instant, and return its result to the caller.

        A caller that gives up, or dies, does not cancel it.
        """
        answer: asyncio.Future[T] = peer.loop.create_future()
        self.outside.deliver(self.latency_s(), self._carry_out, peer, operation, answer)
        return await answer

    def refusal(self) -> UnavailableError:
        """The error for a caller when the server is unavailable."""
        return self._error(f"the simulated {self.name} is unavailable")

    def _carry_out(self, peer: Peer, operation: Callable[[], T], answer: asyncio.Future[T]) -> None:
        if not self.is_reached_by(peer):
            hangs = self.rng.random() < _UNANSWERED_SHARE
            delay_s = self.rng.uniform(*_HANG_S) if hangs else _REFUSAL_S
            peer.loop.deliver(delay_s, _fail, answer, self.refusal())
            return
        try:
            result = operation()
        except PokebridgeError as error:
            peer.loop.deliver(self.latency_s(), _fail, answer, error)
            return
        if self.forgetful and self.rng.random() < self.forgetful:
            peer.loop.deliver(self.rng.uniform(*_HANG_S), _fail, answer, self.refusal())
        else:
            peer.loop.deliver(self.latency_s(), _succeed, answer, result)


def _succeed(answer: asyncio.Future[T], result: T) -> None:
    if not answer.done():
        answer.set_result(result)


def _fail(answer: asyncio.Future[T], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
