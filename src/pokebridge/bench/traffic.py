"""Messages of a storm: sent at a steady rate, and followed until their clients have pulled them.

A :class:`Watcher` counts what clients and senders do, and a :class:`Sampler` keeps how that was
several times a second.
"""

import asyncio
import json
import random
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from time import monotonic, process_time

from pokebridge.bench.clients import Observer, PulledMessage, StormClient
from pokebridge.bench.fleet import Balancer, Endpoint, Fleet
from pokebridge.bench.http_pool import HOST, Answer
from pokebridge.tokens import sign_token

SAMPLE_S = 0.25
LOAD_GENERATOR = "load generator"


@dataclass(slots=True)
class Message:
    """A message for ``client``; times are seconds of the monotonic clock."""

    id: str
    client: StormClient
    asked_s: float
    answered_s: float | None = None
    """When the instance accepted it. From then on it must be delivered."""
    is_pulled: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """The state at ``at_s``, and counts since the sample before."""

    at_s: float
    connected: int
    accepted: int
    refused: int
    pulls: int
    silence_s: float
    """Age of the oldest message that is accepted and not pulled."""
    cpu: Mapping[str, float]
    """CPU use in cores, by process."""
    late_s: float
    """How late the sample was taken, which is the error of its times."""


@dataclass(slots=True)
class Silence:
    """The longest time from a message's acceptance to its pull, in seconds."""

    struck_s: float = 0.0
    others_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Counts:
    accepted: int
    refused: int
    pulls: int


class Watcher(Observer):
    """Counts what clients and senders report, and matches messages with pulls."""

    def __init__(self) -> None:
        self._waiting: dict[str, Message] = {}
        self.connected = 0
        self.pulls = 0
        self.under_way: dict[StormClient, Message] = {}
        """The one message of each client that waits for its answer or its pull."""
        self.struck: frozenset[StormClient] = frozenset()
        """The clients of the instance that was killed."""
        self.silence = Silence()
        self.statuses: Counter[int] = Counter()
        """Handshakes by the HTTP status of the answer."""
        self.accepted: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        """By instance: when each accepted handshake was requested, and when answered."""

    # --- clients ----------------------------------------------------------------------------------

    def on_handshake(self, where: Endpoint, status: int, asked_s: float) -> None:
        """Count a change."""
        self.statuses[status] += 1
        if status == 101:
            self.accepted[where.name].append((asked_s, monotonic()))

    def on_connected(self, change: int) -> None:
        """Count a change."""
        self.connected += change

    def on_pull(self, client: StormClient, messages: list[PulledMessage]) -> None:
        """Note whether the pull brought the client's message."""
        self.pulls += 1
        message = self.under_way.get(client)
        if message is not None and any(each.id == message.id for each in messages):
            message.is_pulled = True
            self._finish(message)

    # --- messages ---------------------------------------------------------------------------------

    def on_answered(self, message: Message) -> None:
        """An instance accepted ``message``."""
        message.answered_s = monotonic()
        self._waiting[message.id] = message
        self._finish(message)

    def on_given_up(self, message: Message) -> None:
        """An instance refused ``message``."""
        self.under_way.pop(message.client, None)

    @property
    def owed(self) -> int:
        """Messages that were accepted and are not pulled yet."""
        return len(self._waiting)

    def waiting_since_s(self) -> float | None:
        """When the oldest unpulled message was accepted; ``None`` when all are pulled."""
        oldest = next(iter(self._waiting.values()), None)
        return None if oldest is None else oldest.answered_s

    def _finish(self, message: Message) -> None:
        """Forget ``message`` once it is both accepted and pulled, in either order."""
        if not message.is_pulled or message.answered_s is None:
            return
        del self._waiting[message.id], self.under_way[message.client]
        waited_s = monotonic() - message.answered_s
        if message.client in self.struck:
            self.silence.struck_s = max(self.silence.struck_s, waited_s)
        else:
            self.silence.others_s = max(self.silence.others_s, waited_s)


