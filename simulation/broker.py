"""A transport that loses, duplicates and reorders signals, and does no more than its port promises.

A subscription is accepted before it delivers. Signals come in any order, and some come twice. When
a live subscription loses signals, it reports a gap once it is restored.

The promises do not cover losses that the engine does not notice: between its servers
(``servers.py``) signals are lost without a report.
"""

import asyncio
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from pokebridge.errors import SignalRefusedError, TransportError
from pokebridge.transport.base import Feed, Receiver, Selection, Signal
from simulation.loop import VirtualLoop
from simulation.network import Peer, Server
from simulation.servers import Route, Servers
from simulation.trace import Trace

_UNLIMITED_BYTES = 1_000_000


class Broker(Server):
    """The engine that all instances share."""

    def __init__(
        self, outside: VirtualLoop, rng: Random, trace: Trace, *, servers: int = 1
    ) -> None:
        super().__init__(outside, "broker", TransportError, rng, trace)
        self.servers = Servers(outside, rng, servers)
        self.max_signal_bytes: int | None = None
        """The largest signal that it takes. It refuses a larger one with all that comes with it."""
        self.tells_limit = False
        """Whether it tells that limit, as NATS does, or only refuses, as others do."""
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
        self.on_delivered: Callable[[Peer, bytes], None] = lambda _peer, _body: None

    def connect(self, peer: Peer) -> "SimTransport":
        """Return the broker's end for ``peer``."""
        return SimTransport(self, peer)

    def take(self, peer: Peer, signals: Sequence[Signal]) -> None:
        """Deliver the ``signals`` of ``peer`` to every subscription that selects them."""
        limit = self.max_signal_bytes
        if limit is not None and any(len(body) > limit for body, _ in signals):
            raise SignalRefusedError(
                f"the simulated broker takes no signal above {limit} bytes", is_too_large=True
            )
        home = self.servers.home_of(peer)
        broken_off = self.forgetful and self.rng.random() < self.forgetful
        for number, (body, shard) in enumerate(signals):
            if broken_off and number >= len(signals) // 2:
                raise self.refusal()
            self.published += 1
            for link in self.subscriptions:
                if link.selects(shard):
                    self._send(link, body, shard, self.servers.route(home, link.home))

    def _send(self, link: "Link", body: bytes, shard: int | None, route: Route | None) -> None:
        if not (link.live and self.servers.forwards(route, link.known_at)):
            self.lost += link.was_live
            return
        breaks, way_s = (0, 0.0) if route is None else (route.breaks, route.delay_s)
        tag = None if shard is None else str(shard)
        copies = 1
        if self.double_share and self.rng.random() < self.double_share:
            copies = 2
            self.doubled += 1
        for _ in range(copies):
            delay_s = self.latency_s() + way_s
            if self.ordered:
                delay_s = link.in_order(delay_s)
            if self.late_share and self.rng.random() < self.late_share:
                delay_s += self.rng.uniform(0.05, 1.0)
            sent = Sent(body, tag, link.connection, route, breaks)
            link.peer.loop.deliver(delay_s, link.hear, sent)

    def go_down(self) -> None:
        """Stop: every connection breaks, and the signals under way are lost."""
        self.up = False
        for link in tuple(self.subscriptions):
            self.servers.connect_anew(link.peer)
            link.break_off("the broker went away")

    def come_up(self) -> None:
        """Start again: the adapters reconnect by themselves."""
        self.up = True

    def cut(self, peer: Peer) -> None:
        """Break the connection of ``peer``."""
        super().cut(peer)
        self.disconnect(peer, "cut off")

    def disconnect(self, peer: Peer, reason: str) -> None:
        """End the connection of ``peer``, which connects anew, maybe to another server."""
        self.servers.connect_anew(peer)
        for link in self.links_of(peer):
            link.break_off(reason)

    def drop(self, peer: Peer) -> None:
        """``peer`` is dead: its subscriptions are gone."""
        for link in self.links_of(peer):
            link.end()

    def links_of(self, peer: Peer) -> "list[Link]":
        """The subscriptions of ``peer``."""
        return [link for link in self.subscriptions if link.peer is peer]

    def deny(self, peer: Peer, selections: frozenset[Selection]) -> None:
        """Refuse ``selections`` to ``peer``, and end its subscriptions to them."""
        peer.denied = selections
        for link in self.links_of(peer):
            if link.selection in selections:
                link.break_off("no permission")

    def lets_subscribe(self, peer: Peer, selection: Selection) -> bool:
        """Whether ``peer`` reaches the broker and may subscribe to ``selection``."""
        return self.is_reached_by(peer) and selection not in peer.denied

    def delivers_all(self, peer: Peer) -> bool:
        """Whether ``peer`` has one subscription for everything, and it delivers now."""
        return any(link.live and link.selection is Feed.ALL for link in self.links_of(peer))

    def has_covered(self, peer: Peer, shard: int) -> bool:
        """Whether ``peer`` has a subscription for ``shard`` that delivers, or will report a gap.

        That is the promise behind ``ready``; an untagged poke may be for any shard.
        """
        feeds = {link.selection for link in self.links_of(peer) if link.was_live}
        return Feed.ALL in feeds or {shard, Feed.UNTAGGED} <= feeds


