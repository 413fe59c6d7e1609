"""The HTTP API of one instance (protocol.md section 4).

Every handler reads like its row of the contract: authorize, read, do, answer. What it does is in
:class:`Parts`, which the server puts together, so that the whole API runs in a test without a
socket. Bodies and queries are decoded by msgspec into the types that also describe them
(``schema``); FastAPI routes, and serves the description.
"""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from pokebridge import console
from pokebridge.api import docs, problems, schema
from pokebridge.api.administration import ClusterCalls, Migrate, SessionCalls
from pokebridge.api.exchange import Verify, body_reader, json_response
from pokebridge.api.limits import BodyLimit
from pokebridge.api.messages import MessageCalls
from pokebridge.api.metrics import RequestMetrics, exposition
from pokebridge.api.openapi import Api
from pokebridge.api.pokes import PokeCalls
from pokebridge.gateway.handshake import Network
from pokebridge.mailbox.base import Mailbox
from pokebridge.mailbox.devices import KnownDevices
from pokebridge.model import NewMessage, Poke, Receipt, check_recipient
from pokebridge.wire import CONNECT_PATH

# What a body may have in all: a message of 64 KiB and its frame; a thousand recipients.
BODY_CAP_BYTES = 96 * 1024
POKES_CAP_BYTES = 384 * 1024

Send = Callable[[NewMessage], Awaitable[Receipt]]
PublishPokes = Callable[[Sequence[Poke]], Awaitable[None]]
Sign = Callable[[str, Iterable[str], float], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What the API needs of its instance.

    Every call may raise a :class:`~pokebridge.errors.PokebridgeError`, which is answered with its
    status. Without ``has_calls`` there is nothing but operations; without a ``mailbox`` (and
    ``send``) nothing about messages.

    ``home_of`` tells of a recipient its shard, the instance that serves it best, and the URL to
    connect to for that: empty for the host that was asked. ``not_ready`` says why the instance
    can't serve now, an empty sequence that it can. ``drain`` has an instance begin to send its
    sessions elsewhere. ``watch`` has a recipient poked when there is something new to see, for the
    seconds that it returns. ``on_pull`` is given the duration of each pull in seconds,
    ``on_pulled`` the recipient and the version up to which it has now what there is.
    ``middleware`` is ASGI's, around everything else.
    ``allowed_origins`` may call from a browser, ``"*"`` stands for any. ``sign_dev_token`` makes
    a token for anybody who asks: given with ``--dev`` alone.
    """

    verify: Verify
    mailbox: Mailbox | None
    send: Send | None
    publish_pokes: PublishPokes
    disconnect: Callable[[str], Awaitable[None]]
    home_of: Callable[[str], tuple[int, str, str]]
    view_cluster: Callable[[], schema.Cluster]
    migrate: Migrate
    drain: Callable[[str], Awaitable[None]]
    events: Callable[[], schema.Events]
    watch: Callable[[str], float]
    not_ready: Callable[[], Awaitable[Sequence[str]]]
    registry: CollectorRegistry
    on_pull: Callable[[float], None]
    on_pulled: Callable[[str, int], None]
    devices: KnownDevices | None = None
    has_calls: bool = True
    middleware: Sequence[Callable[[ASGIApp], ASGIApp]] = ()
    allowed_origins: Sequence[str] = ()
    trusted_proxies: Sequence[Network] = ()
    sign_dev_token: Sign | None = None


def create_api(parts: Parts) -> FastAPI:
    """The ASGI app that serves the API of the instance that ``parts`` are of."""
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
    _add_operations(app, parts)
    if parts.sign_dev_token is not None:
        _add_dev_token(app, parts.sign_dev_token)
        console.install_playground(app)
    return app


def _add_calls(app: Api, parts: Parts) -> None:
    PokeCalls(parts.verify, parts.publish_pokes).add_to(app)
    if parts.mailbox is not None and parts.send is not None:
        MessageCalls(
            parts.verify, parts.mailbox, parts.send, parts.on_pulled, parts.devices
        ).add_to(app)
    SessionCalls(
        parts.verify,
        home_of=parts.home_of,
        disconnect=parts.disconnect,
        trusted_proxies=parts.trusted_proxies,
    ).add_to(app)
    ClusterCalls(
        parts.verify,
        view_cluster=parts.view_cluster,
        migrate=parts.migrate,
        drain=parts.drain,
        events=parts.events,
        watch=parts.watch,
    ).add_to(app)


def _middleware(parts: Parts) -> Sequence[Middleware]:
    """From the outside in."""
    return [
        *(Middleware(each) for each in parts.middleware),
        Middleware(RequestMetrics, registry=parts.registry, on_pull=parts.on_pull),
        Middleware(
            CORSMiddleware,
            allow_origins=parts.allowed_origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "If-None-Match"],
            expose_headers=["ETag", "Retry-After"],
        ),
        Middleware(
            BodyLimit,
            default_bytes=BODY_CAP_BYTES,
            bytes_by_path={"/v1/pokes": POKES_CAP_BYTES},
        ),
    ]


def _add_operations(app: Api, parts: Parts) -> None:
    async def healthz(_: Request) -> Response:
        return json_response(schema.Health())

    async def readyz(_: Request) -> Response:
        reasons = await parts.not_ready()
        if reasons:
            return problems.problem(HTTPStatus.SERVICE_UNAVAILABLE, "; ".join(reasons))
        return json_response(schema.Health())

    async def metrics(_: Request) -> Response:
        return exposition(parts.registry)

    ok = {200: schema.Health}
    app.call("GET", "/healthz", healthz, "Is it alive", scope=None, answers=ok)
    app.call("GET", "/readyz", readyz, "Can it serve", scope=None, answers=ok, problems=[503])
    text = {200: "Prometheus's text format."}
    app.call("GET", "/metrics", metrics, "Prometheus metrics", scope=None, answers=text)


def _add_dev_token(app: Api, sign: Sign) -> None:
    read_wanted = body_reader(schema.TokenRequest)

    async def dev_token(request: Request) -> Response:
        wanted = await read_wanted(request)
        token = sign(check_recipient(wanted.sub), wanted.scope.split(), wanted.ttl_s)
        return json_response(schema.Token(token), headers={"Cache-Control": "no-store"})

    app.call(
        "POST",
        "/v1/dev/token",
        dev_token,
        "Make a token for anybody (--dev only)",
        scope=None,
        body=schema.TokenRequest,
        answers={200: schema.Token},
    )
