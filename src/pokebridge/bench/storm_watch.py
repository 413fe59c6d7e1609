"""What happens in a storm: counted as it comes, and sampled several times a second."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from time import monotonic, process_time

from pokebridge.bench.storm_clients import Observer, PulledMessage, StormClient
from pokebridge.bench.storm_fleet import Endpoint, Fleet

SAMPLE_S = 0.25
LOAD_GENERATOR = "load generator"


@dataclass(slots=True)
class Message:
    """A message on its way to ``client``; times in seconds of the monotonic clock."""

    id: str
    client: StormClient
    asked_s: float
    answered_s: float | None = None
    """When it was accepted: from then on it is owed."""
    is_pulled: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """How it was at ``at_s``, and what has happened since the last sample."""

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


@dataclass(slots=True)
class Silence:
    """The longest time from a message's answer to its pull, in seconds."""

    struck_s: float = 0.0
    others_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Counts:
    accepted: int
    refused: int
    pulls: int


class Watcher(Observer):
    """Sees everything that clients and senders do."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[str, Message] = {}
        self.connected = 0
        self.pulls = 0
        self.under_way: dict[StormClient, Message] = {}
        """A client's message, at most one: so a poke can only be its."""
        self.struck: frozenset[StormClient] = frozenset()
        """The clients of the instance that was killed."""
        self.silence = Silence()
        self.statuses: Counter[int] = Counter()
        """Handshakes by the status that they were answered with."""
        self.accepted: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        """By instance, when each accepted handshake was asked for, and when it was answered."""

    # --- clients ----------------------------------------------------------------------------------

    def on_handshake(self, where: Endpoint, status: int, asked_s: float) -> None:
        """Count it."""
        self.statuses[status] += 1
        if status == 101:
            self.accepted[where.name].append((asked_s, monotonic()))

    def on_connected(self, change: int) -> None:
        """Count it."""
        self.connected += change

    def on_pull(self, client: StormClient, messages: list[PulledMessage]) -> None:
        """See whether it brought what was waited for."""
        self.pulls += 1
        message = self.under_way.get(client)
        if message is not None and any(each.id == message.id for each in messages):
            message.is_pulled = True
            self._finish(message)

    # --- messages ---------------------------------------------------------------------------------

    def on_answered(self, message: Message) -> None:
        """It was accepted: now it is owed to its recipient."""
        message.answered_s = monotonic()
        self._waiting[message.id] = message
        self._finish(message)

    def on_given_up(self, message: Message) -> None:
        """It was not accepted."""
        self.under_way.pop(message.client, None)

    @property
    def owed(self) -> int:
        """Messages that were accepted and have not been pulled."""
        return len(self._waiting)

    def waiting_since_s(self) -> float | None:
        """When that message was answered that has waited longest; ``None``: none waits."""
        oldest = next(iter(self._waiting.values()), None)
        return None if oldest is None else oldest.answered_s

    def _finish(self, message: Message) -> None:
        """Done, once it is both answered and pulled; in either order."""
        if not message.is_pulled or message.answered_s is None:
            return
        del self._waiting[message.id], self.under_way[message.client]
        waited_s = monotonic() - message.answered_s
        if message.client in self.struck:
            self.silence.struck_s = max(self.silence.struck_s, waited_s)
        else:
            self.silence.others_s = max(self.silence.others_s, waited_s)


class Sampler:
    """Takes a :class:`Sample` of what ``watcher`` sees, several times a second."""

    def __init__(self, watcher: Watcher, fleet: Fleet) -> None:
        self._watcher = watcher
        self._fleet = fleet
        self._loop = asyncio.get_running_loop()
        self._counts = self._count()
        self._cpu_s: dict[str, float] = {}
        self._cpu_read_s = 0.0
        self.samples: list[Sample] = []

    async def run(self) -> None:
        """Take samples until cancelled.

        Raises:
            UnavailableError: an instance has ended that was not killed.
        """
        due_s = monotonic()
        await asyncio.to_thread(self._read_cpu)
        while True:
            due_s = max(due_s + SAMPLE_S, monotonic())
            await asyncio.sleep(due_s - monotonic())
            await self._fleet.check()
            self._sample(due_s, await asyncio.to_thread(self._read_cpu))

    def _count(self) -> _Counts:
        statuses = self._watcher.statuses
        accepted = statuses[101]
        return _Counts(accepted, statuses.total() - accepted, self._watcher.pulls)

    def _sample(self, due_s: float, cpu: Mapping[str, float]) -> None:
        now = monotonic()
        before, self._counts = self._counts, self._count()
        silent_since_s = self._watcher.waiting_since_s()
        self.samples.append(
            Sample(
                at_s=now,
                connected=self._watcher.connected,
                accepted=self._counts.accepted - before.accepted,
                refused=self._counts.refused - before.refused,
                pulls=self._counts.pulls - before.pulls,
                silence_s=0.0 if silent_since_s is None else now - silent_since_s,
                cpu=cpu,
                late_s=now - due_s,
            )
        )

    def _read_cpu(self) -> Mapping[str, float]:
        instances = self._fleet.instances
        used = {each.name: cpu_s for each in instances if (cpu_s := each.cpu_s()) is not None}
        used[LOAD_GENERATOR] = process_time()
        before, self._cpu_s = self._cpu_s, used
        since_s, self._cpu_read_s = self._cpu_read_s, monotonic()
        return {
            name: max(0.0, cpu_s - before[name]) / (self._cpu_read_s - since_s)
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
        first_s = answered_s - 1
        if first_s <= asked_s:
            edges += [(first_s, 1), (asked_s, -1)]
    return max(accumulate(change for _, change in sorted(edges)), default=0)


def percentile(times_s: Sequence[float], share: float) -> float | None:
    """The nearest-rank percentile; ``None`` when there is nothing to rank."""
    ranked = sorted(times_s)
    return ranked[round((len(ranked) - 1) * share)] if ranked else None
