"""The HTTP API of one instance (protocol.md section 4).

Every handler reads like its row of the contract: authorize, read, do, answer. What it does is in
:class:`Parts`, which the server puts together, so that the whole API runs in a test without a
socket. Bodies and queries are decoded by msgspec into the types that also describe them
(``schema``); FastAPI routes, and serves the description.
"""

import asyncio
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from msgspec import UNSET, Raw
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from pokebridge import console
from pokebridge.errors import AuthError, ForbiddenError, InputError
from pokebridge.mailbox.base import Mailbox
from pokebridge.model import (
    DEFAULT_DEVICE,
    Message,
    NewMessage,
    Poke,
    Receipt,
    check_device,
    check_recipient,
    is_recipient,
)
from pokebridge.server import docs, problems, schema
from pokebridge.server.limits import BodyLimit
from pokebridge.server.metrics import RequestMetrics, exposition
from pokebridge.server.schema import operation
from pokebridge.sharding import shard_of
from pokebridge.tokens import Claims

# What a body may have in all: a message of 64 KiB and its frame; a thousand recipients.
BODY_CAP_BYTES = 96 * 1024
POKES_CAP_BYTES = 384 * 1024
BODY_DEADLINE_S = 30.0
# A body nested deeper could exhaust the stack of the parser that pulls it, for ever.
MAX_BODY_DEPTH = 100
SEEN_DEVICES = 10_000

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What the API needs of its instance.

    Every call may raise a :class:`~pokebridge.errors.PokebridgeError`, which is answered with its
    status. ``advertise_url`` is where clients reach this instance (``wss://host``);
    ``None``: at the host that they asked.
    ``not_ready`` says why the instance can't serve now, an empty sequence that it can. ``drain``
    begins to send the sessions of this instance elsewhere, and returns at once.
    ``allowed_origins`` may call from a browser, ``"*"`` stands for any. ``sign_dev_token`` makes
    a token for anybody who asks: given with ``--dev`` alone.
    """

    instance: str
    shard_count: int
    verify: Callable[[str], Awaitable[Claims]]
    mailbox: Mailbox
    send: Callable[[NewMessage], Awaitable[Receipt]]
    publish_pokes: Callable[[Sequence[Poke]], Awaitable[None]]
    disconnect: Callable[[str], Awaitable[None]]
    view_cluster: Callable[[], Awaitable[schema.Cluster]]
    drain: Callable[[], None]
    not_ready: Callable[[], Awaitable[Sequence[str]]]
    registry: CollectorRegistry
    advertise_url: str | None = None
    allowed_origins: Sequence[str] = ()
    sign_dev_token: Callable[[str, Iterable[str], float], str] | None = None


class _Api(FastAPI):
    """FastAPI with the description's components from ``schema``."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = get_openapi(
                title=self.title,
                version=self.version,
                description=self.description,
                openapi_version=schema.OPENAPI_VERSION,
                routes=self.routes,
            ) | {"components": schema.components()}
        return self.openapi_schema

    def call(
        self,
        method: str,
        path: str,
        handler: Callable[[Request], Awaitable[Response]],
        described: dict[str, Any],
    ) -> None:
        """Answer ``method`` at ``path``; what answers GET answers HEAD (RFC 9110, section 9.1)."""
        self.add_api_route(path, handler, methods=[method], response_class=Response, **described)
        if method == "GET":
            self.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False)


def create_api(parts: Parts) -> FastAPI:
    """The ASGI app that serves the API of the instance that ``parts`` are of."""
    app = _Api(
        title="pokebridge",
        version="1",
        description="Clients sleep on one WebSocket (`/v1/connect`), hear a poke, and pull here.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
        middleware=[
            Middleware(RequestMetrics, registry=parts.registry),
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
        ],
    )
    problems.install(app)
    docs.install(app)
    _add_pokes_and_messages(app, parts)
    _add_sessions_and_cluster(app, parts)
    _add_operations(app, parts)
    if parts.sign_dev_token is not None:
        _add_dev_token(app, parts.sign_dev_token)
        console.install(app)
    return app


# --- pokes and messages -----------------------------------------------------------------------


