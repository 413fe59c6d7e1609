"""The calls about sessions and the cluster."""

from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Protocol

from fastapi import Request, Response

from pokebridge.api import schema
from pokebridge.api.exchange import Verify, authorize, body_reader, json_response
from pokebridge.api.openapi import Api
from pokebridge.api.problems import problem
from pokebridge.gateway.handshake import Network, is_trusted
from pokebridge.model import Mode, check_recipient
from pokebridge.submission import Recipient
from pokebridge.wire import CONNECT_PATH


class Migrate(Protocol):
    """Changes the cluster's mode."""

    async def __call__(self, mode: Mode, *, force: bool) -> None:
        """Return when the change is written."""


class SessionCalls:
    """Where to connect, and the end of sessions."""

    def __init__(
        self,
        verify: Verify,
        *,
        home_of: Callable[[str], tuple[int, str, str]],
        disconnect: Callable[[str], Awaitable[None]],
        trusted_proxies: Sequence[Network],
    ) -> None:
        self._verify = verify
        self._trusted_proxies = trusted_proxies
        self._home_of = home_of
        self._disconnect = disconnect

    async def connect(self, _: Request) -> Response:
        """GET /v1/connect that is no WebSocket handshake: those never come this far."""
        return problem(
            HTTPStatus.UPGRADE_REQUIRED,
            "connect here by WebSocket, version 13",
            headers={"Upgrade": "websocket", "Connection": "Upgrade"},
        )

    async def connect_info(self, request: Request) -> Response:
        """GET /v1/connect-info."""
        caller = (await authorize(self._verify, request)).subject
        shard, instance, url = self._home_of(caller)
        return json_response(
            schema.ConnectInfo(url=url or self._url_asked(request), shard=shard, instance=instance)
        )

    def _url_asked(self, request: Request) -> str:
        """The host that was asked; behind a proxy, in the scheme that was spoken to that."""
        scheme = request.url.scheme
        if request.client is not None and is_trusted(request.client.host, self._trusted_proxies):
            scheme = request.headers.get("x-forwarded-proto", scheme)
        scheme = "wss" if scheme == "https" else "ws"
        return f"{scheme}://{request.url.netloc}{CONNECT_PATH}"

    async def disconnect(self, request: Request) -> Response:
        """DELETE /v1/sessions/{recipient}."""
        await authorize(self._verify, request, "admin")
        await self._disconnect(check_recipient(request.path_params["recipient"]))
        return Response(status_code=HTTPStatus.NO_CONTENT)

    def add_to(self, app: Api) -> None:
        """Have ``app`` answer these calls."""
        # OpenAPI has no words for a WebSocket.
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
            path_types={"recipient": Recipient},
            answers={204: "They close with 4401."},
            problems=[404, 422],
        )


class ClusterCalls:
    """The cluster: look at it, watch it, migrate it, drain an instance."""

    def __init__(
        self,
        verify: Verify,
        *,
        view_cluster: Callable[[], schema.Cluster],
        migrate: Migrate,
        drain: Callable[[str], Awaitable[None]],
        events: Callable[[], schema.Events],
        watch: Callable[[str], float],
    ) -> None:
        self._verify = verify
        self._events = events
        self._watch = watch
        self._view_cluster = view_cluster
        self._migrate = migrate
        self._drain = drain
        self._read_mode = body_reader(schema.ModeRequest)
        self._read_drain = body_reader(schema.DrainRequest)

    async def cluster(self, request: Request) -> Response:
        """GET /v1/cluster."""
        await authorize(self._verify, request, "admin")
        return json_response(self._view_cluster())

    async def events(self, request: Request) -> Response:
        """GET /v1/cluster/events."""
        await authorize(self._verify, request, "admin")
        return json_response(self._events())

    async def watch(self, request: Request) -> Response:
        """PUT /v1/cluster/watch."""
        caller = (await authorize(self._verify, request, "admin")).subject
        return json_response(schema.Watch(self._watch(caller)))

    async def migrate(self, request: Request) -> Response:
        """PUT /v1/cluster/mode."""
        await authorize(self._verify, request, "admin")
        wanted = await self._read_mode(request)
        await self._migrate(wanted.mode, force=wanted.force)
        return json_response(wanted, HTTPStatus.ACCEPTED)

    async def drain(self, request: Request) -> Response:
        """POST /v1/cluster/drain."""
        await authorize(self._verify, request, "admin")
        wanted = await self._read_drain(request)
        await self._drain(wanted.instance)
        return json_response(wanted, HTTPStatus.ACCEPTED)

    def add_to(self, app: Api) -> None:
        """Have ``app`` answer these calls."""
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
