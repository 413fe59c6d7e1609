"""The calls about sessions and the cluster."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict
from http import HTTPStatus
from typing import Protocol
from urllib.parse import urlsplit

from pokebridge.api import schema
from pokebridge.api.exchange import (
    Request,
    Response,
    Route,
    body_reader,
    json_response,
    no_content,
    read_query,
)
from pokebridge.api.openapi import Call
from pokebridge.cluster.history import HistoryEntry
from pokebridge.cluster.load import ClusterStatus, InstanceStatus
from pokebridge.cluster.node import Home
from pokebridge.cluster.watchers import Watchers
from pokebridge.errors import NotFoundError, RefusedError
from pokebridge.forwarded import removed_prefix, requested_host, requested_scheme
from pokebridge.gateway.handshake import Network, is_trusted
from pokebridge.gateway.roster import Whereabouts
from pokebridge.mailbox.base import MailboxStats, RecipientStats
from pokebridge.model import Mode, check_recipient
from pokebridge.submission import Recipient
from pokebridge.wire import CONNECT_PATH

# Counting reads the whole store.
_COUNT_EVERY_S = 10.0


class ClusterControl(Protocol):
    """The cluster as the API sees it; :class:`~pokebridge.cluster.node.Cluster` is one."""

    @property
    def history(self) -> Iterable[HistoryEntry]:
        """What has happened, oldest first."""

    def status(self) -> ClusterStatus:
        """The whole cluster, as far as this instance sees it."""

    def home_of(self, recipient: str) -> Home:
        """Where to connect for ``recipient``. Without a URL it is the requested host."""

    async def whereabouts(self, recipient: str) -> Whereabouts:
        """Where ``recipient`` is connected, and which instances did not say."""

    async def migrate(self, mode: Mode, *, force: bool) -> None:
        """Return when the new mode is written. Raises ConflictError if it is not possible now."""

    async def drain(self, instance: str) -> None:
        """Drain ``instance``. Raises NotFoundError if there is no such instance."""


class SessionCalls:
    """Where to connect, and the end of sessions."""

    def __init__(
        self,
        cluster: ClusterControl,
        disconnect: Callable[[str], Awaitable[None]],
        trusted_proxies: Sequence[Network],
        path_prefix: str,
        revoke: Callable[[str], Awaitable[None]] | None,
        inspect: Callable[[str], Awaitable[RecipientStats]] | None,
    ) -> None:
        self._cluster = cluster
        self._disconnect = disconnect
        self._trusted_proxies = trusted_proxies
        self._path_prefix = path_prefix
        self._revoke = revoke
        self._inspect = inspect

    async def connect(self, _: Request) -> Response:
        """GET /v1/connect without a WebSocket handshake: the gateway answers those with one."""
        raise RefusedError(
            HTTPStatus.UPGRADE_REQUIRED,
            "connect here by WebSocket, version 13",
            {"Upgrade": "websocket", "Connection": "Upgrade"},
        )

    async def connect_info(self, request: Request) -> Response:
        """GET /v1/connect-info."""
        caller = request.caller.subject
        home = self._cluster.home_of(caller)
        url = home.url or self._requested_url(request)
        return json_response(schema.ConnectInfo(url, home.shard, home.instance))

    def _requested_url(self, request: Request) -> str:
        """What the client has asked for, also if a trusted proxy has changed it."""
        scheme: str = request.scope["scheme"]
        host, prefix = request.header(b"host"), self._path_prefix
        peer = request.scope.get("client")
        if peer is not None and is_trusted(peer[0], self._trusted_proxies):
            scheme = requested_scheme(request.header) or scheme
            host = requested_host(request.header) or host
            prefix = prefix or removed_prefix(request.header)
        scheme = "wss" if scheme == "https" else "ws"
        try:
            parts = urlsplit(f"//{host}")
            is_valid = bool(parts.hostname) and parts.port != 0  # one that is too large raises
        except ValueError:
            is_valid = False
        if not is_valid:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "the Host is missing or not valid")
        return f"{scheme}://{host}{prefix}{CONNECT_PATH}"

    async def disconnect(self, request: Request) -> Response:
        """DELETE /v1/sessions/{recipient}."""
        recipient = check_recipient(request.rest)
        if not read_query(request, schema.DisconnectQuery).revoke:
            await self._disconnect(recipient)
        elif self._revoke is None:
            raise NotFoundError("this instance can't revoke tokens")
        else:
            await self._revoke(recipient)
        return no_content()

    async def sessions(self, request: Request) -> Response:
        """GET /v1/sessions/{recipient}."""
        recipient = check_recipient(request.rest)
        found = await self._cluster.whereabouts(recipient)
        sessions = [
            schema.Session(instance, each.device, each.address, each.since * 1000, each.told)
            for instance, listed in sorted(found.sessions.items())
            for each in listed
        ]
        mailbox = None if self._inspect is None else _mailbox(await self._inspect(recipient))
        state = schema.RecipientState(recipient, sessions, list(found.silent), mailbox)
        return json_response(state)

    def routes(self) -> Iterable[Route]:
        """These calls."""
        # OpenAPI can't describe a WebSocket.
        yield Route("GET", CONNECT_PATH, self.connect, scope=None)
        yield Call(
            "GET",
            "/v1/connect-info",
            self.connect_info,
            "Where to connect",
            answers={200: schema.ConnectInfo},
        )
        yield Call(
            "GET",
            "/v1/sessions/{recipient:path}",
            self.sessions,
            "Look a recipient up: its sessions, and what is owed to it",
            scope="admin",
            path_types={"recipient": Recipient},
            answers={200: schema.RecipientState},
            problems=[422],
        )
        yield Call(
            "DELETE",
            "/v1/sessions/{recipient:path}",
            self.disconnect,
            "Close every session of a recipient",
            scope="admin",
            query=schema.DisconnectQuery,
            path_types={"recipient": Recipient},
            answers={204: "They close with 4401."},
            problems=[404, 422],
        )


class MailboxCalls:
    """What the whole mailbox holds. Calls at one time share one count."""

    def __init__(self, stats: Callable[[], Awaitable[MailboxStats]]) -> None:
        self._stats = stats
        self._counting = asyncio.Lock()
        self._counted: tuple[float, schema.MailboxTotals] | None = None

    async def totals(self, _: Request) -> Response:
        """GET /v1/mailbox."""
        async with self._counting:
            now = asyncio.get_running_loop().time()
            if self._counted is None or now >= self._counted[0] + _COUNT_EVERY_S:
                totals = _totals(await self._stats(), int(time.time() * 1000))
                self._counted = asyncio.get_running_loop().time(), totals
            return json_response(self._counted[1])

    def routes(self) -> Iterable[Route]:
        """These calls."""
        yield Call(
            "GET",
            "/v1/mailbox",
            self.totals,
            "Count what the mailbox holds, and what is owed",
            scope="admin",
            answers={200: schema.MailboxTotals},
        )


class ClusterCalls:
    """Look at the cluster, watch it, migrate it, drain an instance."""

    def __init__(self, cluster: ClusterControl, watchers: Watchers) -> None:
        self._cluster = cluster
        self._watchers = watchers
        self._read_mode = body_reader(schema.ModeRequest)
        self._read_drain = body_reader(schema.DrainRequest)

    async def cluster(self, _: Request) -> Response:
        """GET /v1/cluster."""
        return json_response(_cluster(self._cluster.status()))

    async def events(self, _: Request) -> Response:
        """GET /v1/cluster/events."""
        status = self._cluster.status()
        events = [
            schema.Event(entry.id, entry.at_ms, entry.kind, entry.instance, entry.text)
            for entry in self._cluster.history
        ]
        return json_response(schema.Events(status.seen_by, status.history_count, events))

    async def watch(self, request: Request) -> Response:
        """PUT /v1/cluster/watch."""
        caller = request.caller.subject
        return json_response(schema.Watch(self._watchers.add(caller)))

    async def migrate(self, request: Request) -> Response:
        """PUT /v1/cluster/mode."""
        wanted = await self._read_mode(request)
        await self._cluster.migrate(wanted.mode, force=wanted.force)
        return json_response(wanted, HTTPStatus.ACCEPTED)

    async def drain(self, request: Request) -> Response:
        """POST /v1/cluster/drain."""
        wanted = await self._read_drain(request)
        await self._cluster.drain(wanted.instance)
        return json_response(wanted, HTTPStatus.ACCEPTED)

    def routes(self) -> Iterable[Route]:
        """These calls."""
        yield Call(
            "GET",
            "/v1/cluster",
            self.cluster,
            "Look at the cluster",
            scope="admin",
            answers={200: schema.Cluster},
        )
        yield Call(
            "GET",
            "/v1/cluster/events",
            self.events,
            "Read what has happened to the cluster",
            scope="admin",
            answers={200: schema.Events},
        )
        yield Call(
            "PUT",
            "/v1/cluster/watch",
            self.watch,
            "Be poked when the cluster changes",
            scope="admin",
            answers={200: schema.Watch},
        )
        yield Call(
            "PUT",
            "/v1/cluster/mode",
            self.migrate,
            "Change the mode",
            scope="admin",
            body=schema.ModeRequest,
            answers={202: schema.ModeRequest},
            problems=[409],
        )
        yield Call(
            "POST",
            "/v1/cluster/drain",
            self.drain,
            "Drain an instance",
            scope="admin",
            body=schema.DrainRequest,
            answers={202: schema.DrainRequest},
            problems=[404],
        )


def _cluster(status: ClusterStatus) -> schema.Cluster:
    return schema.Cluster(
        mode=status.mode,
        epoch=status.epoch,
        shard_count=status.shard_count,
        instances=[_instance(each) for each in status.instances],
        traffic=schema.Traffic(
            messages_per_s=status.load.messages_per_s,
            global_ops_per_s=status.load.ops_per_s,
            red_line=status.red_line_ops_per_s,
            noise_ratio=status.noise_ratio,
            over_red_line=status.is_over_red_line,
        ),
        engine=status.engine,
        seen_by=status.seen_by,
        events=status.history_count,
        trouble=status.trouble,
        name=status.name,
    )


def _mailbox(stats: RecipientStats) -> schema.RecipientMailbox:
    devices = [
        schema.KnownDevice(name, acked, max(0, stats.head - acked))
        for name, acked in sorted(stats.devices.items())
    ]
    return schema.RecipientMailbox(
        stats.head, stats.messages, stats.bytes, stats.outbox_since_ms, devices
    )


def _totals(stats: MailboxStats, at_ms: int) -> schema.MailboxTotals:
    return schema.MailboxTotals(
        counted_at_ms=at_ms,
        recipients=stats.recipients,
        messages=stats.messages,
        bytes=stats.bytes,
        devices=stats.devices,
        oldest_message_ms=stats.oldest_message_ms,
        pokes_owed=stats.outbox,
        poke_owed_since_ms=stats.oldest_outbox_ms,
        pushes_owed=stats.pushes,
        pushes_given_up=stats.dead_pushes,
    )


def _instance(status: InstanceStatus) -> schema.Instance:
    member = status.member
    return schema.Instance(
        id=member.id,
        url=member.url,
        state=status.state,
        sessions=member.sessions,
        shards=list(status.shards),
        weight=member.weight,
        joined_at_ms=member.joined_at_ms,
        **asdict(member.report),
    )
