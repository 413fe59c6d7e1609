"""How a backend pokes: on the transport itself, or over an instance's HTTP API.

Both publishers take pokes from any number of callers. A poke is sent at once while no other is
being sent. Otherwise it waits a few milliseconds at most, and those that wait are merged into few,
large requests. Merging is safe because a poke is level-triggered: it says "you are behind version
v", so the newest poke replaces the older ones. A call returns when its pokes have been accepted,
and raises when they may not have been.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from math import inf
from time import monotonic

from pokebridge.errors import InputError, NotPublishedError, SignalRefusedError
from pokebridge.http_publisher import HttpPublisher, chunks
from pokebridge.model import Poke, check_recipient
from pokebridge.poke_merger import LINGER_S, MAX_PENDING_RECIPIENTS, PokeCalls, check_pokes
from pokebridge.sharding import DEFAULT_SHARD_COUNT, check_shard_count, shard_of
from pokebridge.transport.base import Signal, Transport
from pokebridge.wire import encode_disconnect, encode_pokes

__all__ = ["HttpPublisher", "Publisher"]

# At 256 bytes a recipient a signal stays under 160 KB, far below NATS's limit of 1 MB.
MAX_POKES_PER_SIGNAL = 500
# More than a signal with a single poke has beside the recipient.
MAX_OVERHEAD_BYTES = 64
# An engine that fails within this time is reachable, and its signals are tried one by one. After
# this many more errors than successes it counts as down.
SOON_S = 1.0
MAX_ERRORS = 2


class Publisher(PokeCalls):
    """Publishes pokes on a transport, each tagged with its recipient's shard.

    Args:
        transport: the transport to publish on. The caller closes it.
        shard_count: the cluster's (protocol.md section 1).
        linger_s: how long a poke waits for others at most, while earlier pokes are being sent.
        max_pokes_per_signal: pokes of one shard beyond this number go into further signals.
        max_pending: recipients that may be pending; at this limit callers wait.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        shard_count: int = DEFAULT_SHARD_COUNT,
        linger_s: float = LINGER_S,
        max_pokes_per_signal: int = MAX_POKES_PER_SIGNAL,
        max_pending: int = MAX_PENDING_RECIPIENTS,
    ) -> None:
        super().__init__(self._send, linger_s, max_pending)
        self._transport = transport
        self._shard_count = check_shard_count(shard_count)
        self._max_pokes_per_signal = max_pokes_per_signal
        self.published = 0
        """Pokes that the transport has accepted, after merging."""

    async def publish(self, pokes: Sequence[Poke]) -> None:
        """As in the base class. A poke that no signal can carry is an InputError too."""
        check_pokes(pokes)
        self._check_size(pokes)
        await super().publish(pokes)

    def _check_size(self, pokes: Sequence[Poke]) -> None:
        limit = _limit_of(self._transport)
        for poke in pokes:
            if len(poke.recipient) < limit / 2 - MAX_OVERHEAD_BYTES:  # an escape has two bytes
                continue
            if (size_bytes := len(encode_pokes([poke]))) > limit:
                raise InputError(
                    f"the poke for {poke.recipient} has {size_bytes} bytes, and the transport"
                    f" accepts {limit}: use a shorter recipient, or raise the engine's limit"
                    " (max_payload of NATS)"
                )

    async def publish_now(self, pokes: Sequence[Poke]) -> None:
        """Publish ``pokes`` at once, without merging. Returns when all are accepted.

        For a caller that merges by itself, as the processor does. Raises as :meth:`publish` does.
        """
        check_pokes(pokes)
        await self._send(pokes)

    async def disconnect(
        self, recipient: str, *, at_ms: int | None = None, until_ms: int | None = None
    ) -> None:
        """Close every session of ``recipient`` with 4401, on every instance.

        With ``until_ms`` the instances that hear it also refuse, until then, the tokens of
        ``recipient`` that were issued before ``at_ms``. Both are Unix times in milliseconds.

        Raises:
            InputError: ``recipient`` is invalid.
            TransportError: the signal was not accepted.
        """
        shard = shard_of(check_recipient(recipient), self._shard_count)
        body = encode_disconnect(recipient, at_ms=at_ms, until_ms=until_ms)
        await self._transport.publish([Signal(body, shard)])

    async def _send(self, pokes: Sequence[Poke]) -> None:
        by_shard: dict[int, list[Poke]] = defaultdict(list)
        for poke in pokes:
            by_shard[shard_of(poke.recipient, self._shard_count)].append(poke)
        attempt = _Attempt(self._transport)
        for shard, its_pokes in by_shard.items():
            for some in chunks(its_pokes, self._max_pokes_per_signal):
                attempt.add(some, shard)
        try:
            await attempt.publish()
        finally:
            self.published += attempt.published
        if attempt.refused:
            raise NotPublishedError(
                f"{len(attempt.refused)} of {len(pokes)} pokes were refused: {attempt.reason}",
                frozenset(attempt.refused),
                frozenset(attempt.too_large),
            )


