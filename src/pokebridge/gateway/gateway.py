"""The WebSocket half of an instance: it admits sessions, keeps them, and ends them.

HTTP upgrade → upgrade() → [token] → Connection → SessionMap → ``ready`` once the bridge is live
"""

import asyncio
import contextlib
import random
import secrets
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import islice
from math import inf
from typing import Protocol

import structlog

from pokebridge.backoff import spread
from pokebridge.errors import AuthError, KeysUnavailableError, PokebridgeError, RefusedError
from pokebridge.gateway.admission import Admission, retry_within
from pokebridge.gateway.bridge import Bridge
from pokebridge.gateway.connection import Connection
from pokebridge.gateway.handshake import (
    Handshake,
    Network,
    UpgradeRequest,
    read_handshake,
    refusal_response,
)
from pokebridge.gateway.session_map import SessionMap
from pokebridge.gateway.shard_routing import Reach, ShardRouting
from pokebridge.gateway.subscriptions import SubscriptionManager, SubscriptionTiming
from pokebridge.gateway.wheel import Wheel
from pokebridge.model import Mode
from pokebridge.placement import Placement, PlacementRules, ShardMap
from pokebridge.session import Session, State, Timing
from pokebridge.sharding import DEFAULT_SHARD_COUNT, shard_of
from pokebridge.transport.base import Transport

log = structlog.get_logger(__name__)

# Between two batches of sessions that hear ``ready`` after they had to wait for it.
_READY_EVERY_S = 0.1


class Identity(Protocol):
    """What a valid token says: who, and until when (Unix seconds)."""

    @property
    def subject(self) -> str:
        """The recipient."""

    @property
    def expires_at(self) -> float:
        """Unix seconds."""


class Verifier(Protocol):
    """Tells whose a token is; raises AuthError when it is nobody's."""

    def verify_now(self, token: str) -> Identity:
        """At once; raises KeysUnavailableError when a key would have to be fetched."""

    async def verify(self, token: str) -> Identity:
        """The same, and fetches the key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """The gateway's settings; ``None`` is no limit, and any Origin."""

    instance: str
    allowed_origins: frozenset[str] | None = frozenset()
    trusted_proxies: Sequence[Network] = ()
    max_sessions: int | None = None
    max_sessions_per_recipient: int = 64
    max_sessions_per_address: int | None = None
    handshakes_per_s: float | None = None
    timing: Timing = field(default_factory=Timing)
    subscription_timing: SubscriptionTiming = field(default_factory=SubscriptionTiming)
    shard_count: int = DEFAULT_SHARD_COUNT
    mode: Mode = "fanout"
    """Until the first shard map is seen."""
    placement: PlacementRules = field(default_factory=PlacementRules)
    max_session_s: float = inf
    """How long a session lasts at most; each a bit less, so that they do not end together."""
    moves_per_s: float = 200.0
    """The rate at which live sessions follow their shard."""
    move_delay_s: float = 2.0
    """Until then a new owner has proven its subscription."""


