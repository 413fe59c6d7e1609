"""The transport port: what carries signals between processes, and what it guarantees.

An adapter only moves bytes. Decoding, proving that a subscription delivers, merging and batching
are the same for every engine and live in the layers above (``bridge``, ``publisher``).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from pokebridge.border import note_unforeseen
from pokebridge.model import Feed, Selection
from pokebridge.supervisor import note_failure

__all__ = [
    "Carrier",
    "Explains",
    "Feed",
    "HasLimit",
    "Receiver",
    "Selection",
    "Signal",
    "Subscription",
    "Transport",
    "deliver",
    "report_gap",
]

Carrier = Literal["filter", "topic"]
"""How Google Pub/Sub separates shards: by a filter on one topic, or by a topic for each shard."""


class Signal(NamedTuple):
    """One message on the transport: a JSON ``body`` and the ``shard`` it is tagged with, if any."""

    body: bytes
    shard: int | None = None


class Receiver(Protocol):
    """Receives what a subscription delivers.

    Both methods are called on the event loop's thread. They must not block, nor raise. Adapters
    call them by :func:`deliver` and :func:`report_gap`, which survive a defect.
    """

    def on_signal(self, body: bytes, tag: str | None) -> None:
        """A signal arrived. ``tag`` is its shard as the publisher wrote it."""

    def on_gap(self, selection: Selection, reason: str) -> None:
        """Signals of ``selection`` may have been lost; the subscription delivers again.

        The call comes after the subscription is restored, not when it breaks. Whatever is published
        after this call arrives, or another gap is reported.
        """


def deliver(receiver: Receiver, body: bytes, tag: str | None) -> None:
    """Give ``receiver`` a signal. A defect there must not end the adapter's reading task."""
    try:
        receiver.on_signal(body, tag)
    except Exception as error:  # noqa: BLE001 - the guard of this border: the reader lives
        note_unforeseen("signals", error)


def report_gap(receiver: Receiver, selection: Selection, reason: str) -> None:
    """Tell ``receiver`` of a gap. A defect of one receiver must not keep it from the others."""
    try:
        receiver.on_gap(selection, reason)
    except Exception as error:  # noqa: BLE001 - see above
        note_failure("signal_receiver", error)


class Subscription(Protocol):
    """A running subscription."""

    async def close(self) -> None:
        """Stop receiving and free what the engine keeps for this subscription. Idempotent.

        A gap that was not reported yet is reported now, because it will have no end.
        """


@runtime_checkable
class Explains(Protocol):
    """Optional capability of a subscription: it knows why it does not deliver."""

    @property
    def trouble(self) -> str | None:
        """The last failure, until the subscription delivers again. ``None``: no known failure."""


@runtime_checkable
class HasLimit(Protocol):
    """Optional capability of a transport: it knows how long a signal's body may be."""

    @property
    def max_signal_bytes(self) -> int:
        """The longest body that the engine accepts, as it says now."""


class Transport(Protocol):
    """Carries signals from any publisher to every subscription that selects them.

    ``pokebridge.testing.transport.TransportContract`` checks these guarantees for every adapter:

    - **Delivery**: between gaps, a signal is delivered at least once to every subscription whose
      selection matches it, including those of the publishing process. Signals may arrive in any
      order, and more than once.
    - **Gaps**: when signals may have been lost to a live subscription, the adapter restores the
      subscription and then calls ``on_gap``. Examples are a lost connection, a slow consumer that
      the server disconnected, and a subscription that somebody deleted. The adapter retries until
      it succeeds. It never gives up silently.
    - **Liveness**: ``subscribe`` returns when the engine has accepted the subscription. Delivery
      may begin later. A caller that needs to know publishes a probe and waits for it. If the engine
      has several servers, all of them have had time to learn of the subscription by then, since a
      probe tests only one. The same holds before ``on_gap`` is called.
    - **Bounds**: every queue has a limit. What exceeds it is a gap.
    """

    is_shared: bool
    """Whether signals reach other processes."""

    async def publish(self, signals: Sequence[Signal]) -> None:
        """Hand ``signals`` to the engine, and return when it has accepted them.

        Raises:
            SignalRefusedError: the engine works, and refused one of them.
            TransportError: the engine did not accept all of them. Some may have been published.
        """

    async def subscribe(self, selection: Selection, receiver: Receiver) -> Subscription:
        """Deliver the signals that match ``selection`` to ``receiver``.

        Raises:
            TransportError: the engine is unavailable, or refuses.
        """

    async def close(self) -> None:
        """Close all subscriptions and connections. Idempotent."""