class Sampler:
    """Takes a :class:`Sample` of ``watcher`` and of the CPU every ``SAMPLE_S`` seconds."""

    def __init__(self, watcher: Watcher, fleet: Fleet) -> None:
        self._watcher = watcher
        self._fleet = fleet
        self._counts = self._count()
        self._cpu_s: dict[str, float] = {}
        self._cpu_read_s = 0.0
        self.samples: list[Sample] = []

    async def run(self) -> None:
        """Take samples until cancelled.

        Raises:
            UnavailableError: an instance ended by itself.
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
    """The most of an instance's handshakes that certainly passed within one second.

    Each handshake is a pair of times: when it was requested, and when it was answered. The instance
    accepted it at some moment in between, so it certainly lies in the second that begins at t for
    every t from ``answered - 1`` to ``requested``. A slow network or load generator therefore never
    makes a limit look exceeded that was kept.
    """
    edges: list[tuple[float, int]] = []
    for asked_s, answered_s in handshakes:
        first_s = answered_s - 1
        if first_s <= asked_s:
            edges += [(first_s, 1), (asked_s, -1)]
    return max(accumulate(change for _, change in sorted(edges)), default=0)


def percentiles_ms(times_s: Sequence[float], digits: int) -> dict[str, float] | None:
    """The nearest-rank percentiles in milliseconds; ``None`` when there is nothing to rank."""
    if not times_s:
        return None
    ranked, last = sorted(times_s), len(times_s) - 1
    shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {
        name: round(ranked[round(last * share)] * 1000, digits) for name, share in shares.items()
    }


_SEND_EVERY_S = 0.01
_RESEND_S = 0.2
_TOKEN_TTL_S = 6 * 3600.0
_MESSAGE_TTL_S = 600
# How often to draw a client that has no message under way, before a message is skipped.
_DRAWS = 20


def make_clients(
    count: int, secret: str, balancer: Balancer, watcher: Watcher
) -> Sequence[StormClient]:
    """``count`` clients, each with a recipient of its own, not started."""
    run = secrets.token_hex(4)
    recipients = [f"urn:storm:{run}:{number}" for number in range(count)]
    return [
        StormClient(balancer, watcher, each, sign_token(secret, each, (), _TOKEN_TTL_S))
        for each in recipients
    ]


async def start_clients(clients: Iterable[StormClient], per_s: float) -> None:
    """Start the clients at a steady rate, without catching up after a pause of this process.

    A burst would be refused in part, and those clients would then reconnect later in the storm.
    """
    for client in clients:
        client.start()
        await asyncio.sleep(1 / per_s)


class Sender:
    """Sends messages at a steady rate, each to a client that has none under way."""

    def __init__(
        self, rate_per_s: float, secret: str, balancer: Balancer, watcher: Watcher
    ) -> None:
        self._balancer = balancer
        self._watcher = watcher
        self._rate_per_s = rate_per_s
        self._loop = asyncio.get_running_loop()
        self._run = secrets.token_hex(4)
        self._token = sign_token(secret, f"urn:storm:{self._run}", ["send"], _TOKEN_TTL_S)
        self.sent = 0
        self.resent = 0
        self.refused = 0

    async def run(self, clients: Sequence[StormClient]) -> None:
        """Send until cancelled."""
        began_s, due = monotonic(), 0
        while True:
            wanted = int((monotonic() - began_s) * self._rate_per_s)
            for _ in range(wanted - due):
                self._send_to_one(clients)
            due = wanted
            await asyncio.sleep(_SEND_EVERY_S)

    def _send_to_one(self, clients: Sequence[StormClient]) -> None:
        for _ in range(_DRAWS):
            client = random.choice(clients)  # noqa: S311 - spreads load
            if client not in self._watcher.under_way:
                self.sent += 1
                message = Message(f"{self._run}-{self.sent}", client, monotonic())
                self._watcher.under_way[client] = message
                self._post(message)
                return

    def _post(self, message: Message) -> None:
        message.asked_s = monotonic()
        body = json.dumps(
            {
                "recipient": message.client.recipient,
                "id": message.id,
                "body": None,
                "ttl_s": _MESSAGE_TTL_S,
            }
        ).encode()
        head = (
            f"POST /v1/messages HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {self._token}\r\nContent-Length: {len(body)}\r\n\r\n"
        )

        def done(answer: Answer | None) -> None:
            self._on_answer(message, answer)

        self._balancer.pick().http.send(head.encode() + body, done)

    def _on_answer(self, message: Message, answer: Answer | None) -> None:
        if answer is None:
            # Whether it was committed is unknown. Its id makes it safe to send again.
            self.resent += 1
            self._loop.call_later(_RESEND_S, self._post, message)
        elif answer.status in {200, 202}:
            self._watcher.on_answered(message)
        else:
            self.refused += 1
            self._watcher.on_given_up(message)
