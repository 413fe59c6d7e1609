"""One running instance: its parts, how they are put together, and in which order they stop.

Processor ──append──▶ mailbox          Publisher ──signals──▶ transport ──▶ gateway.bridge
    ▲                    ▲                  ▲                                   │
    └────── HTTP API ────┴──────────────────┘                        sessions ◀─┘
"""

import asyncio
import resource
from collections.abc import Iterable, Mapping, Sequence

import structlog
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from pokebridge import __version__
from pokebridge.errors import MailboxError
from pokebridge.gateway.gateway import Gateway, GatewayConfig
from pokebridge.mailbox.base import Mailbox
from pokebridge.processor import Processor
from pokebridge.publisher import Publisher
from pokebridge.server import api, metrics, schema
from pokebridge.session import Timing
from pokebridge.settings import Settings
from pokebridge.telemetry import Metric
from pokebridge.tokens import TokenVerifier, sign_token
from pokebridge.transport.base import Transport

log = structlog.get_logger(__name__)

# Descriptors that are no sessions: the listener, the mailbox, the transport, HTTP connections.
_RESERVED_DESCRIPTORS = 1000
_MAILBOX_CHECK_TIMEOUT_S = 2.0


class Instance:
    """All parts of one instance, from settings and the adapters chosen for it."""

    def __init__(self, settings: Settings, transport: Transport, mailbox: Mailbox) -> None:
        self.settings = settings
        self._transport = transport
        self._mailbox = mailbox
        self._publisher = Publisher(transport, shard_count=settings.shard_count)
        self._processor = Processor(mailbox, self._publisher)
        self._verifier = TokenVerifier(
            secret=_reveal(settings.jwt_secret),
            previous_secret=_reveal(settings.jwt_previous_secret),
            jwks_url=settings.jwks_url,
            issuer=settings.jwt_issuer,
            audience=settings.jwt_audience,
        )
        self.gateway = Gateway(_gateway_config(settings), transport, self._verifier)
        self._draining: asyncio.Task[None] | None = None
        registry = CollectorRegistry()
        metrics.expose(registry, self._read_metrics)
        self.app = self._create_app(registry)

    def _create_app(self, registry: CollectorRegistry) -> FastAPI:
        settings = self.settings
        return api.create_api(
            api.Parts(
                instance=settings.instance,
                shard_count=settings.shard_count,
                verify=self._verifier.verify,
                mailbox=self._mailbox,
                send=self._processor.send,
                publish_pokes=self._publisher.publish,
                disconnect=self._publisher.disconnect,
                view_cluster=self._view_cluster,
                drain=self.start_drain,
                not_ready=self._not_ready,
                registry=registry,
                advertise_url=settings.advertise_url,
                allowed_origins=settings.allowed_origins,
                sign_dev_token=self._sign_dev_token if settings.dev else None,
            )
        )

    # --- life ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start every part.

        Raises:
            TransportError: the transport can't be had.
        """
        await self.gateway.start()
        await self._processor.start()

    def start_drain(self) -> None:
        """Begin to refuse new sessions and to close those there are; returns at once."""
        if self._draining is None:
            self._draining = asyncio.create_task(self.gateway.drain(self.settings.drain_s))

    async def drain(self) -> None:
        """Drain, or wait for the drain that has begun."""
        self.start_drain()
        assert self._draining is not None  # noqa: S101 - just begun
        await self._draining

    async def close(self) -> None:
        """Stop every part, those that others still need last."""
        await self._processor.close()
        await self._publisher.close()
        await self.gateway.close()
        await self._verifier.close()
        await self._transport.close()
        await self._mailbox.close()

    # --- what the API asks for ----------------------------------------------------------------

    async def _not_ready(self) -> Sequence[str]:
        reasons = []
        if self.gateway.draining:
            reasons.append("draining")
        if self.gateway.hold.trouble is not None:
            reasons.append(f"transport: {self.gateway.hold.trouble}")
        try:
            async with asyncio.timeout(_MAILBOX_CHECK_TIMEOUT_S):
                await self._mailbox.check()
        except MailboxError as error:
            reasons.append(f"mailbox: {error}")
        except TimeoutError:
            reasons.append("mailbox: it does not answer")
        return reasons

    async def _view_cluster(self) -> schema.Cluster:
        settings = self.settings
        traffic = self.gateway.bridge.traffic
        instances = await self._transport.subscriber_count() or 1
        global_ops_per_s = traffic.messages_per_s * instances
        return schema.Cluster(
            mode=settings.mode,
            epoch=0,
            shard_count=settings.shard_count,
            instances=[
                schema.Instance(
                    id=settings.instance,
                    url=settings.advertise_url or "",
                    state="draining" if self.gateway.draining else "active",
                    sessions=len(self.gateway.sessions),
                    shards=list(range(settings.shard_count)),
                )
            ],
            traffic=schema.Traffic(
                messages_per_s=traffic.messages_per_s,
                global_ops_per_s=global_ops_per_s,
                red_line=settings.red_line_ops_per_s,
                noise_ratio=traffic.noise_ratio,
                over_red_line=global_ops_per_s > settings.red_line_ops_per_s,
            ),
        )

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
        counters = self.gateway.bridge.counters
        return {
            Metric.BUILD_INFO: {(__version__, self.settings.instance): 1},
            Metric.HANDSHAKES: {
                (status,): count for status, count in self.gateway.handshakes.items()
            },
            Metric.POKES_PUBLISHED: self._publisher.published,
            Metric.MESSAGES_COMMITTED: self._processor.stats.messages_committed,
            Metric.SESSIONS: len(self.gateway.sessions),
            Metric.SIGNALS: counters.signals,
            Metric.SIGNALS_MALFORMED: counters.malformed,
            Metric.POKES: counters.pokes,
            Metric.POKES_NOISE: counters.noise,
            Metric.POKES_DELIVERED: counters.delivered,
            Metric.POKES_MERGED: counters.merged,
            Metric.GAPS: self.gateway.hold.gaps,
            Metric.PROBES: self.gateway.hold.probes,
        }


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