def _add_pokes_and_messages(app: _Api, parts: Parts) -> None:
    read_pokes = _body_reader(schema.PokeRequest)
    read_message = _body_reader(schema.SendRequest)
    read_ack = _body_reader(schema.AckRequest)
    seen = _SeenDevices(parts.mailbox)

    async def poke(request: Request) -> Response:
        await _authorize(parts, request, "poke")
        wanted = await read_pokes(request)
        pokes = [Poke(check_recipient(recipient)) for recipient in _recipients(wanted)]
        await parts.publish_pokes(pokes)
        return _json(schema.PokesAccepted(len(pokes)), HTTPStatus.ACCEPTED)

    async def send(request: Request) -> Response:
        claims = await _authorize(parts, request, "send")
        receipt = await parts.send(_new_message(claims.subject, await read_message(request)))
        status = HTTPStatus.OK if receipt.duplicate else HTTPStatus.ACCEPTED
        return _json(schema.Sent(receipt.id, receipt.version), status)

    async def pull(request: Request) -> Response:
        reader = (await _authorize(parts, request)).subject
        query = _query(request, schema.PullQuery)
        if query.device is not UNSET:
            await seen.add(reader, check_device(query.device))
        page = await parts.mailbox.read(reader, after=query.after, limit=query.limit)
        headers = {"ETag": f'"{page.head}"', "Cache-Control": "private, no-cache"}
        if _matches(request.headers.get("if-none-match", ""), headers["ETag"]):
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
        messages = [_pulled(message) for message in page.messages]
        return _json(schema.Pulled(messages, page.version, page.more), headers=headers)

    async def ack(request: Request) -> Response:
        reader = (await _authorize(parts, request)).subject
        query = _query(request, schema.AckQuery)
        acked = await read_ack(request)
        given = (acked.device, query.device)
        devices = [check_device(device) for device in given if device is not UNSET]
        await parts.mailbox.ack(reader, [*devices, DEFAULT_DEVICE][0], acked.version)
        return Response(status_code=HTTPStatus.NO_CONTENT)

    app.call(
        "POST",
        "/v1/pokes",
        poke,
        operation(
            "Poke recipients",
            scope="poke",
            body=schema.PokeRequest,
            answers={202: schema.PokesAccepted},
        ),
    )
    app.call(
        "POST",
        "/v1/messages",
        send,
        operation(
            "Send a message",
            scope="send",
            body=schema.SendRequest,
            answers={202: schema.Sent, 200: schema.Sent},
        ),
    )
    app.call(
        "GET",
        "/v1/messages",
        pull,
        operation(
            "Pull the caller's messages",
            query=schema.PullQuery,
            has_etag=True,
            answers={200: schema.Pulled, 304: "Nothing new: `If-None-Match` has the `ETag`."},
        ),
    )
    app.call(
        "POST",
        "/v1/messages/ack",
        ack,
        operation(
            "Acknowledge messages",
            query=schema.AckQuery,
            body=schema.AckRequest,
            answers={204: "Acknowledged."},
        ),
    )


def _recipients(wanted: schema.PokeRequest) -> Sequence[str]:
    if wanted.recipient is UNSET and wanted.recipients is not UNSET:
        return wanted.recipients
    if wanted.recipients is UNSET and wanted.recipient is not UNSET:
        return [wanted.recipient]
    raise InputError("name either a recipient or recipients")


def _new_message(sender: str, wanted: schema.SendRequest) -> NewMessage:
    body = bytes(wanted.body)
    _check_body(body)
    if wanted.id is not UNSET and not (
        is_recipient(wanted.id) and len(wanted.id) <= schema.MAX_ID_LENGTH
    ):
        raise InputError(f"an id is 1 to {schema.MAX_ID_LENGTH} visible ASCII characters")
    return NewMessage(
        recipient=check_recipient(wanted.recipient),
        sender=sender,
        id=uuid.uuid4().hex if wanted.id is UNSET else wanted.id,
        body=body,
        ttl_s=None if wanted.ttl_s is UNSET else wanted.ttl_s,
        id_is_senders=wanted.id is not UNSET,
    )


