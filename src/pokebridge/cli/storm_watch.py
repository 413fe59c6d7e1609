"""What happens in a storm: counted as it comes, and sampled several times a second."""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from pokebridge.cli.storm_clients import Observer, PulledMessage, StormClient
from pokebridge.cli.storm_fleet import Fleet, StormInstance

SAMPLE_S = 0.25
# Of uvloop's clock.
_CLOCK_STEP_S = 0.001
LOAD_GENERATOR = "load generator"


@dataclass(slots=True)
class Message:
    """A message on its way to ``client``, in seconds of the loop's clock; answered 202 or 200."""

    id: str
    client: StormClient
    asked_s: float
    answered_s: float | None = None
    is_heard: bool = False
    is_pulled: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """How it was at ``at_s``, and what has happened in the ``SAMPLE_S`` before."""

    at_s: float
    connected: int
    accepted: int
    refused: int
    pulls: int
    silence_s: float
    """How long the message has waited that has waited longest."""
    cpu: Mapping[str, float]
    """Cores used, by process."""
    late_s: float
    """How late the sample was taken: so much may be wrong with the times here."""


@dataclass(frozen=True, slots=True)
class PokeTime:
    """From asking for a message to hearing its poke, for a client that was not ``struck``."""

    asked_s: float
    took_s: float


@dataclass(slots=True)
class Silence:
    """The longest time from a message's answer to its pull, in seconds."""

    struck_s: float = 0.0
    others_s: float = 0.0


@dataclass(slots=True)
class _Counts:
    accepted: int = 0
    refused: int = 0
    pulls: int = 0


class Watcher(Observer):
    """Sees everything that clients and senders do."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._loop = asyncio.get_running_loop()
        self._counts = _Counts()
        self._cpu_s: dict[str, float] = {}
        self._waiting: dict[str, Message] = {}
        self.connected = 0
        self.under_way: dict[StormClient, Message] = {}
        """A client's message, at most one: so a poke can only be its."""
        self.struck: frozenset[StormClient] = frozenset()
        """The clients of the instance that was killed."""
        self.samples: list[Sample] = []
        self.poke_times: list[PokeTime] = []
        self.silence = Silence()
        self.statuses: Counter[int] = Counter()
        """Handshakes by the status that they were answered with."""
        self.accepted: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        """By instance, when each accepted handshake was asked for, and when it was answered."""

    # --- clients ----------------------------------------------------------------------------------

    def on_handshake(self, where: StormInstance, status: int, asked_s: float) -> None:
        """Count it."""
        self.statuses[status] += 1
        if status == 101:
            self._counts.accepted += 1
            self.accepted[where.name].append((asked_s, self._loop.time()))
        else:
            self._counts.refused += 1

    def on_connected(self, change: int) -> None:
        """Count it."""
        self.connected += change

    def on_poke(self, client: StormClient) -> None:
        """Time it, unless the client had been away meanwhile."""
        message = self.under_way.get(client)
        if message is not None and not message.is_heard:
            message.is_heard = True
            if client not in self.struck:
                now = self._loop.time()
                self.poke_times.append(PokeTime(message.asked_s, now - message.asked_s))

    def on_pull(self, client: StormClient, messages: list[PulledMessage]) -> None:
        """See whether it brought what was waited for."""
        self._counts.pulls += 1
        message = self.under_way.get(client)
        if message is not None and any(each.id == message.id for each in messages):
            message.is_pulled = True
            self._finish(message)

    # --- messages ---------------------------------------------------------------------------------

    def on_answered(self, message: Message) -> None:
        """It was accepted: now it is owed to its recipient."""
        message.answered_s = self._loop.time()
        self._waiting[message.id] = message
        self._finish(message)

    def on_given_up(self, message: Message) -> None:
        """It was not accepted."""
        self.under_way.pop(message.client, None)

    @property
    def owed(self) -> int:
        """Messages that were accepted and have not been pulled."""
        return len(self._waiting)

    def _finish(self, message: Message) -> None:
        """Done, once it is both answered and pulled; in either order."""
        if not message.is_pulled or message.answered_s is None:
            return
        del self._waiting[message.id], self.under_way[message.client]
        waited_s = self._loop.time() - message.answered_s
        if message.client in self.struck:
            self.silence.struck_s = max(self.silence.struck_s, waited_s)
        else:
            self.silence.others_s = max(self.silence.others_s, waited_s)

    # --- samples ----------------------------------------------------------------------------------

    async def keep_sampling(self) -> None:
        """Take samples until cancelled."""
        due_s = self._loop.time()
        await asyncio.to_thread(self._read_cpu)
        while True:
            due_s = max(due_s + SAMPLE_S, self._loop.time())
            await asyncio.sleep(due_s - self._loop.time())
            await self._fleet.check()
            self._sample(due_s, await asyncio.to_thread(self._read_cpu))

    def _sample(self, due_s: float, cpu: Mapping[str, float]) -> None:
        now = self._loop.time()
        counts, self._counts = self._counts, _Counts()
        oldest = next(iter(self._waiting.values()), None)
        silent_since_s = now if oldest is None else oldest.answered_s or now
        self.samples.append(
            Sample(
                at_s=now,
                connected=self.connected,
                accepted=counts.accepted,
                refused=counts.refused,
                pulls=counts.pulls,
                silence_s=now - silent_since_s,
                cpu=cpu,
                late_s=now - due_s,
            )
        )

    def _read_cpu(self) -> Mapping[str, float]:
        used = {each.name: cpu_s for each in self._fleet.up if (cpu_s := each.cpu_s()) is not None}
        used[LOAD_GENERATOR] = time.process_time()
        before, self._cpu_s = self._cpu_s, used
        return {
            name: max(0.0, cpu_s - before[name]) / SAMPLE_S
            for name, cpu_s in used.items()
            if name in before
        }


def most_in_a_second(handshakes: Iterable[tuple[float, float]]) -> int:
    """How many of an instance's handshakes have certainly passed within one second.

    Each is the times at which it was asked for and answered. In between, at some moment, it has
    passed; so it lies in the second from t on for every t from ``answered - 1`` to ``asked``.
    Neither a slow network nor a slow load generator can make a rate look broken that was kept.
    """
    edges: list[tuple[float, int]] = []
    for asked_s, answered_s in handshakes:
        first_s = answered_s + _CLOCK_STEP_S - 1
        if first_s <= asked_s:
            edges += [(first_s, 1), (asked_s, -1)]
    return max(accumulate(change for _, change in sorted(edges)), default=0)


def percentile(times_s: Sequence[float], share: float) -> float | None:
    """The nearest-rank percentile; ``None`` when there is nothing to rank."""
    ranked = sorted(times_s)
    return ranked[round((len(ranked) - 1) * share)] if ranked else None
