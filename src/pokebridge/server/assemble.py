"""From settings to a running instance.

This module and ``from_settings.py`` are the one place that reads the settings. A setting is
declared, documented and checked in ``settings.py``, and passed here to the part that uses it.
"""

import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace

from pokebridge.cluster.node import Cluster, ClusterConfig
from pokebridge.durations import RequestDurations
from pokebridge.fallback.push import Pulls, Pusher
from pokebridge.fallback.webhook import Webhook
from pokebridge.gateway.gateway import Gateway
from pokebridge.ingress.base import Source
from pokebridge.ingress.ingress import Ingress
from pokebridge.mailbox.devices import KnownDevices
from pokebridge.mailbox.pushes import PushQueue, pushes_of
from pokebridge.model import SendMessage
from pokebridge.processor import Processor
from pokebridge.publisher import Publisher
from pokebridge.red_line import MIGRATE_RULES
from pokebridge.server import adapters, uvicorn_server
from pokebridge.server.descriptors import Room, make_room, make_room_for_workers
from pokebridge.server.from_settings import (
    Adapters,
    check,
    gateway_config,
    log_warnings,
    open_adapters,
)
from pokebridge.server.hub import Hub
from pokebridge.server.instance import Instance, Parts
from pokebridge.server.revocations import Revocations
from pokebridge.server.token_keys import token_signer, token_verifier
from pokebridge.settings import Settings
from pokebridge.submission import read_queued
from pokebridge.tokens import TokenVerifier
from pokebridge.transport.base import Transport
from pokebridge.workers.host_publisher import HostPublisher


async def serve(
    settings: Settings, *, on_listening: Callable[[str], None] = lambda _: None
) -> None:
    """Run an instance until SIGTERM or SIGINT, then drain it, finish what is under way and return.

    ``on_listening`` is called with the instance's URL once it can be reached.

    Example::

        await serve(Settings(dev=True))

    Raises:
        ConfigError: the settings contradict each other, or the address can't be listened on.
        MissingExtraError: the driver of an adapter is not installed.
        TransportError: the transport is unavailable.
        CoordinationError: the coordination store is unavailable.
        MailboxError: the mailbox is unavailable.
    """
    check(settings)
    log_warnings(settings)
    async with open_adapters(settings) as opened, AsyncExitStack() as claims:
        listener = uvicorn_server.listen(settings.host, settings.port)
        if opened.mailbox is not None and not opened.transport.is_shared:
            await adapters.claim_file(settings.mailbox, claims)
        url = uvicorn_server.own_url(settings.advertise_url, listener, dev=settings.dev)
        if settings.worker_count > 1:
            make_room_for_workers(settings.worker_count)
            hub = Hub(settings, assemble(settings, opened, url=url), listener)
            await hub.run(on_listening)
            return
        # Last, because what is open counts.
        instance = assemble(settings, opened, url=url, room=make_room(settings.max_sessions))
        await uvicorn_server.run(
            instance, listener, grace_s=settings.grace_s, on_listening=on_listening
        )


def assemble(
    settings: Settings, opened: Adapters, *, url: str = "", room: Room | None = None
) -> Instance:
    """Put an instance together. Close it before ``opened``.

    ``url`` is where clients reach this instance alone, if they can. ``room`` is what fits into this
    process; ``None`` without sockets, as in the simulation.
    """
    mailbox, tracing = opened.mailbox, opened.tracing
    verifier = token_verifier(settings)
    gateway = _gateway(settings, opened, verifier, room)
    publisher = _publisher(settings, opened.transport, gateway)
    upkeep = "processor" in settings.roles
    processor = None if mailbox is None else Processor(mailbox, publisher, does_upkeep=upkeep)
    send: SendMessage | None = None if processor is None else processor.send
    publish = publisher.publish if tracing is None else tracing.poking(publisher.publish)
    if tracing is not None:
        tracing.is_here = lambda recipient: bool(gateway.sessions.find(recipient))
        send = send and tracing.sending(send)
    queue, requests = pushes_of(mailbox), RequestDurations()
    cluster = Cluster(
        _cluster_config(settings),
        gateway,
        opened.coordination,
        requests,
        url=url,
        has_peers=opened.transport.is_shared,
        on_drain=lambda: instance.start_drain(),  # noqa: PLW0108 - it is made below
    )
    instance = Instance(
        Parts(
            name=settings.instance,
            roles=settings.roles,
            mailbox=mailbox,
            gateway=gateway,
            cluster=cluster,
            verifier=verifier,
            publisher=publisher,
            processor=processor,
            send=send,
            publish=publish,
            revocations=_revocations(settings, opened, publisher, gateway, verifier),
            requests=requests,
            devices=None if mailbox is None else KnownDevices(mailbox),
            pulls=None if queue is None else Pulls(queue),
            pusher=None if queue is None else _pusher(settings, queue),
            ingress=_ingress(opened.ingress, send),
            tracing=tracing,
            sign_dev_token=token_signer(settings) if settings.dev else None,
            allowed_origins=settings.allowed_origins,
            trusted_proxies=settings.trusted_proxies,
            red_line_ops_per_s=settings.red_line_ops_per_s,
            drain_s=settings.drain_s,
        )
    )
    return instance


def _gateway(
    settings: Settings, opened: Adapters, verifier: TokenVerifier, room: Room | None
) -> Gateway:
    config = gateway_config(settings, room)
    gateway = Gateway(config, opened.transport, verifier, opened.heads, opened.record_acks)
    gateway.beacons.mailbox = lambda: opened.mailbox_identity
    return gateway


def _publisher(settings: Settings, transport: Transport, gateway: Gateway) -> Publisher:
    if settings.worker_count == 1:
        return Publisher(transport, shard_count=settings.shard_count)
    publisher = HostPublisher(transport, shard_count=settings.shard_count)
    if transport.is_shared:
        publisher.deliver = gateway.deliver
    return publisher


def _revocations(
    settings: Settings,
    opened: Adapters,
    publisher: Publisher,
    gateway: Gateway,
    verifier: TokenVerifier,
) -> Revocations:
    bridge = gateway.bridge
    verifier.refuses = lambda recipient, issued_at: bridge.disconnects.refuses(
        recipient, issued_at, time.time()
    )
    return Revocations(
        opened.mailbox,
        publisher,
        bridge.disconnect,
        settings.revoke_for_s,
        hears="gateway" in settings.roles,
        late_mailbox=opened.late_mailbox,
    )


def _ingress(source: Source | None, send: SendMessage | None) -> Ingress | None:
    return None if source is None or send is None else Ingress(source, read_queued, send)


def _pusher(settings: Settings, queue: PushQueue) -> Pusher | None:
    if settings.push_webhook_url is None or "processor" not in settings.roles:
        return None
    return Pusher(queue, Webhook(settings.push_webhook_url, settings.push_webhook_key))


def _cluster_config(settings: Settings) -> ClusterConfig:
    return ClusterConfig(
        instance=settings.instance,
        cluster=settings.cluster,
        engine=adapters.engine_of(settings.transport),
        weight=settings.weight,
        advertise_url=settings.advertise_url or "",
        is_member="gateway" in settings.roles,
        can_lead="coordinator" in settings.roles,
        by_ring=settings.assignment == "ring",
        shard_count=settings.shard_count,
        mode=settings.initial_mode,
        lease_s=settings.lease_s,
        red_line_ops_per_s=settings.red_line_ops_per_s,
        migrates=settings.mode == "auto",
        migrate_rules=replace(
            MIGRATE_RULES, over_for_s=settings.auto_over_s, under_for_s=settings.auto_under_s
        ),
    )
