"""One running instance: its parts, how they are put together, and in which order they stop.

Processor ──append──▶ mailbox          Publisher ──signals──▶ transport ──▶ gateway.bridge
    ▲                    ▲                  ▲                                   │
    └────── HTTP API ────┴──────────────────┘                        sessions ◀─┘
"""

import asyncio
import resource
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING

import structlog
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from pokebridge import __version__
from pokebridge.api import app as api
from pokebridge.api import metrics
from pokebridge.api.messages import MailboxSide
from pokebridge.cluster.node import Cluster
from pokebridge.cluster.watchers import Watchers
from pokebridge.coordination.base import Coordination
from pokebridge.durations import RequestDurations
from pokebridge.errors import PokebridgeError
from pokebridge.fallback.push import Pulls, Pusher
from pokebridge.fallback.webhook import Webhook
from pokebridge.gateway.config import GatewayConfig
from pokebridge.gateway.gateway import Gateway
from pokebridge.ingress.base import Source
from pokebridge.ingress.ingress import Ingress
from pokebridge.mailbox.base import Mailbox
from pokebridge.mailbox.devices import KnownDevices
from pokebridge.mailbox.pushes import PushQueue, pushes_of
from pokebridge.model import DEFAULT_DEVICE, NewMessage, Poke, Receipt
from pokebridge.processor import Processor
from pokebridge.publisher import Publisher
from pokebridge.server.capacity import PullCapacity
from pokebridge.session import Timing
from pokebridge.settings import Settings
from pokebridge.submission import read_queued
from pokebridge.telemetry import Metric
from pokebridge.tokens import TokenVerifier, sign_token
from pokebridge.transport.base import Transport

if TYPE_CHECKING:  # its libraries are an extra
    from pokebridge.tracing import Tracing

log = structlog.get_logger(__name__)

# Descriptors that are no sessions: the listener, the mailbox, the transport, HTTP connections.
_RESERVED_DESCRIPTORS = 1000
_CHECK_TIMEOUT_S = 2.0


