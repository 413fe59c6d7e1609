"""The HTTP API of one instance (protocol.md section 4).

Every handler follows its row of the contract: read, act, answer. What it acts on is in
:class:`Parts`, so the whole API runs in a test without a socket. msgspec decodes bodies and queries
into the types that also describe them (``schema``). What all calls share is in ``dispatch``.
"""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus

import msgspec
from prometheus_client import CollectorRegistry

from pokebridge.api import pages, schema
from pokebridge.api.administration import (
    ClusterCalls,
    ClusterControl,
    MailboxCalls,
    SessionCalls,
)
from pokebridge.api.dispatch import Api
from pokebridge.api.exchange import (
    NEVER_CACHED,
    Request,
    Response,
    Route,
    body_reader,
    json_response,
)
from pokebridge.api.messages import MessageCalls
from pokebridge.api.metrics import RequestMetrics, exposition
from pokebridge.api.openapi import Call, describe
from pokebridge.api.pokes import PokeCalls
from pokebridge.api.waiting import Waiting
from pokebridge.asgi import ASGIApp
from pokebridge.cluster.watchers import Watchers
from pokebridge.durations import RequestDurations
from pokebridge.errors import UnavailableError
from pokebridge.gateway.handshake import Network
from pokebridge.mailbox.base import Mailbox
from pokebridge.mailbox.devices import KnownDevices
from pokebridge.model import PublishPokes, SendMessage, check_recipient
from pokebridge.tokens import SignToken, TokenVerifier
from pokebridge.wire import CONNECT_PATH

BODY_CAP_BYTES = 96 * 1024
"""A whole request body, where its call has no other limit: a message of 64 KiB and its envelope."""
_DESCRIPTION = f"Clients sleep on one WebSocket (`{CONNECT_PATH}`), hear a poke, and pull here."


@dataclass(frozen=True, kw_only=True, slots=True)
class MailboxSide:
    """What the calls about messages and the mailbox work on."""

    mailbox: Mailbox
    devices: KnownDevices
    send: SendMessage
    on_pulled: Callable[[str, int], None]
    """Called with a recipient and the version up to which it has everything now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What the API needs of its instance.

    Any call of a part may raise a :class:`~pokebridge.errors.PokebridgeError`, which is answered
    with its status.
    """

    verifier: TokenVerifier
    publish: PublishPokes
    disconnect: Callable[[str], Awaitable[None]]
    """Closes a recipient's sessions, on all instances."""
    mailbox: MailboxSide | None
    """``None``: there are no calls about messages."""
    cluster: ClusterControl
    watchers: Watchers
    """The recipients that are poked when the cluster changes."""
    not_ready: Callable[[], Awaitable[Sequence[str]]]
    """Why the instance can't serve now; empty when it can."""
    registry: CollectorRegistry
    """The metrics."""
    requests: RequestDurations
    """Where the durations of the requests are counted."""
    waiting: Waiting | None = None
    """Lets calls wait; ``None``: each is answered at once."""
    has_calls: bool = True
    """False: only the calls about operations are served."""
    middleware: Sequence[Callable[[ASGIApp], ASGIApp]] = ()
    """ASGI middleware around everything else, outermost first."""
    allowed_origins: Sequence[str] = ()
    """Origins that may call from a browser; ``"*"`` allows any."""
    trusted_proxies: Sequence[Network] = ()
    """Proxies whose forwarding fields are believed."""
    path_prefix: str = ""
    """The beginning of every path that clients use, which a proxy may have removed."""
    revoke: Callable[[str], Awaitable[None]] | None = None
    """Closes a recipient's sessions and revokes its tokens. ``None``: that is not offered."""
    sign_dev_token: SignToken | None = None
    """Makes a token for anybody who asks. Given with ``--dev`` only."""


def create_api(parts: Parts) -> ASGIApp:
    """The ASGI app that serves the API."""
    parts.registry.register(RequestMetrics(parts.requests))
    routes = [*_routes(parts)]
    calls = [route for route in routes if isinstance(route, Call)]
    app: ASGIApp = Api(
        [*routes, *pages.docs_routes(), _description(calls)],
        parts.verifier,
        parts.requests,
        allowed_origins=parts.allowed_origins,
        limit_bytes=BODY_CAP_BYTES,
    )
    for wrap in reversed(parts.middleware):
        app = wrap(app)
    return app


def _routes(parts: Parts) -> Iterable[Route]:
    if parts.waiting is not None:
        yield from parts.waiting.routes()
    if parts.has_calls:
        yield from PokeCalls(parts.publish).routes()
        if parts.mailbox is not None:
            side = parts.mailbox
            yield from MessageCalls(
                side.mailbox, side.devices, side.send, side.on_pulled, parts.waiting
            ).routes()
            yield from MailboxCalls(side.mailbox.stats).routes()
        yield from SessionCalls(
            parts.cluster,
            parts.disconnect,
            parts.trusted_proxies,
            parts.path_prefix,
            parts.revoke,
            None if parts.mailbox is None else parts.mailbox.mailbox.inspect,
        ).routes()
        yield from ClusterCalls(parts.cluster, parts.watchers).routes()
    yield from _operations(parts)
    if parts.sign_dev_token is not None:
        yield _dev_token(parts.sign_dev_token)
    if parts.has_calls:
        yield from pages.console_routes(has_playground=parts.sign_dev_token is not None)


def _description(calls: Sequence[Call]) -> Route:
    @cache
    def text() -> bytes:
        return msgspec.json.encode(describe("pokebridge", _DESCRIPTION, calls))

    headers = [(b"content-type", b"application/json"), NEVER_CACHED]

    async def openapi(_: Request) -> Response:
        return Response(HTTPStatus.OK, headers, text())

    return Route("GET", "/openapi.json", openapi, scope=None)


def _operations(parts: Parts) -> Iterable[Route]:
    async def healthz(_: Request) -> Response:
        return json_response(schema.Health())

    async def readyz(_: Request) -> Response:
        reasons = await parts.not_ready()
        if reasons:
            raise UnavailableError("; ".join(reasons))
        return json_response(schema.Health())

    async def metrics(_: Request) -> Response:
        return exposition(parts.registry)

    ok = {200: schema.Health}
    yield Call("GET", "/healthz", healthz, "Is it alive", scope=None, answers=ok)
    yield Call("GET", "/readyz", readyz, "Can it serve", scope=None, answers=ok, problems=[503])
    text = {200: "Prometheus's text format."}
    yield Call("GET", "/metrics", metrics, "Prometheus metrics", scope=None, answers=text)


def _dev_token(sign: SignToken) -> Route:
    read_wanted = body_reader(schema.TokenRequest)

    async def dev_token(request: Request) -> Response:
        wanted = await read_wanted(request)
        token = sign(check_recipient(wanted.sub), wanted.scope.split(), wanted.ttl_s)
        return json_response(schema.Token(token))

    return Call(
        "POST",
        "/v1/dev/token",
        dev_token,
        "Make a token for anybody (--dev only)",
        scope=None,
        body=schema.TokenRequest,
        answers={200: schema.Token},
    )
