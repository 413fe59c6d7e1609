"""The WebSocket half of an instance: its sessions, from their admission to their end.

HTTP upgrade → ``Entrance`` → ``Connection`` → ``SessionMap`` → ``ready`` once its shard is live
"""

import asyncio
import contextlib
import random
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import structlog

from pokebridge.backoff import spread
from pokebridge.errors import TransportError
from pokebridge.gateway.acks import RECORD_EVERY_S, Acks, RecordAcks
from pokebridge.gateway.beacons import FASTEST_S, Beacons, group_prefixes_text
from pokebridge.gateway.bridge import Bridge
from pokebridge.gateway.config import GatewayConfig
from pokebridge.gateway.connection import Connection
from pokebridge.gateway.entrance import Entrance, Identity, Verifier
from pokebridge.gateway.handshake import Handshake, Network
from pokebridge.gateway.listener import Listener
from pokebridge.gateway.listening import listenings
from pokebridge.gateway.polling import PolledSession
from pokebridge.gateway.recall import Recall
from pokebridge.gateway.roster import Roster
from pokebridge.gateway.session_map import SessionMap
from pokebridge.gateway.shard_routing import Reach, ShardRouting
from pokebridge.gateway.sockets import Sockets
from pokebridge.gateway.subscriptions import SubscriptionManager
from pokebridge.gateway.verification import STEP_S, Heads, Verification
from pokebridge.gateway.wheel import Wheel
from pokebridge.model import Poke
from pokebridge.placement import Placement, ShardMap
from pokebridge.sharding import shard_of
from pokebridge.supervisor import keep_doing, run_once, supervise
from pokebridge.transport.base import Signal, Transport
from pokebridge.wire import Beacon, encode_beacon

log = structlog.get_logger(__name__)

# How often all sessions are poked while the transport is in doubt, if there is no mailbox to tell
# which are behind.
_DOUBT_POKE_EVERY_S = 30
# Sessions that had to wait for ``ready`` get it in batches, one in this time.
_READY_EVERY_S = 0.1
_BEACON_TIMEOUT_S = 2.0
# The pulls a second that an instance is assumed to handle until they are measured.
_PULLS_PER_S = 1000.0


