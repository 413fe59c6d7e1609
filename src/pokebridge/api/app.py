"""The HTTP API of one instance (protocol.md section 4).

Every handler follows its row of the contract: authorize, read, act, answer. What it acts on is in
:class:`Parts`, so the whole API runs in a test without a socket. msgspec decodes bodies and queries
into the types that also describe them (``schema``). FastAPI routes and serves the description.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from pokebridge import console
from pokebridge.api import docs, problems, schema
from pokebridge.api.administration import ClusterCalls, ClusterControl, SessionCalls
from pokebridge.api.exchange import body_reader, json_response
from pokebridge.api.limits import BodyLimit
from pokebridge.api.messages import MailboxSide, MessageCalls
from pokebridge.api.metrics import RequestMetrics, exposition
from pokebridge.api.openapi import Api
from pokebridge.api.pokes import PokeCalls, Signaller
from pokebridge.cluster.watchers import Watchers
from pokebridge.durations import RequestDurations
from pokebridge.gateway.handshake import Network
from pokebridge.model import check_recipient
from pokebridge.origins import is_allowed
from pokebridge.tokens import SignToken, TokenVerifier
from pokebridge.wire import CONNECT_PATH

# A whole request body: a message of 64 KiB and its envelope, or a thousand recipients.
BODY_CAP_BYTES = 96 * 1024
POKES_CAP_BYTES = 384 * 1024


# What pages may send. The last three are what tracing adds to a page's requests by itself.
_REQUEST_HEADERS = (
    *("Authorization", "Content-Type", "If-None-Match"),
    *("traceparent", "tracestate", "baggage"),
)


class _Cors(CORSMiddleware):
    """Starlette's middleware, with patterns among the allowed origins."""

    def is_allowed_origin(self, origin: str) -> bool:
        """Whether pages of ``origin`` may call."""
        return self.allow_all_origins or is_allowed(origin, self.allow_origins)


@dataclass(frozen=True, kw_only=True, slots=True)
class Operations:
    """What health checks and monitoring read."""

    not_ready: Callable[[], Awaitable[Sequence[str]]]
    """Why the instance can't serve now; empty when it can."""
    registry: CollectorRegistry
    requests: RequestDurations
    """Where the durations of the requests are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What the API needs of its instance.

    Any call of a part may raise a :class:`~pokebridge.errors.PokebridgeError`, which is answered
    with its status.
    """

    verifier: TokenVerifier
    signaller: Signaller
    """Publishes pokes and disconnects."""
    mailbox: MailboxSide | None
    """``None``: there are no calls about messages."""
    cluster: ClusterControl
    watchers: Watchers
    """The recipients that are poked when the cluster changes."""
    operations: Operations
    has_calls: bool = True
    """False: only the calls about operations are served."""
    middleware: Sequence[Callable[[ASGIApp], ASGIApp]] = ()
    """ASGI middleware around everything else, outermost first."""
    allowed_origins: Sequence[str] = ()
    """Origins that may call from a browser; ``"*"`` allows any."""
    trusted_proxies: Sequence[Network] = ()
    """Proxies whose ``X-Forwarded-Proto`` is believed."""
    revoke: Callable[[str], Awaitable[None]] | None = None
    """Closes a recipient's sessions and revokes its tokens. ``None``: that is not offered."""
    sign_dev_token: SignToken | None = None
    """Makes a token for anybody who asks. Given with ``--dev`` only."""


def create_api(parts: Parts) -> FastAPI:
    """The ASGI app that serves the API."""
    app = Api(
        title="pokebridge",
        description=(
            f"Clients sleep on one WebSocket (`{CONNECT_PATH}`), hear a poke, and pull here."
        ),
        middleware=_middleware(parts),
    )
    problems.install(app)
    docs.install(app)
    if parts.has_calls:
        _add_calls(app, parts)
        console.install(app)
    _add_operations(app, parts.operations)
    if parts.sign_dev_token is not None:
        _add_dev_token(app, parts.sign_dev_token)
        console.install_playground(app)
    return app


def _add_calls(app: Api, parts: Parts) -> None:
    PokeCalls(parts.verifier, parts.signaller).add_to(app)
    if parts.mailbox is not None:
        MessageCalls(parts.verifier, parts.mailbox).add_to(app)
    SessionCalls(
        parts.verifier, parts.cluster, parts.signaller, parts.trusted_proxies, parts.revoke
    ).add_to(app)
    ClusterCalls(parts.verifier, parts.cluster, parts.watchers).add_to(app)


def _middleware(parts: Parts) -> Sequence[Middleware]:
    """The middleware, outermost first."""
    return [
        *(Middleware(each) for each in parts.middleware),
        Middleware(
            RequestMetrics,
            registry=parts.operations.registry,
            durations=parts.operations.requests,
        ),
        Middleware(
            _Cors,
            allow_origins=parts.allowed_origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=_REQUEST_HEADERS,
            expose_headers=["ETag", "Retry-After"],
        ),
        Middleware(
            BodyLimit,
            default_bytes=BODY_CAP_BYTES,
            bytes_by_path={"/v1/pokes": POKES_CAP_BYTES},
        ),
    ]


def _add_operations(app: Api, operations: Operations) -> None:
    async def healthz(_: Request) -> Response:
        return json_response(schema.Health())

    async def readyz(_: Request) -> Response:
        reasons = await operations.not_ready()
        if reasons:
            return problems.problem(HTTPStatus.SERVICE_UNAVAILABLE, "; ".join(reasons))
        return json_response(schema.Health())

    async def metrics(_: Request) -> Response:
        return exposition(operations.registry)

    ok = {200: schema.Health}
    app.call("GET", "/healthz", healthz, "Is it alive", scope=None, answers=ok)
    app.call("GET", "/readyz", readyz, "Can it serve", scope=None, answers=ok, problems=[503])
    text = {200: "Prometheus's text format."}
    app.call("GET", "/metrics", metrics, "Prometheus metrics", scope=None, answers=text)


def _add_dev_token(app: Api, sign: SignToken) -> None:
    read_wanted = body_reader(schema.TokenRequest)

    async def dev_token(request: Request) -> Response:
        wanted = await read_wanted(request)
        token = sign(check_recipient(wanted.sub), wanted.scope.split(), wanted.ttl_s)
        return json_response(schema.Token(token))

    app.call(
        "POST",
        "/v1/dev/token",
        dev_token,
        "Make a token for anybody (--dev only)",
        scope=None,
        body=schema.TokenRequest,
        answers={200: schema.Token},
    )
