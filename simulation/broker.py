"""A transport that loses, doubles and reorders signals, and keeps no more than its port promises.

A subscription is accepted before it delivers. Signals come in any order, and some come twice. When
a live subscription loses signals, it reports a gap once it is restored.
"""

from collections.abc import Sequence
from random import Random

from pokebridge.errors import TransportError
from pokebridge.transport.base import Feed, Receiver, Selection, Signal
from simulation.loop import VirtualLoop
from simulation.network import Peer, Server
from simulation.trace import Trace


class Broker(Server):
    """The engine that all instances share."""

    def __init__(self, outside: VirtualLoop, rng: Random, trace: Trace) -> None:
        super().__init__(outside, "broker", TransportError, rng, trace)
        self.ordered = True
        """Whether signals that are not late arrive in the order in which they were published."""
        self.late_share = 0.0
        """The share of deliveries that take up to a second, which mixes the order."""
        self.double_share = 0.0
        """The share of deliveries that come twice."""
        self.slow_starts_s = 0.0
        """The longest time from accepting a subscription to its first delivery."""
        self.published = 0
        self.delivered = 0
        self.lost = 0
        self.doubled = 0
        self.subscriptions: list[Link] = []

    def connect(self, peer: Peer) -> "SimTransport":
        """The end of ``peer``."""
        return SimTransport(self, peer)

    def take(self, signals: Sequence[Signal]) -> None:
        """Deliver ``signals`` to every subscription that selects them."""
        broken_off = self.forgetful and self.rng.random() < self.forgetful
        for number, (body, shard) in enumerate(signals):
            if broken_off and number >= len(signals) // 2:
                raise self.refusal()
            self.published += 1
            for link in self.subscriptions:
                if link.selects(shard):
                    self._send(link, body, shard)

    def _send(self, link: "Link", body: bytes, shard: int | None) -> None:
        if not link.live:
            self.lost += link.was_live
            return
        tag = None if shard is None else str(shard)
        copies = 1
        if self.double_share and self.rng.random() < self.double_share:
            copies = 2
            self.doubled += 1
        for _ in range(copies):
            delay_s = link.in_order(self.latency_s()) if self.ordered else self.latency_s()
            if self.late_share and self.rng.random() < self.late_share:
                delay_s += self.rng.uniform(0.05, 1.0)
            link.peer.loop.deliver(delay_s, link.hear, body, tag, link.connection)

    def go_down(self) -> None:
        """Stop: every connection breaks, and the signals under way are lost."""
        self.up = False
        for link in tuple(self.subscriptions):
            link.break_off("the broker went away")

    def come_up(self) -> None:
        """Start again: the adapters reconnect by themselves."""
        self.up = True

    def cut(self, peer: Peer) -> None:
        """Break the connection of ``peer``."""
        super().cut(peer)
        for link in self.links_of(peer):
            link.break_off("cut off")

    def drop(self, peer: Peer) -> None:
        """``peer`` is dead: its subscriptions are gone."""
        for link in self.links_of(peer):
            link.end()

    def links_of(self, peer: Peer) -> "list[Link]":
        """The subscriptions of ``peer``."""
        return [link for link in self.subscriptions if link.peer is peer]

    def has_covered(self, peer: Peer, shard: int) -> bool:
        """Whether ``peer`` has a subscription for ``shard`` that delivers, or will report a gap.

        That is the promise behind ``ready``; an untagged poke may be for any shard.
        """
        feeds = {link.selection for link in self.links_of(peer) if link.was_live}
        return Feed.ALL in feeds or {shard, Feed.UNTAGGED} <= feeds


class Link:
    """A subscription, at both ends: the adapter in the process and the engine's record of it."""

    def __init__(
        self, broker: Broker, peer: Peer, selection: Selection, receiver: Receiver
    ) -> None:
        self.peer = peer
        self.selection = selection
        self.live = False
        """Whether it delivers now."""
        self.was_live = False
        """Whether it ever delivered: from then on it reports a gap for what it loses."""
        self.connection = 0
        """Grows when the connection breaks: signals of an older generation are lost."""
        self._broker = broker
        self._receiver = receiver
        self._ended = False
        self._broken = False
        self._last_at = 0.0

    def selects(self, shard: int | None) -> bool:
        """Whether a signal with this tag is for it."""
        if self.selection is Feed.ALL:
            return True
        return shard is None if self.selection is Feed.UNTAGGED else shard == self.selection

    def in_order(self, delay_s: float) -> float:
        """``delay_s``, or longer when an earlier signal would be overtaken."""
        now = self._broker.outside.scheduler.now
        self._last_at = max(self._last_at, now + delay_s)
        return self._last_at - now

    def accept(self) -> None:
        """The engine takes it; delivering may begin later."""
        if self._ended:
            return
        broker = self._broker
        broker.subscriptions.append(self)
        if broker.slow_starts_s:
            delay_s = broker.rng.uniform(0, broker.slow_starts_s)
            broker.outside.deliver(delay_s, self._begin, self.connection)
        else:
            self._begin(self.connection)

    def _begin(self, connection: int) -> None:
        if connection == self.connection and not self._ended:
            self.live = self.was_live = True

    def hear(self, body: bytes, tag: str | None, connection: int) -> None:
        """A signal has come through the network."""
        if self._ended:
            return
        if connection != self.connection:
            self._broker.lost += 1
            return
        self._broker.delivered += 1
        self._receiver.on_signal(body, tag)

    def break_off(self, reason: str, after_s: float = 0.0) -> None:
        """Lose the connection; the adapter notices, and is back after ``after_s`` or a bit more."""
        if self._ended or self._broken:
            return
        self.live, self._broken = False, True
        self.connection += 1
        self.peer.trouble.begin()
        retry_s = after_s + self._broker.rng.uniform(0.02, 0.5)
        self.peer.loop.deliver(retry_s, self._restore, reason)

    def _restore(self, reason: str) -> None:
        """The adapter, in its process, tries to get back."""
        if self._ended:
            return
        broker = self._broker
        if not broker.is_reached_by(self.peer):
            self.peer.loop.deliver(broker.rng.uniform(0.2, 1.0), self._restore, reason)
            return
        self.live, self.was_live, self._broken = True, True, False
        self.peer.trouble.end()
        broker.trace.note(self.peer.name, f"gap on {self.selection}: {reason}")
        self._receiver.on_gap(self.selection, reason)

    def end(self) -> None:
        """Hear nothing any more."""
        if self._ended:
            return
        self._ended, self.live = True, False
        if self._broken:
            self.peer.trouble.end()
        if self in self._broker.subscriptions:
            self._broker.subscriptions.remove(self)

    async def close(self) -> None:
        """See the port."""
        self.end()


class SimTransport:
    """One process's end of the broker."""

    is_shared = True

    def __init__(self, broker: Broker, peer: Peer) -> None:
        self._broker = broker
        self._peer = peer
        self._own: list[Link] = []
        self._closed = False

    async def publish(self, signals: Sequence[Signal]) -> None:
        """See the port."""
        self._check_open()
        await self._broker.call(self._peer, lambda: self._broker.take(signals))

    async def subscribe(self, selection: Selection, receiver: Receiver) -> Link:
        """See the port."""
        self._check_open()
        link = Link(self._broker, self._peer, selection, receiver)
        try:
            await self._broker.call(self._peer, link.accept)
        except BaseException:
            link.end()  # nobody will hold it, so it must not go on by itself
            raise
        self._own.append(link)
        return link

    async def close(self) -> None:
        """See the port."""
        self._closed = True
        for link in self._own:
            await link.close()

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError("the simulated transport is closed")
