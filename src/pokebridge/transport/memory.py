"""The in-process transport: one process, no engine.

``publish`` calls the receivers before it returns. So there is no queue that could overflow, nothing
can be lost, and there are no gaps.
"""

from collections.abc import Sequence

from pokebridge.errors import TransportError
from pokebridge.transport.base import Feed, Receiver, Selection, Signal, deliver


class MemoryTransport:
    """One end of a bus inside this process.

    ``connect()`` returns another end of the same bus, as another instance would have it.
    """

    is_shared = False

    def __init__(self) -> None:
        self._bus: dict[_Subscription, None] = {}  # a set would not keep the order
        self._own: list[_Subscription] = []
        self._closed = False

    def connect(self) -> "MemoryTransport":
        """Return another end of the same bus, with its own subscriptions."""
        other = MemoryTransport()
        other._bus = self._bus
        return other

    async def publish(self, signals: Sequence[Signal]) -> None:
        """Deliver ``signals`` to all matching subscriptions before returning."""
        self._check_open()
        for body, shard in signals:
            for subscription in tuple(self._bus):
                if subscription.matches(shard):
                    deliver(subscription.receiver, body, None if shard is None else str(shard))

    async def subscribe(self, selection: Selection, receiver: Receiver) -> "_Subscription":
        """Deliver matching signals to ``receiver`` from now on."""
        self._check_open()
        subscription = _Subscription(self._bus, selection, receiver)
        self._bus[subscription] = None
        self._own.append(subscription)
        return subscription

    async def close(self) -> None:
        """Close this end's subscriptions. The other ends stay open."""
        self._closed = True
        for subscription in self._own:
            await subscription.close()

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError("the in-process transport is closed")


class _Subscription:
    def __init__(
        self, bus: "dict[_Subscription, None]", selection: Selection, receiver: Receiver
    ) -> None:
        self._bus = bus
        self.selection = selection
        self.receiver = receiver

    def matches(self, shard: int | None) -> bool:
        if self.selection is Feed.ALL:
            return True
        return shard is None if self.selection is Feed.UNTAGGED else shard == self.selection

    async def close(self) -> None:
        self._bus.pop(self, None)