class Instance:
    """All parts of one instance, from settings and the adapters chosen for it."""

    def __init__(
        self,
        settings: Settings,
        transport: Transport,
        mailbox: Mailbox | None,
        coordination: Coordination,
        *,
        url: str = "",
        ingress: Source | None = None,
        tracing: "Tracing | None" = None,
    ) -> None:
        """``url`` is where clients reach this instance and no other, empty when they can't."""
        self.settings = settings
        self._transport = transport
        self._mailbox = mailbox
        self._coordination = coordination
        self._publisher = Publisher(transport, shard_count=settings.shard_count)
        self._processor: Processor | None = None
        self._send: Callable[[NewMessage], Awaitable[Receipt]] | None = None
        self._devices = None if mailbox is None else KnownDevices(mailbox)
        if mailbox is not None:
            does_upkeep = "processor" in settings.roles
            self._processor = Processor(mailbox, self._publisher, does_upkeep=does_upkeep)
            self._send = self._processor.send
            if tracing is not None:
                self._send = tracing.sending(self._send)
        queue = pushes_of(mailbox)
        self._pulls = None if queue is None else Pulls(queue)
        self._pusher = None if queue is None else _pusher(settings, queue)
        self._ingress: Ingress | None = None
        if ingress is not None and self._send is not None:
            self._ingress = Ingress(ingress, read_queued, self._send)
        self._verifier = TokenVerifier(
            secret=_reveal(settings.jwt_secret),
            previous_secret=_reveal(settings.jwt_previous_secret),
            jwks_url=settings.jwks_url,
            issuer=settings.jwt_issuer,
            audience=settings.jwt_audience,
        )
        self.gateway = Gateway(_gateway_config(settings), transport, self._verifier)
        self.gateway.on_ready = self._note_device
        self._requests = RequestDurations()
        self.cluster = Cluster(
            settings,
            self.gateway,
            coordination,
            self._requests,
            url=url,
            has_peers=transport.is_shared,
            on_drain=self.start_drain,
        )
        self._watchers = Watchers(
            self.cluster.status, self._publisher.publish, self.gateway.bridge.handle_poke
        )
        self._tracing = tracing
        self._capacity = PullCapacity()
        self._pacer: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None
        self.app = self._create_app()

    def _create_app(self) -> FastAPI:
        registry = CollectorRegistry()
        metrics.expose(registry, self._read_metrics)
        settings, mailbox = self.settings, None
        if self._mailbox is not None and self._send is not None and self._devices is not None:
            mailbox = MailboxSide(
                mailbox=self._mailbox,
                send=self._send,
                on_pulled=self._note_pulled,
                devices=self._devices,
            )
        signaller: Publisher | _TracedPublisher = self._publisher
        if self._tracing is not None:
            sessions = self.gateway.sessions
            self._tracing.is_here = lambda recipient: bool(sessions.find(recipient))
            signaller = _TracedPublisher(self._publisher, self._tracing)
        return api.create_api(
            api.Parts(
                verifier=self._verifier,
                signaller=signaller,
                mailbox=mailbox,
                cluster=self.cluster,
                watchers=self._watchers,
                operations=api.Operations(
                    not_ready=self._not_ready, registry=registry, requests=self._requests
                ),
                has_calls="api" in settings.roles,
                middleware=[] if self._tracing is None else [self._tracing.middleware],
                allowed_origins=settings.allowed_origins,
                trusted_proxies=settings.trusted_proxies,
                sign_dev_token=self._sign_dev_token if settings.dev else None,
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
        await self.gateway.start(serves="gateway" in self.settings.roles)
        await self.cluster.start()
        for part in (self._processor, self._pulls, self._pusher, self._ingress):
            if part is not None:
                await part.start()
        self._pacer = asyncio.create_task(self._keep_pace())

    def _note_device(self, recipient: str, device: str) -> None:
        """A session is ready: messages wait for its device too, if it has a name of its own."""
        if self._devices is not None and device != DEFAULT_DEVICE:
            self._devices.note(recipient, device)

    def _note_pulled(self, recipient: str, version: int) -> None:
        if self._pulls is not None:
            self._pulls.note(recipient, version)

    async def _keep_pace(self) -> None:
        """Let the pulls after a gap spread to what this instance has shown to bear."""
        while True:
            await asyncio.sleep(1.0)
            self._capacity.settle(self._requests.pulls())
            self.gateway.pulls_per_s = self._capacity.per_s

    def start_drain(self) -> None:
        """Begin to refuse new sessions and to send those there are elsewhere; returns at once."""
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        self.gateway.refuse()
        await self.cluster.hand_over()
        await self.gateway.drain(self.settings.drain_s)

    async def drain(self) -> None:
        """Drain, or wait for the drain that has begun."""
        self.start_drain()
        assert self._draining is not None  # noqa: S101 - just begun
        await self._draining

    async def close(self) -> None:
        """Stop every part, those that others still need last."""
        if self._pacer is not None:
            self._pacer.cancel()
        await self._watchers.close()
        for part in (self._ingress, self._pusher, self._pulls, self._processor, self._devices):
            if part is not None:
                await part.close()
        await self._publisher.close()
        await self.cluster.close()
        await self.gateway.close()
        await self._verifier.close()
        await self._coordination.close()
        await self._transport.close()
        if self._mailbox is not None:
            await self._mailbox.close()
        if self._tracing is not None:
            await self._tracing.close()

    # --- what the API asks for ----------------------------------------------------------------

    async def _not_ready(self) -> Sequence[str]:
        reasons = []
        if self.gateway.draining:
            reasons.append("draining")
        roles = self.settings.roles
        if roles == {"coordinator"} and self.cluster.trouble is not None:
            reasons.append(f"coordination: {self.cluster.trouble}")
        if "gateway" in roles and self.gateway.subscriptions.trouble is not None:
            reasons.append(f"transport: {self.gateway.subscriptions.trouble}")
        if roles == {"processor"}:  # others have callers, who are not to be turned away for it
            if self._processor is not None and self._processor.is_cut_off:
                reasons.append("transport: pokes can't be published")
            if self._ingress is not None and self._ingress.is_down:
                reasons.append("ingress: the queue can't be read")
        if roles & {"gateway", "api"}:
            reasons += await _trouble_of("tokens", self._verifier.check)
        if self._mailbox is not None:
            reasons += await _trouble_of("mailbox", self._mailbox.check)
        return reasons

    def _sign_dev_token(self, subject: str, scopes: Iterable[str], ttl_s: float) -> str:
        secret = _reveal(self.settings.jwt_secret)
        assert secret is not None, "--dev makes one"  # noqa: S101 - a caller's bug
        return sign_token(
            secret,
            subject,
            scopes,
            ttl_s,
            issuer=self.settings.jwt_issuer,
            audience=self.settings.jwt_audience,
        )

    def _read_metrics(self) -> Mapping[Metric, metrics.Value]:
        counters, subscriptions = self.gateway.bridge.counters, self.gateway.subscriptions
        view, me = self.cluster.view, self.settings.instance
        numbers: dict[Metric, metrics.Value] = {
            Metric.BUILD_INFO: {(__version__, me): 1},
            Metric.HANDSHAKES: {
                (status,): count for status, count in self.gateway.entrance.handshakes.items()
            },
            Metric.POKES_PUBLISHED: self._publisher.published,
            Metric.SESSIONS: len(self.gateway.sessions),
            Metric.SESSIONS_MOVED: self.gateway.moved,
            Metric.SIGNALS: counters.signals,
            Metric.SIGNALS_MALFORMED: counters.malformed,
            Metric.SIGNALS_UNTAGGED: subscriptions.untagged,
            Metric.POKES: counters.pokes,
            Metric.POKES_NOISE: counters.noise,
            Metric.POKES_DELIVERED: counters.delivered,
            Metric.POKES_MERGED: counters.merged,
            Metric.GAPS: subscriptions.gaps,
            Metric.PROBES: subscriptions.probes,
            Metric.SUBSCRIPTIONS: len(subscriptions.selections),
            Metric.SHARDS_OWNED: len(view.shard_map.owned_by(me)),
            Metric.CLUSTER_EPOCH: view.shard_map.epoch,
            Metric.CLUSTER_MEMBERS: len(view.members),
            Metric.CLUSTER_LEADER: self.cluster.is_leader,
            Metric.CLUSTER_PARTITIONED: view.shard_map.mode == "partitioned",
            Metric.NOISE_RATIO: self.gateway.bridge.traffic.noise_ratio,
            Metric.GLOBAL_OPS: self.cluster.ops_per_s,
            Metric.RED_LINE: self.settings.red_line_ops_per_s,
            Metric.OVER_RED_LINE: self.cluster.red_line.is_over,
            Metric.PULL_CAPACITY: self._capacity.per_s,
            Metric.COORDINATION_UP: self.cluster.trouble is None,
        }
        if self._processor is not None:
            numbers[Metric.MESSAGES_COMMITTED] = self._processor.stats.messages_committed
            numbers[Metric.MESSAGES_REFUSED] = self._processor.stats.messages_refused
        if self._pusher is not None:
            numbers[Metric.PUSHES] = {
                (result,): count for result, count in self._pusher.results.items()
            }
        if self._ingress is not None:
            numbers[Metric.INGRESS_UP] = not self._ingress.is_down
            numbers[Metric.INGRESS_MESSAGES] = {
                (result,): count for result, count in self._ingress.results.items()
            }
        return numbers


class _TracedPublisher:
    """The publisher, whose pokes begin traces."""

    def __init__(self, publisher: Publisher, tracing: "Tracing") -> None:
        self._publish = tracing.poking(publisher.publish)
        self.disconnect = publisher.disconnect

    async def publish(self, pokes: Sequence[Poke]) -> None:
        await self._publish(pokes)


def _pusher(settings: Settings, queue: PushQueue) -> Pusher | None:
    if settings.push_webhook_url is None or "processor" not in settings.roles:
        return None
    return Pusher(queue, Webhook(settings.push_webhook_url, settings.push_webhook_key))


async def _trouble_of(part: str, check: Callable[[], Awaitable[None]]) -> Sequence[str]:
    try:
        async with asyncio.timeout(_CHECK_TIMEOUT_S):
            await check()
    except PokebridgeError as error:
        return [f"{part}: {error}"]
    except TimeoutError:
        return [f"{part}: no answer within {_CHECK_TIMEOUT_S:g} s"]
    return []


def _gateway_config(settings: Settings) -> GatewayConfig:
    any_origin = "*" in settings.allowed_origins
    return GatewayConfig(
        instance=settings.instance,
        allowed_origins=None if any_origin else frozenset(settings.allowed_origins),
        trusted_proxies=settings.trusted_proxies,
        max_sessions=settings.max_sessions or _sessions_that_fit(),
        max_sessions_per_recipient=settings.max_sessions_per_recipient,
        max_sessions_per_address=settings.max_sessions_per_address,
        handshakes_per_s=settings.handshakes_per_s,
        shard_count=settings.shard_count,
        mode=settings.initial_mode,
        max_session_s=settings.max_session_s or inf,
        timing=Timing(
            ping_interval_s=settings.ping_interval_s, pong_timeout_s=settings.pong_timeout_s
        ),
    )


def _sessions_that_fit() -> int:
    """As many as there may be descriptors, once this process has raised its limit to the hard."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(1, hard - _RESERVED_DESCRIPTORS)


def _reveal(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()