class Gateway:
    """All sessions of one instance, and the bridge that feeds them."""

    def __init__(self, config: GatewayConfig, transport: Transport, verifier: Verifier) -> None:
        self._config = config
        self._verifier = verifier
        self._admission = Admission(
            handshakes_per_s=config.handshakes_per_s,
            max_sessions=config.max_sessions,
            max_sessions_per_address=config.max_sessions_per_address,
        )
        self.sessions: SessionMap[Connection] = SessionMap(config.max_sessions_per_recipient)
        self.bridge = Bridge(self.sessions)
        self.subscriptions = SubscriptionManager(
            transport,
            self.bridge.on_signal,
            instance=config.instance,
            shard_count=config.shard_count,
            timing=config.subscription_timing,
            on_live=self._open_waiting,
            on_missed=self._wake,
        )
        self.shard_routing = ShardRouting(
            config.instance,
            ShardMap(0, config.mode, (None,) * config.shard_count),
            Placement(config.instance, config.placement),
        )
        self.wheel = Wheel()
        self.instance = config.instance
        self.handshakes: Counter[str] = Counter()
        """Handshakes by outcome: the HTTP status that they were answered with."""
        self.pulls_per_s = 1000.0
        """The rate to which the pulls after a gap are spread."""
        self.on_ready: Callable[[str, str], None] = lambda _recipient, _device: None
        """Told of each session that becomes ready; must not block."""
        self.moved = 0
        """Sessions that were sent after their shard."""
        self._connections: set[Connection] = set()
        self._waiting: dict[Connection, None] = {}
        self._opener: asyncio.TimerHandle | None = None
        self._all_gone = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._serves = False

    async def start(self, *, serves: bool = True) -> None:
        """Subscribe and begin to take sessions, or refuse them all unless it ``serves``.

        Raises:
            TransportError: the transport can't be had.
        """
        self._loop = asyncio.get_running_loop()
        self._serves = serves
        self.wheel.start(self._loop)
        if not serves:
            return
        await self.subscriptions.start(self.shard_routing.wanted(self.now()))
        self._spawn(self._keep_time())

    async def close(self) -> None:
        """Stop; whoever is still connected is cut off."""
        self.refuse()
        if self._opener is not None:
            self._opener.cancel()
        for task in self._tasks:
            task.cancel()
        for connection in list(self._connections):
            connection.abort()
        await self.subscriptions.close()
        self.wheel.stop()

    def now(self) -> float:
        """Seconds of the loop's clock, the one that all deadlines here are in."""
        assert self._loop is not None, "the gateway is not started"  # noqa: S101 - a caller's bug
        return self._loop.time()

    @property
    def draining(self) -> bool:
        """Whether new sessions are refused because this instance is about to stop."""
        return self._admission.draining

    def refuse(self) -> None:
        """Take no new sessions any more; those there are stay."""
        self._admission.draining = True

    async def drain(self, window_s: float, code: int = 1012) -> None:
        """Refuse new sessions and close those there are, spread over ``window_s`` seconds.

        Returns when all are gone, or when those left have had their time to answer.
        """
        self.refuse()
        connections = list(self._connections)
        if not connections:
            return
        random.shuffle(connections)
        log.info("draining", sessions=len(connections), window_s=window_s)
        start = self.now()
        for position, connection in enumerate(connections):
            ahead_s = start + window_s * position / len(connections) - self.now()
            if ahead_s > 0:
                await asyncio.sleep(ahead_s)
            self._send_away(connection, code)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.timing.close_timeout_s + 1):
                await self._all_gone.wait()

    # --- where sessions belong ----------------------------------------------------------------

    def apply(self, shard_map: ShardMap, members: Mapping[str, Reach]) -> None:
        """Hold what ``shard_map`` says, and let sessions follow their shard to the owner's URL."""
        moved = self.shard_routing.see(shard_map, members)
        if not self._serves:
            return
        self.subscriptions.own(shard_map.owned_by(self.instance))
        self._update_subscriptions()
        if moved:
            self._spawn(self._move_sessions(moved))

    def _update_subscriptions(self) -> None:
        self.subscriptions.want(self.shard_routing.wanted(self.now()))

    async def _move_sessions(self, shards: frozenset[int]) -> None:
        """Send the sessions of ``shards`` after them, spread out, never all at once."""
        await asyncio.sleep(self._config.move_delay_s)
        shard_count = self._config.shard_count
        leaving = [
            each for each in self.sessions if shard_of(each.recipient, shard_count) in shards
        ]
        random.shuffle(leaving)
        for connection in leaving:
            if (
                self.shard_routing.url_for(connection.recipient) is not None
            ):  # the map may have moved on
                self._send_away(connection, 1012)
                await asyncio.sleep(1 / self._config.moves_per_s)

    def _send_away(self, connection: Connection, code: int) -> None:
        """To its recipient's home when that is elsewhere, else with ``code`` to anywhere."""
        url = self.shard_routing.url_for(connection.recipient)
        if url is None:
            connection.close(code, "this instance stops")
        else:
            self.moved += 1
            connection.move(url)

    # --- admitting --------------------------------------------------------------------------------

    def upgrade(
        self, transport: asyncio.Transport, request: UpgradeRequest, hand_over: Callable[[], None]
    ) -> None:
        """Answer an upgrade request; ``hand_over`` is called just before the transport is taken.

        Until then, which is at once unless a key must be fetched first, the transport remains the
        caller's, with reading paused, and so does the deadline.
        """
        try:
            if not self._serves:
                raise RefusedError(HTTPStatus.NOT_FOUND, "this instance takes no sessions")
            self._check_handshake()
            handshake = read_handshake(
                request,
                allowed_origins=self._config.allowed_origins,
                trusted_proxies=self._config.trusted_proxies,
            )
            self._admission.check_session(handshake.address)
            identity = self._verifier.verify_now(handshake.token)
        except KeysUnavailableError:
            transport.pause_reading()
            self._spawn(self._upgrade_later(transport, handshake, hand_over))
        except PokebridgeError as error:
            self._refuse(transport, error)
        else:
            self._accept(transport, handshake, identity, hand_over)

    def _check_handshake(self) -> None:
        # The loop's clock stands still during a turn: after a long one, time would seem to have
        # passed at once, and the next handshakes with it.
        self._admission.check_handshake(time.monotonic())

    async def _upgrade_later(
        self, transport: asyncio.Transport, handshake: Handshake, hand_over: Callable[[], None]
    ) -> None:
        try:
            identity = await self._verifier.verify(handshake.token)
            # All who waited for the key are here at once, and a drain may have begun meanwhile.
            self._check_handshake()
            self._admission.check_session(handshake.address)
        except PokebridgeError as error:
            self._refuse(transport, error)
        else:
            if not transport.is_closing():
                self._accept(transport, handshake, identity, hand_over)

    def _refuse(self, transport: asyncio.Transport, error: PokebridgeError) -> None:
        headers = error.headers if isinstance(error, RefusedError) else {}
        if isinstance(error, KeysUnavailableError):
            headers = retry_within(2, 10)
        elif isinstance(error, AuthError):
            headers = {"WWW-Authenticate": "Bearer"}
        self.handshakes[str(int(error.status))] += 1
        transport.write(refusal_response(error.status, str(error), headers))
        transport.close()

    def _accept(
        self,
        transport: asyncio.Transport,
        handshake: Handshake,
        identity: Identity,
        hand_over: Callable[[], None],
    ) -> None:
        now = self.now()
        session = Session(
            identity.subject,
            handshake.device,
            secrets.token_hex(8),
            expires_at=self._on_our_clock(identity.expires_at),
            now=now,
            timing=self._config.timing,
            ends_at=self._end_of_session(now),
        )
        connection = Connection(self, transport, session, handshake.address)
        self.handshakes["101"] += 1
        self._admission.enter(handshake.address)
        self._connections.add(connection)
        self._all_gone.clear()
        hand_over()
        connection.begin(handshake.response)
        log.debug("session accepted", session=session.id, device=session.device)
        if not handshake.moved and self.shard_routing.url_for(session.recipient) is not None:
            self._send_away(connection, 1012)
            return
        replaced = self.sessions.add(connection)
        if self.shard_routing.enter(session.recipient):
            # Now, and not with the next tick: what covers it until then may be about to go.
            self._update_subscriptions()
        if replaced is not None:
            self.shard_routing.leave(session.recipient)
            replaced.close(4409, "replaced: the recipient has too many sessions")
        if self.subscriptions.covers(session.recipient):
            self._open(connection)
        else:
            self._waiting[connection] = None

    def _end_of_session(self, now: float) -> float:
        if self._config.max_session_s == inf:
            return inf  # the one object for all
        # Sessions that came together must not go together.
        return now + spread(self._config.max_session_s, 0.8, 1.0)

    def _open(self, connection: Connection) -> None:
        # Sessions that came together, as after a restart, are not pinged together.
        connection.open(spread(self._config.timing.ping_interval_s, 0.5, 1.0))
        self.on_ready(connection.recipient, connection.session.device)

    def _open_waiting(self) -> None:
        """Say ``ready`` to those who waited, no faster than the pulls that it causes are borne."""
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

    def _wake(self, concerns: Callable[[str], bool]) -> None:
        self._spawn(self.bridge.wake(concerns, self.pulls_per_s))

    async def _keep_time(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self.bridge.mark_time()
            self._update_subscriptions()

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- what a connection asks for ---------------------------------------------------------------

    def forget(self, connection: Connection) -> None:
        """The socket of ``connection`` is gone."""
        self._connections.discard(connection)
        if not self._connections:
            self._all_gone.set()
        self._waiting.pop(connection, None)
        if self.sessions.remove(connection):
            self.shard_routing.leave(connection.recipient)
        self.wheel.cancel(connection)
        self._admission.leave(connection.address)
        log.debug("session ended", session=connection.session.id)

    def renew(self, connection: Connection, token: str) -> None:
        """The client of ``connection`` brings a new token."""
        try:
            identity = self._verifier.verify_now(token)
        except KeysUnavailableError:
            self._spawn(self._renew_later(connection, token))
        except AuthError as error:
            connection.close(error.close_code, str(error))
        else:
            self._renewed(connection, identity)

    async def _renew_later(self, connection: Connection, token: str) -> None:
        try:
            identity = await self._verifier.verify(token)
        except KeysUnavailableError:
            # An outage of the key server ends nobody's session: the old token goes on.
            log.warning("no keys to renew a token with", session=connection.session.id)
        except AuthError as error:
            connection.close(error.close_code, str(error))
        else:
            self._renewed(connection, identity)

    def _renewed(self, connection: Connection, identity: Identity) -> None:
        if identity.subject != connection.recipient:
            connection.close(4403, "a new token must be of the same recipient")
        elif connection.session.state is State.OPEN:
            connection.renew(self._on_our_clock(identity.expires_at))

    def _on_our_clock(self, unix_s: float) -> float:
        return self.now() + (unix_s - time.time())
