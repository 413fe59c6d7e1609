"""From settings to single parts: the adapters, and what a gateway is told.

``assemble.py`` makes an instance of them. A command that needs only one finds it here, without the
web framework, which takes half a second to import.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import structlog

from pokebridge.coordination.base import Coordination
from pokebridge.errors import ConfigError
from pokebridge.gateway.acks import RecordAcks
from pokebridge.gateway.config import GatewayConfig
from pokebridge.gateway.verification import Heads
from pokebridge.ingress.base import Source
from pokebridge.mailbox.base import Limits, Mailbox, PageReader
from pokebridge.mailbox.pushes import PushTiming
from pokebridge.server import adapters
from pokebridge.server.descriptors import Room
from pokebridge.server.late_mailbox import LateMailbox
from pokebridge.session import Timing
from pokebridge.setting_types import is_loopback, is_too_wide
from pokebridge.settings import Settings
from pokebridge.transport.base import Transport

if TYPE_CHECKING:  # its libraries are an extra
    from pokebridge.tracing import Tracing


log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapters:
    """The opened adapters of an instance: what it shares with others.

    Attributes:
        transport: carries signals between instances.
        coordination: where the instances of the cluster meet.
        mailbox: keeps the messages; ``None`` on an instance that keeps none.
        late_mailbox: what a gateway without other roles reads of the mailbox, if it knows where
            that is.
        ingress: a queue whose messages are sent; ``None`` without one.
        tracing: records traces; it is around the transport already.
    """

    transport: Transport
    coordination: Coordination
    mailbox: Mailbox | None
    late_mailbox: LateMailbox | None = None
    ingress: Source | None = None
    tracing: "Tracing | None" = None

    @property
    def heads(self) -> Heads | None:
        """Looks up the newest versions in the mailbox, if this instance knows where that is."""
        read_from = self.mailbox or self.late_mailbox
        return None if read_from is None else read_from.heads

    @property
    def mailbox_identity(self) -> str:
        """What is the same wherever the mailbox is the same; empty if nobody else can have it."""
        return getattr(self.mailbox or self.late_mailbox, "identity", "")

    @property
    def record_acks(self) -> RecordAcks | None:
        """Records acks. A gateway alone only reads the mailbox, and its clients ack over HTTP."""
        return None if self.mailbox is None else self.mailbox.ack_all


def check(settings: Settings) -> None:
    """Check that the settings are safe, and that the chosen adapters support them.

    Raises:
        ConfigError: they aren't.
        MissingExtraError: the driver of an adapter is not installed.
    """
    if settings.dev and not (settings.is_on_loopback or settings.dev_on_network):
        raise ConfigError(
            f"host {settings.host} is open to other machines, and with dev anyone who reaches it"
            " gets tokens for everything: use host 127.0.0.1, or allow it with --dev-on-network"
        )
    _check_transport(settings)
    _check_roles(settings)
    if adapters.coordination_class(settings.coordination).is_shared:
        return
    need = "coordination must be a store that the instances share, like nats://HOST:PORT, for"
    if settings.roles == {"coordinator"}:
        raise ConfigError(f"{need} a coordinator: memory:// is this process only")
    if settings.mode != "fanout" and adapters.transport_class(settings.transport).is_shared:
        raise ConfigError(f"{need} mode {settings.mode}: memory:// is this process only")


def _check_transport(settings: Settings) -> None:
    """Check that pokes reach every gateway: memory:// carries them within this process only.

    Raises:
        ConfigError: some other process publishes them, or should receive them.
    """
    if settings.roles == {"coordinator"}:  # it carries none
        return
    if adapters.transport_class(settings.transport).is_shared:
        return
    reason = None
    if not settings.roles >= {"gateway", "api"}:
        reason = f"the roles {','.join(sorted(settings.roles))}: others have the rest"
    elif not settings.no_mailbox and settings.mailbox.startswith("postgres"):
        reason = "a mailbox that other instances share"
    elif adapters.coordination_class(settings.coordination).is_shared:
        reason = "a coordination store that other instances share"
    if reason is not None:
        raise ConfigError(
            "transport must be an engine that the instances share, like nats://HOST:PORT, for"
            f" {reason}; memory:// is this process only, and pokes would be lost"
        )


def _check_roles(settings: Settings) -> None:
    """Check that every role that is needed has an instance that may have it.

    Raises:
        ConfigError: a part is in this process only, and the role that it needs is not.
    """
    roles = settings.roles
    if settings.no_mailbox and roles == {"processor"}:
        raise ConfigError("roles: a processor alone needs a mailbox: unset no_mailbox")
    is_mailbox_own = (
        not settings.no_mailbox and not adapters.mailbox_class(settings.mailbox).is_shared
    )
    if is_mailbox_own and len(roles & {"api", "processor"}) == 1:
        missing = "processor" if "api" in roles else "api"
        raise ConfigError(
            f"roles: must have {missing} too, because the mailbox {settings.mailbox} is this"
            " process only; or use a mailbox that instances share, like postgresql://HOST/DB"
        )
    is_store_own = not adapters.coordination_class(settings.coordination).is_shared
    if is_store_own and settings.mode != "fanout" and "coordinator" not in roles:
        raise ConfigError(
            f"roles: must have coordinator too for mode {settings.mode}, because nobody else can"
            f" lead with coordination {settings.coordination.partition('?')[0]}"
        )


def log_warnings(settings: Settings) -> None:
    """Log settings that are allowed but hardly ever intended."""
    for network in settings.trusted_proxies:
        if is_too_wide(network):
            log.warning("trusted_proxies_too_wide", network=str(network))
    for name in ("jwt_secret", "jwt_previous_secret"):
        secret = getattr(settings, name)
        if secret is not None and secret.get_secret_value() != secret.get_secret_value().strip():
            log.warning("secret_has_white_space", setting=name)
    url = urlsplit(settings.jwks_url or "")
    if url.scheme == "http" and not is_loopback(url.hostname or ""):
        log.warning("jwks_url_unencrypted", host=url.hostname)


@asynccontextmanager
async def open_adapters(settings: Settings) -> AsyncIterator[Adapters]:
    """Open the adapters that the instance's roles need, and close them at the end.

    Raises:
        ConfigError: a URL has a form that its adapter does not know.
        MissingExtraError: the driver of an adapter is not installed.
        UnavailableError: the transport, the coordination store or the mailbox is unavailable.
    """
    who = {"instance": settings.instance, "cluster": settings.cluster}
    # While the number of shards is changed, two clusters share their signals and their queue.
    signal_cluster = settings.signal_cluster or settings.cluster
    plans_only = settings.roles == {"coordinator"}
    async with AsyncExitStack() as opened:
        tracing = None
        if settings.tracing:  # in a thread, because it looks at the machine first
            tracing = await asyncio.to_thread(adapters.open_tracing, settings.instance)
            opened.push_async_callback(tracing.close)
        transport = await adapters.open_transport(
            "memory://" if plans_only else settings.transport,
            instance=settings.instance,
            cluster=signal_cluster,
            carrier=settings.carrier,
            shard_count=max(settings.shard_count, settings.heard_shards or 0),
        )
        opened.push_async_callback(transport.close)
        coordination = await adapters.open_coordination(
            settings.coordination,
            **who,
            shard_count=settings.shard_count,
            mode=settings.initial_mode,
        )
        opened.push_async_callback(coordination.close)
        mailbox = None
        if not settings.no_mailbox and settings.roles & {"api", "processor"}:
            mailbox = await open_mailbox(settings)
            opened.push_async_callback(mailbox.close)
        late_mailbox = None
        if mailbox is None and _reads_mailbox(settings):
            late_mailbox = LateMailbox(partial(open_mailbox, settings, must_exist=True))
            opened.push_async_callback(late_mailbox.close)
        ingress = None
        if settings.ingress is not None and "processor" in settings.roles:
            ingress = await adapters.open_ingress(settings.ingress, cluster=signal_cluster)
            opened.push_async_callback(ingress.close)
        yield Adapters(
            transport=transport if tracing is None else tracing.over(transport),
            coordination=coordination,
            mailbox=mailbox,
            late_mailbox=late_mailbox,
            ingress=ingress,
            tracing=tracing,
        )


def _reads_mailbox(settings: Settings) -> bool:
    """Whether a gateway that keeps no messages knows the mailbox that does."""
    is_told = "mailbox" in settings.model_fields_set and not settings.mailbox.startswith("memory:")
    return is_told and not settings.no_mailbox and "gateway" in settings.roles


def has_own_mailbox(settings: Settings) -> bool:
    """Whether each worker opens the mailbox itself: a server accepts many writers, a file one."""
    return settings.mailbox.startswith("postgres")


async def open_mailbox(settings: Settings, *, must_exist: bool = False) -> Mailbox:
    """Open the mailbox of ``settings``. With ``must_exist`` a missing file is an error.

    Raises:
        ConfigError: the URL names no mailbox, or a file that is missing.
        MissingExtraError: its driver is not installed.
        MailboxError: it is unavailable.
    """
    limits = Limits(
        max_messages=settings.max_messages_per_recipient,
        max_bytes=settings.max_bytes_per_recipient,
        forget_device_s=settings.forget_device_days * 24 * 3600,
        max_share=settings.max_share_per_sender,
        group_prefixes=settings.group_prefixes,
        group_ttl_s=settings.group_ttl_s,
    )
    push_timing = None
    if settings.push_webhook_url is not None:
        push_timing = PushTiming(grace_s=settings.push_grace_s, quiet_s=settings.push_quiet_s)
    return await adapters.open_mailbox(settings.mailbox, limits, push_timing, must_exist=must_exist)


async def open_reader(settings: Settings) -> PageReader | None:
    """Open what reads the hub's mailbox in a worker; ``None``: the worker asks its hub."""
    return await adapters.open_reader(settings.mailbox)