class _Attempt:
    """One attempt to publish pokes, so that one which is refused harms no other.

    All signals are published at once. When the engine refuses that, each is published alone, and
    one that is too large is halved until it fits.

    - ``published``: how many pokes were accepted
    - ``refused``, ``too_large``: the recipients of those that were not; the latter never will be
    - ``reason``: why not, of the last one
    - ``_signals``: what is left to publish, and the pokes of each
    """

    def __init__(self, transport: Transport) -> None:
        self.published = 0
        self.refused: set[str] = set()
        self.too_large: set[str] = set()
        self.reason = ""
        self._transport = transport
        self._limit = _limit_of(transport)
        self._signals: deque[tuple[Signal, Sequence[Poke]]] = deque()

    def add(self, pokes: Sequence[Poke], shard: int) -> None:
        """Add ``pokes`` in signals that the engine accepts, as far as it has told its limit."""
        body = encode_pokes(pokes)
        if len(body) <= self._limit:
            self._signals.append((Signal(body, shard), pokes))
        else:
            reason = f"the signal has {len(body)} bytes, and the engine accepts {self._limit}"
            self._halve(pokes, shard, reason)

    async def publish(self) -> None:
        """Publish everything that was added.

        Raises:
            TransportError: the engine does not work now. Some signals may have been published.
        """
        began_s = monotonic()
        signals = [signal for signal, _ in self._signals]
        try:
            if signals:
                await self._transport.publish(signals)
        except Exception as error:
            if not isinstance(error, SignalRefusedError) and (
                len(signals) == 1 or monotonic() - began_s > SOON_S
            ):
                raise
            await self._publish_one_by_one()
        else:
            self.published = sum(len(pokes) for _, pokes in self._signals)

    async def _publish_one_by_one(self) -> None:
        errors = 0
        while self._signals:
            signal, pokes = self._signals.popleft()
            try:
                await self._transport.publish([signal])
            except SignalRefusedError as error:
                if error.is_too_large:
                    self._halve(pokes, signal.shard or 0, str(error))
                else:
                    self._refuse(pokes, str(error))
            except Exception as error:
                errors += 1
                if errors - self.published > MAX_ERRORS or not (self._signals or self.published):
                    raise
                self._refuse(pokes, str(error))
            else:
                self.published += len(pokes)

    def _halve(self, pokes: Sequence[Poke], shard: int, reason: str) -> None:
        if len(pokes) == 1:
            self.too_large.add(pokes[0].recipient)
            self._refuse(pokes, reason)
        else:
            middle = len(pokes) // 2
            self.add(pokes[:middle], shard)
            self.add(pokes[middle:], shard)

    def _refuse(self, pokes: Sequence[Poke], reason: str) -> None:
        self.refused.update(poke.recipient for poke in pokes)
        self.reason = reason


def _limit_of(transport: Transport) -> float:
    """The longest body that ``transport`` accepts, if it is a HasLimit."""
    # To ask whether it is one would take several microseconds, for each poke.
    limit: float = getattr(transport, "max_signal_bytes", inf)
    return limit
