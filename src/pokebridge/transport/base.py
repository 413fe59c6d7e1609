"""The transport port: what carries signals between processes, and what it promises.

An adapter is small on purpose: it moves bytes. Decoding, proving a subscription live, merging and
batching are the same for every engine and live above it (``bridge``, ``publisher``).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from pokebridge.model import Feed, Selection

__all__ = [
    "Carrier",
    "Explains",
    "Feed",
    "Receiver",
    "Selection",
    "Signal",
    "Subscription",
    "Transport",
]

Carrier = Literal["filter", "topic"]
"""What sets a shard's signals apart on Google Pub/Sub: a filter, or a topic of their own."""


class Signal(NamedTuple):
    """One message on the transport: a JSON ``body`` and the ``shard`` it is tagged with, if any."""

    body: bytes
    shard: int | None = None


class Receiver(Protocol):
    """Who hears a subscription. Both calls come on the event loop's thread and must not block."""

    def on_signal(self, body: bytes, tag: str | None) -> None:
        """A signal arrived; ``tag`` is its shard as the publisher wrote it. Never raises."""

    def on_gap(self, selection: Selection, reason: str) -> None:
        """Signals of ``selection`` may have been lost before now; from now on it receives again.

        Called after the subscription is restored, not when it breaks: what is published after this
        call arrives, or another gap is reported.
        """


class Subscription(Protocol):
    """A running subscription."""

    async def close(self) -> None:
        """Stop receiving and give back what the engine holds for it. May be called twice."""


@runtime_checkable
class Explains(Protocol):
    """A subscription that can tell why it does not deliver, where the publisher would not know."""

    @property
    def trouble(self) -> str | None:
        """What went wrong last, until it delivers again; ``None`` when nothing is known."""


class Transport(Protocol):
    """Carries signals from any publisher to every subscription that selects them.

    Promises, held by ``pokebridge.testing.TransportContract`` against every adapter:

    - **Delivery**: at least once in the absence of a gap, to every subscription whose selection
      matches, this process's own included. Order is not promised; doubles are allowed.
    - **Gaps**: whenever signals may have been lost to a live subscription (a connection lost, a
      slow consumer cut off, a subscription deleted under it), the adapter restores it by itself,
      for as long as it takes, and then calls ``on_gap``. It never gives up silently.
    - **Liveness**: ``subscribe`` returns when the engine has accepted the subscription, which may
      be before it delivers. A caller that must know publishes a probe signal and waits for it.
    - **Bounded**: no queue grows without a limit; what overflows is a gap.
    """

    async def publish(self, signals: Sequence[Signal]) -> None:
        """Hand ``signals`` to the engine; returns when it has accepted them.

        Raises :class:`~pokebridge.errors.TransportError` when it has not; some may have gone out.
        """

    async def subscribe(self, selection: Selection, receiver: Receiver) -> Subscription:
        """Receive what ``selection`` matches.

        Raises :class:`~pokebridge.errors.TransportError` when the engine refuses or can't be had.
        """

    async def subscriber_count(self) -> int | None:
        """How many instances subscribe to everything now; ``None`` when the engine can't tell."""

    async def close(self) -> None:
        """Close what is still open. May be called twice."""