def _check_body(body: bytes) -> None:
    """Raise unless every client can parse ``body``, as one that can't would be stuck before it."""
    if len(body) > schema.MAX_BODY_BYTES:
        raise HTTPException(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"a message's body may have at most {schema.MAX_BODY_BYTES} bytes",
        )
    value = _decode(msgspec.json.decode, body)
    # Counting brackets is cheap, and enough for almost every body.
    opened = body.count(b"[") + body.count(b"{")
    if opened > MAX_BODY_DEPTH and _is_deeper(value, MAX_BODY_DEPTH):
        raise InputError(f"a message's body may be nested at most {MAX_BODY_DEPTH} deep")


def _is_deeper(value: object, depth: int) -> bool:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return False
    return depth == 0 or any(_is_deeper(child, depth - 1) for child in value)


def _pulled(message: Message) -> schema.PulledMessage:
    seconds, milliseconds = divmod(message.sent_at_ms, 1000)
    return schema.PulledMessage(
        id=message.id,
        version=message.version,
        sender=message.sender,
        body=Raw(message.body),
        sent_at=f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{milliseconds:03}Z",
    )


def _matches(if_none_match: str, etag: str) -> bool:
    """Whether the header names ``etag``, compared weakly (RFC 9110, section 13.1.2)."""
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return etag in tags or tags == ["*"]


class _SeenDevices:
    """Makes devices known to the mailbox, but not again at every pull."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._recent: OrderedDict[tuple[str, str], None] = OrderedDict()

    async def add(self, recipient: str, device: str) -> None:
        key = (recipient, device)
        if key not in self._recent:
            await self._mailbox.see_device(recipient, device)
        self._recent[key] = None
        self._recent.move_to_end(key)
        if len(self._recent) > SEEN_DEVICES:
            self._recent.popitem(last=False)


# --- sessions and cluster ---------------------------------------------------------------------


def _add_sessions_and_cluster(app: _Api, parts: Parts) -> None:
    read_mode = _body_reader(schema.ModeRequest)
    read_drain = _body_reader(schema.DrainRequest)

    async def connect(_: Request) -> Response:
        return problems.problem(
            HTTPStatus.UPGRADE_REQUIRED,
            "connect here by WebSocket, version 13",
            headers={"Upgrade": "websocket", "Connection": "Upgrade"},
        )

    async def connect_info(request: Request) -> Response:
        caller = (await _authorize(parts, request)).subject
        return _json(
            schema.ConnectInfo(
                url=f"{parts.advertise_url or _url_asked(request)}/v1/connect",
                shard=shard_of(caller, parts.shard_count),
                instance=parts.instance,
            )
        )

    async def disconnect(request: Request) -> Response:
        await _authorize(parts, request, "admin")
        await parts.disconnect(check_recipient(request.path_params["recipient"]))
        return Response(status_code=HTTPStatus.NO_CONTENT)

    async def cluster(request: Request) -> Response:
        await _authorize(parts, request, "admin")
        return _json(await parts.view_cluster())

    async def migrate(request: Request) -> Response:
        await _authorize(parts, request, "admin")
        wanted = await read_mode(request)
        if wanted.mode != "fanout":
            raise HTTPException(HTTPStatus.CONFLICT, "not available on this instance yet")
        return _json(wanted, HTTPStatus.ACCEPTED)

    async def drain(request: Request) -> Response:
        await _authorize(parts, request, "admin")
        wanted = await read_drain(request)
        if wanted.instance != parts.instance:
            raise HTTPException(HTTPStatus.NOT_FOUND, "this instance knows no such instance")
        parts.drain()
        return _json(wanted, HTTPStatus.ACCEPTED)

    # OpenAPI has no words for a WebSocket.
    app.call("GET", "/v1/connect", connect, {"include_in_schema": False})
    app.call(
        "GET",
        "/v1/connect-info",
        connect_info,
        operation("Where to connect", answers={200: schema.ConnectInfo}),
    )
    app.call(
        "DELETE",
        "/v1/sessions/{recipient:path}",
        disconnect,
        operation(
            "Close every session of a recipient",
            scope="admin",
            path={"recipient": schema.Recipient},
            answers={204: "They close with 4401."},
            problems=[404, 422],
        ),
    )
    app.call(
        "GET",
        "/v1/cluster",
        cluster,
        operation("Look at the cluster", scope="admin", answers={200: schema.Cluster}),
    )
    app.call(
        "PUT",
        "/v1/cluster/mode",
        migrate,
        operation(
            "Change the mode",
            scope="admin",
            body=schema.ModeRequest,
            answers={202: schema.ModeRequest},
            problems=[409],
        ),
    )
    app.call(
        "POST",
        "/v1/cluster/drain",
        drain,
        operation(
            "Drain an instance",
            scope="admin",
            body=schema.DrainRequest,
            answers={202: schema.DrainRequest},
            problems=[404],
        ),
    )


def _url_asked(request: Request) -> str:
    scheme = "wss" if request.url.scheme == "https" else "ws"
    return f"{scheme}://{request.url.netloc}"


# --- operations -------------------------------------------------------------------------------


def _add_operations(app: _Api, parts: Parts) -> None:
    async def healthz(_: Request) -> Response:
        return _json(schema.Health())

    async def readyz(_: Request) -> Response:
        reasons = await parts.not_ready()
        if reasons:
            return problems.problem(HTTPStatus.SERVICE_UNAVAILABLE, "; ".join(reasons))
        return _json(schema.Health())

    async def metrics(_: Request) -> Response:
        return exposition(parts.registry)

    app.call(
        "GET",
        "/healthz",
        healthz,
        operation("Is it alive", scope=None, answers={200: schema.Health}),
    )
    app.call(
        "GET",
        "/readyz",
        readyz,
        operation("Can it serve", scope=None, answers={200: schema.Health}, problems=[503]),
    )
    app.call(
        "GET",
        "/metrics",
        metrics,
        operation("Prometheus metrics", scope=None, answers={200: "Prometheus's text format."}),
    )


def _add_dev_token(app: _Api, sign: Callable[[str, Iterable[str], float], str]) -> None:
    read_wanted = _body_reader(schema.TokenRequest)

    async def dev_token(request: Request) -> Response:
        wanted = await read_wanted(request)
        token = sign(check_recipient(wanted.sub), wanted.scope.split(), wanted.ttl_s)
        return _json(schema.Token(token), headers={"Cache-Control": "no-store"})

    app.call(
        "POST",
        "/v1/dev/token",
        dev_token,
        operation(
            "Make a token for anybody (--dev only)",
            scope=None,
            body=schema.TokenRequest,
            answers={200: schema.Token},
        ),
    )


# --- what every handler does ------------------------------------------------------------------


async def _authorize(parts: Parts, request: Request, scope: str = "") -> Claims:
    """Who calls, by the bearer token alone (RFC 6750, section 2.1); ``scope`` must be granted."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        raise AuthError("this call needs a token: Authorization: Bearer …")
    claims = await parts.verify(token.strip())
    if scope and scope not in claims.scopes:
        raise ForbiddenError(f"the token lacks the scope {scope!r}")
    return claims


