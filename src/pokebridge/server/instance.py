"""The life of one running instance: how its parts work together, and in which order they stop.

Processor ──append──▶ mailbox          Publisher ──signals──▶ transport ──▶ gateway.bridge
    ▲                    ▲                  ▲                                   │
    └────── HTTP API ────┴──────────────────┘                        sessions ◀─┘
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from pokebridge.api import app as api
from pokebridge.api import metrics
from pokebridge.api.waiting import Waiting
from pokebridge.asgi import ASGIApp
from pokebridge.border import unforeseen
from pokebridge.cluster.node import Cluster
from pokebridge.cluster.watchers import CONSOLE_DEVICE, Watchers
from pokebridge.durations import RequestDurations
from pokebridge.errors import PokebridgeError
from pokebridge.fallback.push import Pulls, Pusher
from pokebridge.gateway.gateway import Gateway
from pokebridge.gateway.handshake import Network
from pokebridge.gateway.listener import Listener
from pokebridge.ingress.ingress import Ingress
from pokebridge.mailbox.base import Mailbox
from pokebridge.mailbox.devices import KnownDevices
from pokebridge.model import DEFAULT_DEVICE, PublishPokes, SendMessage
from pokebridge.processor import Processor
from pokebridge.publisher import Publisher
from pokebridge.server import descriptors
from pokebridge.server.capacity import PullCapacity
from pokebridge.server.revocations import Revocations
from pokebridge.supervisor import failing_tasks, run_once, supervise, task_failures
from pokebridge.telemetry import Metric
from pokebridge.tokens import SignToken, TokenVerifier
from pokebridge.wire import poke_frame

if TYPE_CHECKING:  # its libraries are an extra
    from pokebridge.tracing import Tracing

_CHECK_TIMEOUT_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What an instance is made of. ``server/assemble.py`` makes it from the settings.

    Attributes:
        name: the instance's name.
        roles: what the instance does.
        mailbox: keeps the messages; ``None`` on an instance that keeps none.
        gateway: the sessions.
        cluster: the instance's place in its cluster.
        verifier: verifies the tokens of callers.
        publisher: publishes pokes.
        processor: commits messages and pokes their recipients; ``None`` without a mailbox.
        send: sends a message through the processor; ``None`` without a mailbox.
        publish: publishes pokes for the API.
        revocations: revokes tokens, and follows what others revoke.
        requests: how long requests take.
        devices: the devices that messages wait for; ``None`` without a mailbox.
        pulls: cancels pushes when a recipient pulls; ``None`` where no push is ever owed.
        pusher: sends the pushes that are owed; ``None`` where another instance does it, or nobody.
        ingress: sends what arrives in a queue; ``None`` without one.
        tracing: records traces; it is around the transport already.
        sign_dev_token: signs a token for anybody who asks; given with ``--dev`` alone.
        allowed_origins: whose pages may call the API from a browser; ``"*"`` stands for any.
        trusted_proxies: whose forwarding fields are believed.
        red_line_ops_per_s: deliveries a second above which fan-out is no longer advisable.
        drain_s: seconds over which a drain spreads the closing of sessions.
    """

    name: str
    roles: AbstractSet[str]
    mailbox: Mailbox | None
    gateway: Gateway
    cluster: Cluster
    verifier: TokenVerifier
    publisher: Publisher
    processor: Processor | None
    send: SendMessage | None
    publish: PublishPokes
    revocations: Revocations
    requests: RequestDurations
    devices: KnownDevices | None
    pulls: Pulls | None
    pusher: Pusher | None
    ingress: Ingress | None
    tracing: "Tracing | None"
    sign_dev_token: SignToken | None
    allowed_origins: Sequence[str]
    trusted_proxies: Sequence[Network]
    red_line_ops_per_s: float
    drain_s: float