class Gateway:
    """All sessions of one instance, and the bridge that feeds them."""

    def __init__(
        self,
        config: GatewayConfig,
        transport: Transport,
        verifier: Verifier,
        heads: Heads | None = None,
        record_acks: RecordAcks | None = None,
    ) -> None:
        """``heads`` reads the mailbox, and ``record_acks`` writes to it, where there is one."""
        self.instance = config.instance
        """This instance's id."""
        limits = (config.max_sessions_per_recipient, config.group_prefixes)
        self.sessions: SessionMap[Listener] = SessionMap(*limits)
        """All sessions by recipient, even before ``ready``, and what else they listen to."""
        self.bridge = Bridge(self.sessions, lambda: self._audience_pulls_per_s)
        """Routes signals to the sessions."""
        self.subscriptions = SubscriptionManager(
            transport,
            self.bridge.on_signal,
            instance=config.instance,
            shard_count=config.shard_count,
            timing=config.subscription_timing,
            on_live=self._open_waiting,
            on_missed=self._on_missed,
        )
        """Has the transport deliver the signals for the sessions."""
        self._recall = Recall(transport, self.bridge, config, self._supervise)
        unowned = ShardMap(0, config.mode, (None,) * config.shard_count)
        placement = Placement(config.instance, config.placement)
        self.shard_routing = ShardRouting(config.instance, unowned, placement)
        """Knows where each recipient belongs."""
        self.entrance = Entrance(config, verifier, self, self._admitted)
        """Admits new sessions."""
        verifying = (config.verify_every_s, self.bridge.audiences.was_poked)
        self.verification = None if heads is None else Verification(heads, *verifying)
        """Pokes the sessions that are behind the mailbox."""
        self.acks = None if record_acks is None else Acks(record_acks)
        """The acks that come over the sockets."""
        self.beacons = Beacons(_identity(config))
        """What is heard of other instances."""
        self.roster = Roster(config.instance, self.sessions, transport, self._do_once)
        """Tells operators where a recipient is connected."""
        self.wheel = Wheel()
        """The deadlines of all sockets, plain HTTP ones included."""
        self.pulls_per_s = _PULLS_PER_S
        """The rate over which the pulls after a gap are spread."""
        self.on_ready: Callable[[str, str], None] = lambda _recipient, _device: None
        """Called with recipient and device of each session that becomes ready. Must not block."""
        self.moved = 0
        """How many sessions were sent after their shard."""
        self._config = config
        self._doubt_s = self._unsure_s = 0  # see _watch_doubt; none while this process stood
        # The sessions that are not, or no longer, in ``sessions``: they are closing.
        self._leaving: set[Listener] = set()
        self._all_gone = asyncio.Event()  # set while there is no session in either
        # The sessions that wait for ``ready``, in order, and the timer of their next batch.
        self._waiting: dict[Listener, None] = {}
        self._opener: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self, *, serves: bool = True) -> None:
        """Subscribe, and begin to take sessions. Unless it ``serves``, refuse them all.

        It publishes beacons either way, so that a setting that differs from those of the instances
        with sessions, and would misroute its pokes, is noticed.

        Raises:
            TransportError: the transport is unavailable.
        """
        self._loop = asyncio.get_running_loop()
        self.entrance.serves = serves
        self.wheel.start(self._loop)
        self.beacons.begin(self.now(), hears=serves)
        self._supervise("beacons", self._keep_beacons)
        if not serves:
            return
        self.bridge.on_beacon = lambda beacon: self.beacons.hear(beacon, self.now())
        self.bridge.on_lookup = self.roster.hear
        await self.subscriptions.start(self.shard_routing.wanted(self.now()))
        self._supervise("gateway_clock", self._keep_time)
        self._supervise("walks", self.bridge.walks.run)
        if self.verification is not None:
            self._supervise("verification", partial(self._keep_verifying, self.verification))
        if self.acks is not None:
            self._keep(keep_doing("acks", self.acks.record, RECORD_EVERY_S))

    async def close(self) -> None:
        """Stop, and drop the connections that are still open."""
        self.entrance.close()
        if self._opener is not None:
            self._opener.cancel()
        for task in self._tasks:
            task.cancel()
        for session in self._all_sessions:
            session.abort()
        if self._tasks:
            await self._send_beacon(self.beacons.farewell(self.now()))
        await self.subscriptions.close()
        self.wheel.stop()

    @property
    def on_ack(self) -> Callable[[str, str, int], None] | None:
        """Takes the recipient, the device and the version of an ack; ``None`` without a mailbox."""
        return None if self.acks is None else self.acks.add

    def now(self) -> float:
        """The time on the loop's clock in seconds. All deadlines here are on that clock."""
        assert self._loop is not None, "the gateway is not started"  # noqa: S101 - a caller's bug
        return self._loop.time()

    @property
    def sockets(self) -> Sockets:
        """The HTTP connections. Some of them become sessions here."""
        return self.entrance.sockets

    @property
    def trusted_proxies(self) -> Sequence[Network]:
        """The proxies whose forwarding fields are believed."""
        return self._config.trusted_proxies

    @property
    def path_prefix(self) -> str:
        """The beginning of every path that clients use, which a proxy may have removed."""
        return self._config.path_prefix

    @property
    def verify_every_s(self) -> float:
        """How often what a session was poked for is compared with the mailbox."""
        return self._config.verify_every_s

    @property
    def _audience_pulls_per_s(self) -> float:
        """The setting, reduced in proportion while the instance is slower than at its start."""
        return self._config.audience_pulls_per_s * min(1.0, self.pulls_per_s / _PULLS_PER_S)

    @property
    def lost_pokes(self) -> int:
        """How often verification found a session behind, because its poke was lost."""
        return 0 if self.verification is None else self.verification.lost

    @property
    def draining(self) -> bool:
        """Whether new sessions are refused because this instance is about to stop."""
        return self.entrance.draining

    def refuse(self) -> None:
        """Refuse new sessions from now on. Open sessions are not affected."""
        self.entrance.shut()

    async def drain(self, window_s: float) -> None:
        """Refuse new sessions, and close the open ones spread over ``window_s`` seconds.

        Returns when all connections are closed, or when the last had its time to answer.
        """
        self.refuse()
        connections = self._all_sessions
        if not connections:
            return
        random.shuffle(connections)
        log.info("drain_started", sessions=len(connections), window_s=window_s)
        start = self.now()
        for position, connection in enumerate(connections):
            ahead_s = start + window_s * position / len(connections) - self.now()
            if ahead_s > 0:
                await asyncio.sleep(ahead_s)
            self._send_away(connection)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.timing.close_timeout_s + 1):
                await self._all_gone.wait()

    # --- where sessions belong ----------------------------------------------------------------

    def apply(self, shard_map: ShardMap, members: Mapping[str, Reach]) -> None:
        """Subscribe to what ``shard_map`` says, and send sessions after their shards' owners."""
        moved = self.shard_routing.see(shard_map, members)
        if not self.entrance.serves:
            return
        self.subscriptions.own(shard_map.owned_by(self.instance))
        self._update_subscriptions()
        if moved:
            self._supervise("move_sessions", partial(self._move_sessions, moved))

    def _update_subscriptions(self) -> None:
        self.subscriptions.want(self.shard_routing.wanted(self.now()))

    async def _move_sessions(self, shards: frozenset[int]) -> None:
        """Send the sessions of ``shards`` after their shards, at a limited rate."""
        await asyncio.sleep(self._config.move_delay_s)
        shard_count = self._config.shard_count
        leaving = [
            each
            for each in self.sessions
            if each.is_session and shard_of(each.recipient, shard_count) in shards
        ]
        random.shuffle(leaving)
        for connection in leaving:
            # The map may have changed since.
            if self.shard_routing.url_for(connection.recipient) is not None:
                self._send_away(connection)
                await asyncio.sleep(1 / self._config.moves_per_s)

    def _send_away(self, connection: Listener) -> None:
        """Move the client to its shard's owner, or close if there is no other."""
        url = self.shard_routing.url_for(connection.recipient)
        if url is None:
            connection.close(1012, "this instance can't serve you now")
        else:
            self.moved += 1
            connection.move(url)

    @property
    def is_deaf(self) -> bool:
        """Whether the transport has been in doubt for long, so that pokes may be lost."""
        return self._doubt_s >= self._config.deaf_after_s

    def let_go(self, *, lets_go: bool) -> None:
        """Send all sessions to other members from now on, at a limited rate, or no longer."""
        began = lets_go and not self.shard_routing.lets_go
        self.shard_routing.lets_go = lets_go
        if began:
            self._supervise("send_away", self._send_all_away)

    async def _send_all_away(self) -> None:
        leaving = [each for each in self.sessions if each.is_session]
        random.shuffle(leaving)
        log.info("sessions_offered_elsewhere", sessions=len(leaving))
        for connection in leaving:
            if not self.shard_routing.lets_go:
                return
            self._send_away(connection)
            await asyncio.sleep(1 / self._config.moves_per_s)

    # --- sessions -----------------------------------------------------------------------------

    @property
    def _all_sessions(self) -> list[Listener]:
        """Every session whose socket is not closed yet, those that are closing included."""
        return [*(each for each in self.sessions if each.is_session), *self._leaving]

    def _admitted(self, connection: Connection, handshake: Handshake) -> None:
        self.add(connection, moved=handshake.moved, response=handshake.response)

    def add(self, session: Listener, *, moved: bool, response: bytes = b"") -> None:
        """Accept the handshake of a session, and add it or send it to its shard's owner.

        ``moved``: its client was redirected here, and is not redirected again. ``response`` accepts
        the handshake.
        """
        self._all_gone.clear()
        recipient = session.recipient
        if not moved and self.shard_routing.url_for(recipient) is not None:
            self._leaving.add(session)
            session.answer(response)
            self._send_away(session)
            return
        self.hear(session, response)

    def hear(self, session: Listener, response: bytes = b"") -> None:
        """Add a session, or what a session listens to, and open it once its shard is live."""
        recipient = session.recipient
        replaced = self.sessions.add(session)
        if self.shard_routing.enter(recipient):
            # Not with the next tick: the subscription that covers this shard may be retiring.
            self._update_subscriptions()
        if replaced is not None:
            self.shard_routing.leave(recipient)
            self._leaving.add(replaced)
            replaced.close(4409, "replaced: the recipient has too many sessions")
        if self.subscriptions.covers(recipient):
            self._open(session, response)
        else:
            session.answer(response)
            self._waiting[session] = None

    def _open(self, session: Listener, response: bytes = b"") -> None:
        # Sessions that began together, as after a restart, must not be pinged together.
        session.open(spread(self._config.timing.ping_interval_s, 0.5, 1.0), response)
        if isinstance(session, PolledSession) and not session.lasts:
            return  # its own call reads the mailbox as often, and before it ends
        if self.verification is not None:
            self.verification.add(session)
        self.on_ready(session.recipient, session.device)

    def poll(
        self, identity: Identity, device: str, address: str, *, lasts: bool, moved: bool
    ) -> PolledSession:
        """Begin a session without a socket: for one call, or if it ``lasts`` for several.

        ``moved``: its client was sent here, and is not sent on.

        Raises:
            RefusedError: this instance takes no sessions, or no more now.
        """
        polled = self.entrance.admit_polled(identity, device, address, lasts=lasts)
        self.add(polled, moved=moved)
        return polled

    def deliver(self, poke: Poke) -> None:
        """Route ``poke`` to the sessions here, before the transport brings it."""
        if self.sessions.find(poke.recipient):
            self.bridge.handle_poke(poke)

    def _open_waiting(self) -> None:
        """Send ``ready`` to waiting sessions, at the rate of the pulls that it causes."""
        if self._opener is None:
            self._open_next()

    def _open_next(self) -> None:
        self._opener = None
        at_once = max(1, int(self.pulls_per_s * _READY_EVERY_S))
        covered = (each for each in self._waiting if self.subscriptions.covers(each.recipient))
        opened = list(islice(covered, at_once))
        for connection in opened:
            del self._waiting[connection]
            self._open(connection)
        if len(opened) == at_once and self._loop is not None:
            self._opener = self._loop.call_later(_READY_EVERY_S, self._open_next)

    def _on_missed(self, concerns: Callable[[str], bool]) -> None:
        """Recover what may have been lost in a gap: pokes and disconnects."""
        self.bridge.wake(concerns, self.pulls_per_s)
        self._recall.on_missed()

    async def _keep_time(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self.bridge.mark_time()
            self._update_subscriptions()
            self._watch_doubt()

    def _watch_doubt(self) -> None:
        """Count the seconds in which the transport was in doubt, and pokes may have been lost.

        Without a mailbox, poke all sessions now and then.
        """
        was_deaf = self.is_deaf
        self._doubt_s = self._doubt_s + 1 if self.subscriptions.is_in_doubt else 0
        if self.is_deaf and not was_deaf:
            log.warning(
                "instance_deaf", reason=self.subscriptions.trouble, sessions=len(self.sessions)
            )
        elif was_deaf and not self.is_deaf:
            log.info("instance_hears_again", sessions=len(self.sessions))
            self.let_go(lets_go=False)
        self._unsure_s = self._unsure_s + 1 if self._is_unsure else 0
        is_blind = self.verification is None or self.verification.is_blind
        if is_blind and self._unsure_s and self._unsure_s % _DOUBT_POKE_EVERY_S == 0:
            self.bridge.wake(lambda _: True, self.pulls_per_s)

    @property
    def _is_unsure(self) -> bool:
        """Whether pokes for the sessions here may be lost."""
        return self.subscriptions.is_in_doubt or self.beacons.silent_members > 0

    async def _keep_verifying(self, verification: Verification) -> None:
        while True:
            await asyncio.sleep(STEP_S)
            await verification.step(self.now(), in_doubt=self._is_unsure)

    async def _keep_beacons(self) -> None:
        while True:
            if (reason := self.beacons.step(self.now())) is not None:
                self.subscriptions.report_gap(reason)
            if (beacon := self.beacons.next(self.now(), spread(1.0, 0.8, 1.2))) is not None:
                await self._send_beacon(beacon)
            await asyncio.sleep(1.0)

    async def _send_beacon(self, beacon: Beacon) -> None:
        with contextlib.suppress(TransportError, TimeoutError):
            async with asyncio.timeout(_BEACON_TIMEOUT_S):
                await self.subscriptions.transport.publish([Signal(encode_beacon(beacon))])
                self.beacons.sent(beacon)

    def _supervise(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        self._keep(supervise(name, work))

    def _do_once(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run ``work`` in the background. It is not repeated when it fails."""
        self._keep(run_once(name, work()))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- called by a connection -------------------------------------------------------------------

    def forget(self, connection: Connection | PolledSession) -> None:
        """The session of ``connection`` is over."""
        for listening in listenings(connection.session):
            listening.abort()
        self.wheel.cancel(connection)
        self.remove(connection)

    def remove(self, session: Listener) -> None:
        """Forget ``session``, whose socket is closed, or a recipient that a session listened to."""
        if self.sessions.remove(session):
            self.shard_routing.leave(session.recipient)
        self._waiting.pop(session, None)
        if not session.is_session:
            return
        self._leaving.discard(session)
        if not self.sessions and not self._leaving:
            self._all_gone.set()
        self.entrance.left(session)


def _identity(config: GatewayConfig) -> Beacon:
    """What every beacon of an instance says."""
    return Beacon(
        sender=config.instance,
        incarnation=secrets.token_hex(8),
        number=1,
        up_s=0.0,
        every_s=FASTEST_S,
        cluster=config.cluster,
        shard_count=config.shard_count,
        carrier=config.carrier,
        assignment=config.assignment,
        group_prefixes=group_prefixes_text(config.group_prefixes),
    )