def _body_reader(kind: type[_T]) -> Callable[[Request], Awaitable[_T]]:
    """What reads a request's JSON body as ``kind``."""
    decode = msgspec.json.Decoder(kind).decode

    async def read(request: Request) -> _T:
        try:
            async with asyncio.timeout(BODY_DEADLINE_S):
                text = await request.body()
        except TimeoutError:
            raise HTTPException(
                HTTPStatus.REQUEST_TIMEOUT, "the body took too long to arrive"
            ) from None
        return _decode(decode, text)

    return read


def _decode(decode: Callable[[bytes], _T], text: bytes) -> _T:
    try:
        return decode(text)
    except msgspec.ValidationError as error:
        raise InputError(str(error)) from None
    except RecursionError:
        raise InputError("the body is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HTTPException(HTTPStatus.BAD_REQUEST, f"the body is not JSON: {error}") from None


def _query(request: Request, kind: type[_T]) -> _T:
    given = request.query_params
    if len(given) != len(given.multi_items()):
        raise InputError("query: a parameter is given twice")
    try:
        return msgspec.convert(dict(given), kind, strict=False)
    except msgspec.ValidationError as error:
        raise InputError(f"query: {error}") from None


def _json(
    answer: msgspec.Struct, status: int = HTTPStatus.OK, *, headers: dict[str, str] | None = None
) -> Response:
    return Response(
        msgspec.json.encode(answer), status, headers=headers, media_type="application/json"
    )
