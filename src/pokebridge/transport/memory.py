"""The in-process transport: one machine, one process, no engine.

A publish calls the receivers before it returns, so there is no queue to bound, nothing to lose and
no gap to report.
"""

from collections.abc import Sequence

from pokebridge.errors import TransportError
from pokebridge.transport.base import Feed, Receiver, Selection, Signal


class MemoryTransport:
    """A bus for everyone in this process who holds the same object.

    ``connect()`` gives another end of the same bus, as another instance's would be.
    """

    def __init__(self) -> None:
        self._bus: dict[_Subscription, None] = {}  # ordered, as a set is not
        self._own: list[_Subscription] = []
        self._closed = False

    def connect(self) -> "MemoryTransport":
        """Another end of the same bus, with subscriptions of its own."""
        other = MemoryTransport()
        other._bus = self._bus
        return other

    async def publish(self, signals: Sequence[Signal]) -> None:
        """Deliver ``signals`` to everyone whose selection matches, before this returns."""
        self._check_open()
        for body, shard in signals:
            for subscription in tuple(self._bus):
                if subscription.matches(shard):
                    subscription.receiver.on_signal(body, None if shard is None else str(shard))

    async def subscribe(self, selection: Selection, receiver: Receiver) -> "_Subscription":
        """Receive from now on; live at once."""
        self._check_open()
        subscription = _Subscription(self._bus, selection, receiver)
        self._bus[subscription] = None
        self._own.append(subscription)
        return subscription

    async def subscriber_count(self) -> int | None:
        """How many subscriptions take everything."""
        return sum(subscription.selection is Feed.ALL for subscription in self._bus)

    async def close(self) -> None:
        """Close this end's subscriptions; other ends go on."""
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