class Instance:
    """The life of one instance: its parts start, work together, drain and stop.

    - ``parts``: what it is made of; ``gateway`` and ``cluster`` are two of them
    - ``more_reasons``, ``more_metrics``: why it is not ready, and what is counted, beside its parts
    - ``_watchers``: who is poked when the cluster changes
    - ``_capacity``: the rate to which pulls after a gap are spread
    - ``_pacer``, ``_draining``: the task that follows that rate, and the drain
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.gateway = parts.gateway
        self.cluster = parts.cluster
        parts.gateway.on_ready = self._note_device
        if parts.gateway.acks is not None:
            parts.gateway.acks.on_recorded = self.note_pulled
        self.more_reasons: Callable[[], Iterable[str]] = tuple
        self.more_metrics: Callable[[], Mapping[Metric, metrics.Value]] = dict
        self._watchers = Watchers(
            parts.cluster.status,
            parts.publisher.publish,
            self._poke_console,
            parts.gateway.bridge.handle_poke,
        )
        parts.cluster.count_consoles = lambda: sum(
            len(self._consoles_of(recipient)) for recipient in self._watchers.recipients
        )
        self._capacity = PullCapacity()
        self._pacer: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None

    def _consoles_of(self, recipient: str) -> Sequence[Listener]:
        sessions = self.gateway.sessions.find(recipient)
        return [each for each in sessions if each.device == CONSOLE_DEVICE and each.is_open]

    def _poke_console(self, recipient: str) -> bool:
        consoles = self._consoles_of(recipient)
        for session in consoles:
            session.notify(None, poke_frame(None))
        return bool(consoles)

    def create_app(self) -> ASGIApp:
        """Create the ASGI app that serves this instance's API."""
        parts, mailbox = self.parts, None
        registry = CollectorRegistry()
        metrics.expose(registry, self._read_metrics)
        if parts.mailbox is not None and parts.send is not None and parts.devices is not None:
            mailbox = api.MailboxSide(
                mailbox=parts.mailbox,
                send=parts.send,
                on_pulled=self.note_pulled,
                devices=parts.devices,
            )
        return api.create_api(
            api.Parts(
                verifier=parts.verifier,
                publish=parts.publish,
                disconnect=parts.revocations.disconnect,
                mailbox=mailbox,
                cluster=parts.cluster,
                watchers=self._watchers,
                not_ready=self._not_ready,
                registry=registry,
                requests=parts.requests,
                waiting=Waiting(parts.gateway) if "gateway" in parts.roles else None,
                has_calls="api" in parts.roles,
                middleware=[] if parts.tracing is None else [parts.tracing.middleware],
                allowed_origins=parts.allowed_origins,
                trusted_proxies=parts.trusted_proxies,
                path_prefix=parts.gateway.path_prefix,
                revoke=parts.revocations.revoke,
                sign_dev_token=parts.sign_dev_token,
            )
        )

    # --- life ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start every part that this instance's roles ask for.

        Raises:
            TransportError: the transport can't be had.
            CoordinationError: the coordination store can't be had.
            ConfigError: the cluster has another number of shards.
        """
        parts = self.parts
        await parts.revocations.start()
        await parts.gateway.start(serves="gateway" in parts.roles)
        await parts.cluster.start()
        for part in (parts.processor, parts.pulls, parts.pusher, parts.ingress):
            if part is not None:
                await part.start()
        self._pacer = supervise("pull_capacity", self._keep_pace)

    def _note_device(self, recipient: str, device: str) -> None:
        """A session is ready: messages wait for its device too, if it has a name of its own."""
        if self.parts.devices is not None and device != DEFAULT_DEVICE:
            self.parts.devices.note(recipient, device)

    def note_pulled(self, recipient: str, version: int) -> None:
        """``recipient`` has pulled, and has everything up to ``version``."""
        if self.parts.pulls is not None:
            self.parts.pulls.note(recipient, version)

    async def _keep_pace(self) -> None:
        """Spread the pulls after a gap to the rate that this instance has proven to handle."""
        while True:
            await asyncio.sleep(1.0)
            descriptors.relieve(self.gateway.sockets)
            self._capacity.settle(self.parts.requests.pulls())
            self.parts.gateway.pulls_per_s = self._capacity.per_s

    def start_drain(self) -> None:
        """Begin to refuse new sessions and to move the open ones elsewhere; returns at once."""
        if self._draining is None:
            self._draining = run_once("drain", self._drain())

    async def _drain(self) -> None:
        self.parts.gateway.refuse()
        await self.parts.cluster.hand_over()
        await self.parts.gateway.drain(self.parts.drain_s)

    async def drain(self) -> None:
        """Drain, or wait for the drain that has begun."""
        self.start_drain()
        assert self._draining is not None  # noqa: S101 - just begun
        await self._draining

    async def close(self) -> None:
        """Stop every part, those that others still need last. The adapters stay open."""
        if self._pacer is not None:
            self._pacer.cancel()
        await self._watchers.close()
        parts = self.parts
        for part in (
            parts.ingress,
            parts.pusher,
            parts.pulls,
            parts.processor,
            parts.devices,
            parts.revocations,
            parts.publisher,
            parts.cluster,
            parts.gateway,
            parts.verifier,
        ):
            if part is not None:
                await part.close()

    # --- what the API asks for ----------------------------------------------------------------

    async def _not_ready(self) -> Sequence[str]:
        parts, reasons = self.parts, []
        if parts.gateway.draining:
            reasons.append("draining")
        if parts.roles == {"coordinator"} and parts.cluster.trouble is not None:
            reasons.append(f"coordination: {parts.cluster.trouble}")
        if "gateway" in parts.roles and parts.gateway.subscriptions.trouble is not None:
            reasons.append(f"transport: {parts.gateway.subscriptions.trouble}")
        if parts.gateway.beacons.trouble is not None:
            reasons.append(f"settings: {parts.gateway.beacons.trouble}")
        # An instance with callers stays ready meanwhile: it can still serve them.
        if parts.roles == {"processor"}:
            if parts.processor is not None and parts.processor.is_cut_off:
                reasons.append("transport: pokes can't be published")
            if parts.ingress is not None and parts.ingress.is_down:
                reasons.append("ingress: the queue can't be read")
        if parts.roles & {"gateway", "api"}:
            reasons += await _trouble_of("tokens", parts.verifier.check)
        if parts.mailbox is not None:
            reasons += await _trouble_of("mailbox", parts.mailbox.check)
        reasons += [f"task: {task} keeps failing, see the log" for task in failing_tasks()]
        return [*reasons, *self.more_reasons()]

    def _read_metrics(self) -> Mapping[Metric, metrics.Value]:
        parts, gateway, cluster = self.parts, self.parts.gateway, self.parts.cluster
        counters, subscriptions = gateway.bridge.counters, gateway.subscriptions
        view, me = cluster.view, parts.name
        numbers: dict[Metric, metrics.Value] = {
            **_doors(gateway),
            Metric.BUILD_INFO: {(version("pokebridge"), me): 1},
            Metric.POKES_PUBLISHED: parts.publisher.published,
            Metric.SIGNALS: counters.signals,
            Metric.SIGNALS_MALFORMED: counters.malformed,
            Metric.SIGNALS_UNTAGGED: subscriptions.untagged,
            Metric.POKES: counters.pokes,
            Metric.POKES_NOISE: counters.noise,
            Metric.POKES_DELIVERED: counters.delivered,
            Metric.POKES_MERGED: counters.merged,
            Metric.GAPS: subscriptions.gaps,
            Metric.PROBES: subscriptions.probes,
            Metric.POKES_LOST: gateway.lost_pokes,
            Metric.BEACONS_LOST: gateway.beacons.lost,
            Metric.PEERS: gateway.beacons.heard,
            Metric.PEERS_SILENT: gateway.beacons.silent_members,
            Metric.DISAGREEMENTS: {
                (setting,): count for setting, count in gateway.beacons.disagreements.items()
            },
            Metric.SUBSCRIPTIONS: len(subscriptions.selections),
            Metric.SHARDS_OWNED: len(view.shard_map.owned_by(me)),
            Metric.CLUSTER_EPOCH: view.shard_map.epoch,
            Metric.CLUSTER_MEMBERS: len(view.members),
            Metric.CLUSTER_LEADER: cluster.is_leader,
            Metric.CLUSTER_PARTITIONED: view.shard_map.mode == "partitioned",
            Metric.NOISE_RATIO: gateway.bridge.traffic.noise_ratio,
            Metric.GLOBAL_OPS: cluster.ops_per_s,
            Metric.RED_LINE: parts.red_line_ops_per_s,
            Metric.OVER_RED_LINE: cluster.red_line.is_over,
            Metric.PULL_CAPACITY: self._capacity.per_s,
            Metric.TASK_FAILURES: {(task,): count for task, count in task_failures.items()},
            Metric.COORDINATION_UP: cluster.trouble is None,
        }
        if gateway.acks is not None:
            numbers[Metric.ACKS_HEARD] = gateway.acks.heard
            numbers[Metric.ACKS_RECORDED] = gateway.acks.recorded
        if parts.processor is not None:
            numbers[Metric.MESSAGES_COMMITTED] = parts.processor.stats.messages_committed
            numbers[Metric.POKES_UNPUBLISHABLE] = parts.processor.stats.pokes_unpublishable
            numbers[Metric.MESSAGES_REFUSED] = parts.processor.stats.messages_refused
        if parts.pusher is not None:
            numbers[Metric.PUSHES] = {
                (result,): count for result, count in parts.pusher.results.items()
            }
        if parts.ingress is not None:
            numbers[Metric.INGRESS_UP] = not parts.ingress.is_down
            numbers[Metric.INGRESS_MESSAGES] = {
                (result,): count for result, count in parts.ingress.results.items()
            }
        numbers.update(self.more_metrics())
        return numbers


def _doors(gateway: Gateway) -> dict[Metric, metrics.Value]:
    handshakes = gateway.entrance.handshakes
    return {
        Metric.HANDSHAKES: {(status,): count for status, count in handshakes.items()},
        Metric.SESSIONS: len(gateway.sessions),
        Metric.LISTENED: gateway.sessions.listened,
        Metric.SESSIONS_MOVED: gateway.moved,
        Metric.CONNECTIONS: len(gateway.sockets),
        Metric.CONNECTIONS_LIMITED: gateway.sockets.limited,
        Metric.UNFORESEEN_INPUTS: {(border,): count for border, count in unforeseen.items()},
    }


async def _trouble_of(part: str, check: Callable[[], Awaitable[None]]) -> Sequence[str]:
    try:
        async with asyncio.timeout(_CHECK_TIMEOUT_S):
            await check()
    except PokebridgeError as error:
        return [f"{part}: {error}"]
    except TimeoutError:
        return [f"{part}: no answer within {_CHECK_TIMEOUT_S:g} s"]
    return []
