"""The calls about sessions and the cluster."""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict
from http import HTTPStatus
from typing import Protocol

from fastapi import Request, Response

from pokebridge.api import schema
from pokebridge.api.exchange import authorize, body_reader, json_response, read_query
from pokebridge.api.openapi import Api
from pokebridge.api.pokes import Signaller
from pokebridge.api.problems import problem
from pokebridge.cluster.history import HistoryEntry
from pokebridge.cluster.load import ClusterStatus, InstanceStatus
from pokebridge.cluster.node import Home
from pokebridge.cluster.watchers import Watchers
from pokebridge.errors import NotFoundError
from pokebridge.gateway.handshake import Network, is_trusted
from pokebridge.model import Mode, check_recipient
from pokebridge.submission import Recipient
from pokebridge.tokens import TokenVerifier
from pokebridge.wire import CONNECT_PATH


class ClusterControl(Protocol):
    """The cluster as the API sees it; :class:`~pokebridge.cluster.node.Cluster` is one."""

    @property
    def history(self) -> Iterable[HistoryEntry]:
        """What has happened, oldest first."""

    def status(self) -> ClusterStatus:
        """The whole cluster, as far as this instance sees it."""

    def home_of(self, recipient: str) -> Home:
        """Where to connect for ``recipient``; without a URL: to the host that was asked."""

    async def migrate(self, mode: Mode, *, force: bool) -> None:
        """Return when the new mode is written. Raises ConflictError when it can't be had now."""

    async def drain(self, instance: str) -> None:
        """Have ``instance`` drain. Raises NotFoundError when there is no such instance."""


class SessionCalls:
    """Where to connect, and the end of sessions."""

    def __init__(
        self,
        verifier: TokenVerifier,
        cluster: ClusterControl,
        signaller: Signaller,
        trusted_proxies: Sequence[Network],
        revoke: Callable[[str], Awaitable[None]] | None,
    ) -> None:
        self._verifier = verifier
        self._cluster = cluster
        self._signaller = signaller
        self._trusted_proxies = trusted_proxies
        self._revoke = revoke

    async def connect(self, _: Request) -> Response:
        """GET /v1/connect without a WebSocket handshake: the gateway answers those with one."""
        return problem(
            HTTPStatus.UPGRADE_REQUIRED,
            "connect here by WebSocket, version 13",
            headers={"Upgrade": "websocket", "Connection": "Upgrade"},
        )

    async def connect_info(self, request: Request) -> Response:
        """GET /v1/connect-info."""
        caller = (await authorize(self._verifier, request)).subject
        home = self._cluster.home_of(caller)
        url = home.url or self._requested_url(request)
        return json_response(schema.ConnectInfo(url, home.shard, home.instance))

    def _requested_url(self, request: Request) -> str:
        """The host that was asked, in the scheme that the client used with a trusted proxy."""
        scheme = request.url.scheme
        if request.client is not None and is_trusted(request.client.host, self._trusted_proxies):
            scheme = request.headers.get("x-forwarded-proto", scheme)
        scheme = "wss" if scheme == "https" else "ws"
        return f"{scheme}://{request.url.netloc}{CONNECT_PATH}"

    async def disconnect(self, request: Request) -> Response:
        """DELETE /v1/sessions/{recipient}."""
        await authorize(self._verifier, request, "admin")
        recipient = check_recipient(request.path_params["recipient"])
        if not read_query(request, schema.DisconnectQuery).revoke:
            await self._signaller.disconnect(recipient)
        elif self._revoke is None:
            raise NotFoundError("this instance can't revoke tokens")
        else:
            await self._revoke(recipient)
        return Response(status_code=HTTPStatus.NO_CONTENT)

    def add_to(self, app: Api) -> None:
        """Add these calls to ``app``."""
        # OpenAPI can't describe a WebSocket.
        app.add_route(CONNECT_PATH, self.connect, include_in_schema=False)
        app.call(
            "GET",
            "/v1/connect-info",
            self.connect_info,
            "Where to connect",
            answers={200: schema.ConnectInfo},
        )
        app.call(
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


class ClusterCalls:
    """Look at the cluster, watch it, migrate it, drain an instance."""

    def __init__(
        self, verifier: TokenVerifier, cluster: ClusterControl, watchers: Watchers
    ) -> None:
        self._verifier = verifier
        self._cluster = cluster
        self._watchers = watchers
        self._read_mode = body_reader(schema.ModeRequest)
        self._read_drain = body_reader(schema.DrainRequest)

    async def cluster(self, request: Request) -> Response:
        """GET /v1/cluster."""
        await authorize(self._verifier, request, "admin")
        return json_response(_cluster(self._cluster.status()))

    async def events(self, request: Request) -> Response:
        """GET /v1/cluster/events."""
        await authorize(self._verifier, request, "admin")
        status = self._cluster.status()
        events = [
            schema.Event(entry.id, entry.at_ms, entry.kind, entry.instance, entry.text)
            for entry in self._cluster.history
        ]
        return json_response(schema.Events(status.seen_by, status.history_count, events))

    async def watch(self, request: Request) -> Response:
        """PUT /v1/cluster/watch."""
        caller = (await authorize(self._verifier, request, "admin")).subject
        return json_response(schema.Watch(self._watchers.add(caller)))

    async def migrate(self, request: Request) -> Response:
        """PUT /v1/cluster/mode."""
        await authorize(self._verifier, request, "admin")
        wanted = await self._read_mode(request)
        await self._cluster.migrate(wanted.mode, force=wanted.force)
        return json_response(wanted, HTTPStatus.ACCEPTED)

    async def drain(self, request: Request) -> Response:
        """POST /v1/cluster/drain."""
        await authorize(self._verifier, request, "admin")
        wanted = await self._read_drain(request)
        await self._cluster.drain(wanted.instance)
        return json_response(wanted, HTTPStatus.ACCEPTED)

    def add_to(self, app: Api) -> None:
        """Add these calls to ``app``."""
        app.call(
            "GET",
            "/v1/cluster",
            self.cluster,
            "Look at the cluster",
            scope="admin",
            answers={200: schema.Cluster},
        )
        app.call(
            "GET",
            "/v1/cluster/events",
            self.events,
            "Read what has happened to the cluster",
            scope="admin",
            answers={200: schema.Events},
        )
        app.call(
            "PUT",
            "/v1/cluster/watch",
            self.watch,
            "Be poked when the cluster changes",
            scope="admin",
            answers={200: schema.Watch},
        )
        app.call(
            "PUT",
            "/v1/cluster/mode",
            self.migrate,
            "Change the mode",
            scope="admin",
            body=schema.ModeRequest,
            answers={202: schema.ModeRequest},
            problems=[409],
        )
        app.call(
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
        seen_by=status.seen_by,
        events=status.history_count,
        trouble=status.trouble,
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