class Sent(NamedTuple):
    """A signal on its way to a subscription. It is lost if its connection breaks."""

    body: bytes
    tag: str | None
    connection: int
    route: Route | None
    breaks: int


class Link:
    """A subscription, at both ends: the adapter in the process and the engine's record of it."""

    def __init__(
        self, broker: Broker, peer: Peer, selection: Selection, receiver: Receiver
    ) -> None:
        self.peer = peer
        self.selection = selection
        self.home = broker.servers.home_of(peer)
        """The server that it is on."""
        self.known_at = 0.0
        """Since when that server knows of it, and tells the others."""
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
        if self.selection in self.peer.denied:
            raise TransportError(f"the simulated broker does not permit {self.selection}")
        broker.subscriptions.append(self)
        self.known_at = broker.outside.scheduler.now
        if broker.slow_starts_s:
            delay_s = broker.rng.uniform(0, broker.slow_starts_s)
            broker.outside.deliver(delay_s, self._begin, self.connection)
        else:
            self._begin(self.connection)

    def _begin(self, connection: int) -> None:
        if connection == self.connection and not self._ended:
            self._start()

    def _start(self) -> None:
        self.live = self.was_live = True

    def hear(self, sent: Sent) -> None:
        """A signal has come through the network."""
        if self._ended:
            return
        crossed = sent.route is None or sent.route.breaks == sent.breaks
        if sent.connection != self.connection or not crossed:
            self._broker.lost += 1
            return
        self._broker.delivered += 1
        self._broker.on_delivered(self.peer, sent.body)
        self._receiver.on_signal(sent.body, sent.tag)

    def break_off(self, reason: str, after_s: float = 0.0) -> None:
        """Lose the connection; the adapter notices, and is back after ``after_s`` or a bit more."""
        if self._ended or (self._broken and not self.live):
            return
        if not self._broken:
            self.peer.line.begin()
        self.live, self._broken = False, True
        self.connection += 1
        retry_s = after_s + self._broker.rng.uniform(0.02, 0.5)
        self.peer.loop.deliver(retry_s, self._restore, reason)

    def _restore(self, reason: str) -> None:
        """The adapter, in its process, tries to get back."""
        if self._ended:
            return
        broker = self._broker
        if not broker.lets_subscribe(self.peer, self.selection):
            self.peer.loop.deliver(broker.rng.uniform(0.2, 1.0), self._restore, reason)
            return
        self.home = broker.servers.home_of(self.peer)
        self.known_at = broker.outside.scheduler.now
        self._start()
        spread_s = broker.servers.spread_s
        self.peer.loop.deliver(spread_s, self._report_gap, reason, self.connection)

    def _report_gap(self, reason: str, connection: int) -> None:
        """All servers have heard of the subscription, unless it broke again."""
        if self._ended or connection != self.connection:
            return
        self._broken = False
        self.peer.line.end()
        self._broker.trace.note(self.peer.name, f"gap on {self.selection}: {reason}")
        self._receiver.on_gap(self.selection, reason)

    def end(self) -> None:
        """End the subscription."""
        if self._ended:
            return
        self._ended, self.live = True, False
        if self._broken:
            self.peer.line.end()
        if self in self._broker.subscriptions:
            self._broker.subscriptions.remove(self)

    async def close(self) -> None:
        """See the port."""
        if self._broken and not self._ended:
            self._receiver.on_gap(self.selection, "closed before the end of a gap")
        self.end()


class SimTransport:
    """One process's end of the broker."""

    is_shared = True

    def __init__(self, broker: Broker, peer: Peer) -> None:
        self._broker = broker
        self._peer = peer
        self._own: list[Link] = []
        self._closed = False

    @property
    def max_signal_bytes(self) -> int:
        """See the port."""
        limit = self._broker.max_signal_bytes
        return limit if limit is not None and self._broker.tells_limit else _UNLIMITED_BYTES

    async def publish(self, signals: Sequence[Signal]) -> None:
        """See the port."""
        self._check_open()
        await self._broker.call(self._peer, lambda: self._broker.take(self._peer, signals))

    async def subscribe(self, selection: Selection, receiver: Receiver) -> Link:
        """See the port."""
        self._check_open()
        link = Link(self._broker, self._peer, selection, receiver)
        try:
            await self._broker.call(self._peer, link.accept)
            await asyncio.sleep(self._broker.servers.spread_s)
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
