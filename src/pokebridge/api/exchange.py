"""One request and its response, and what the handlers do with them: read, decode, answer."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from http import HTTPStatus
from typing import TypeVar
from urllib.parse import unquote_plus

import msgspec

from pokebridge.asgi import IN_TIME, Receive, Scope
from pokebridge.errors import InputError, RefusedError, TooLargeError
from pokebridge.submission import decode_json
from pokebridge.tokens import Claims

BODY_DEADLINE_S = 30.0

Header = tuple[bytes, bytes]
"""The name, in lower case, and the value."""
NEVER_CACHED: Header = (b"cache-control", b"private, no-store")
"""An answer belongs to the caller whose token asked for it."""
VARY_BY_ORIGIN: Header = (b"vary", b"Origin")
"""Every answer has it, because one to another origin has other headers."""
_JSON = ((b"content-type", b"application/json"), NEVER_CACHED)

T = TypeVar("T")

_WITHOUT_BODY = frozenset({204, 304})
_encode = msgspec.json.Encoder().encode


class Request:
    """One request, as its ASGI scope describes it.

    - ``scope``: the ASGI scope
    - ``method``, ``path``: the path is decoded
    - ``headers``: the value of each header, by its name in lower case
    - ``route``: the route in metrics
    - ``rest``: the part of the path that stands for the parameter of the template
    - ``limit_bytes``: the largest body that is read
    - ``caller``: who calls; set for calls that need a token
    - ``is_waiting``: whether the answer waits for something to happen
    """

    __slots__ = (
        *("_receive", "caller", "headers", "is_waiting", "limit_bytes", "method"),
        *("path", "rest", "route", "scope"),
    )
    caller: Claims

    def __init__(self, scope: Scope, receive: Receive, limit_bytes: int) -> None:
        self.scope = scope
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers = _joined(scope["headers"])
        self.route = "none"
        self.rest = ""
        self.limit_bytes = limit_bytes
        self.is_waiting = False
        self._receive = receive

    def header(self, name: bytes) -> str:
        """The value of a header, and an empty string for one that is missing."""
        return self.headers.get(name, b"").decode("latin-1")

    async def body(self) -> bytes:
        """Read the body. At most ``limit_bytes`` and one piece of it are held in memory.

        Raises:
            TooLargeError: the body is larger than ``limit_bytes``.
            RefusedError: it is compressed, or did not arrive in time, or not whole.
        """
        if self.header(b"content-encoding").lower() not in {"", "identity"}:
            raise RefusedError(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                "a body must not be compressed: send it without Content-Encoding",
                {"Accept-Encoding": "identity"},
            )
        if IN_TIME in self.scope.get("extensions", ()):
            return await self._whole_body()
        try:
            async with asyncio.timeout(BODY_DEADLINE_S):
                return await self._whole_body()
        except TimeoutError:
            raise RefusedError(
                HTTPStatus.REQUEST_TIMEOUT, "the body took too long to arrive"
            ) from None

    async def _whole_body(self) -> bytes:
        pieces, left_bytes, is_whole = [], self.limit_bytes, False
        while not is_whole:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise RefusedError(HTTPStatus.BAD_REQUEST, "the request ended before its body did")
            pieces.append(message.get("body", b""))
            left_bytes -= len(pieces[-1])
            if left_bytes < 0:
                raise self._too_large()
            is_whole = not message.get("more_body", False)
        return b"".join(pieces)

    async def until_gone(self) -> None:
        """Return when the client has gone away. Only for a request whose body is not wanted."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    def check_declared_length(self) -> None:
        """Raise :class:`~pokebridge.errors.TooLargeError` if the declared length is too large."""
        declared = self.headers.get(b"content-length")
        if declared is not None and declared.isdigit() and int(declared) > self.limit_bytes:
            raise self._too_large()

    def _too_large(self) -> TooLargeError:
        return TooLargeError(f"a body may have at most {self.limit_bytes} bytes here")


def _joined(headers: Sequence[Header]) -> dict[bytes, bytes]:
    """The values of ``headers`` by name. Repeated fields are one list (RFC 9110, section 5.3)."""
    joined = dict(headers)
    if len(joined) < len(headers):
        joined = {}
        for name, value in headers:
            joined[name] = joined[name] + b", " + value if name in joined else value
    return joined


class Response:
    """A complete answer. It has the length of ``body``, and varies by origin."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: Iterable[Header] = (), body: bytes = b"") -> None:
        self.status = int(status)
        self.headers = [*headers, VARY_BY_ORIGIN]
        self.body = body
        if self.status not in _WITHOUT_BODY:
            self.headers.append((b"content-length", b"%d" % len(body)))


Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Route:
    """``handler`` answers ``method`` at ``path``.

    A path may end in a parameter, ``{name:path}``, which stands for the rest of it. ``scope`` is
    the scope that the token must grant; ``""`` accepts any token, ``None`` needs no token.
    ``limit_bytes`` is the largest body, ``None`` the usual one. A route for GET answers HEAD too
    (RFC 9110, section 9.1).
    """

    method: str
    path: str
    handler: Handler
    _: KW_ONLY
    scope: str | None = ""
    limit_bytes: int | None = None

    @property
    def label(self) -> str:
        """The route in metrics. Pages share one."""
        return "none"


def header_list(headers: Mapping[str, str]) -> list[Header]:
    """``headers`` in the form of ASGI."""
    return [
        (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()
    ]


def body_reader(kind: type[T]) -> Callable[[Request], Awaitable[T]]:
    """A function that reads a request's JSON body as ``kind``."""
    decode = msgspec.json.Decoder(kind).decode

    async def read(request: Request) -> T:
        return decode_json(decode, await request.body())

    return read


def read_query(request: Request, kind: type[T]) -> T:
    """The query as ``kind``. Raises :class:`~pokebridge.errors.InputError` when it is invalid."""
    query = request.scope["query_string"].decode("latin-1")
    is_plain = "%" not in query and "+" not in query
    given: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        name, _, value = part.partition("=")
        if not is_plain:
            name, value = unquote_plus(name), unquote_plus(value)
        if name in given:
            raise InputError("query: a parameter is given twice")
        given[name] = value
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        raise InputError(f"query: {error}") from None


def json_response(
    answer: msgspec.Struct, status: int = HTTPStatus.OK, *, headers: Iterable[Header] = ()
) -> Response:
    """The response with ``answer`` as its JSON body. No cache may store it."""
    return Response(status, [*_JSON, *headers], _encode(answer))


def no_content() -> Response:
    """The response without a body."""
    return Response(HTTPStatus.NO_CONTENT, [NEVER_CACHED])