def gateway_config(settings: Settings, room: Room | None) -> GatewayConfig:
    """Return the settings of a gateway. ``room`` is what fits into this process, if known."""
    any_origin = "*" in settings.allowed_origins
    return GatewayConfig(
        instance=settings.instance,
        allowed_origins=None if any_origin else frozenset(settings.allowed_origins),
        trusted_proxies=settings.trusted_proxies,
        path_prefix=settings.path_prefix,
        max_sockets=None if room is None else room.sockets,
        max_connections_per_address=settings.max_connections_per_address,
        max_sessions=settings.max_sessions if room is None else room.sessions,
        max_sessions_per_recipient=settings.max_sessions_per_recipient,
        group_prefixes=settings.group_prefixes,
        audience_pulls_per_s=settings.audience_pulls_per_s,
        max_sessions_per_address=settings.max_sessions_per_address,
        handshakes_per_s=settings.handshakes_per_s,
        shard_count=settings.shard_count,
        cluster=settings.cluster,
        carrier=settings.carrier,
        assignment=settings.assignment if settings.roles & {"gateway", "coordinator"} else None,
        mode=settings.initial_mode,
        max_session_s=settings.max_session_s or inf,
        verify_every_s=settings.verify_every_s,
        deaf_after_s=settings.deaf_after_s,
        timing=Timing(
            ping_interval_s=settings.ping_interval_s,
            pong_timeout_s=settings.pong_timeout_s,
            max_listened=settings.max_listened_recipients,
        ),
    )
