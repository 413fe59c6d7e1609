"""uvicorn's HTTP protocol with the limits and the rules that a server on the open internet needs.

uvicorn's own class has no limit for a head, no deadline for a request, and none for an answer that
nobody reads. It does not check Host, and answers a mistake before the requests ahead of it. This
class adds

- a deadline for each state of a connection: a request arrives, one is waited for, an answer is
  read;
- a limit for everything in a request but its body, which the app limits;
- the checks of RFC 9112 that llhttp leaves to its user;
- the order of the answers: a mistake is answered after the requests ahead of it;
- trailer fields, which are dropped. uvicorn adds them to the head, where they could authenticate;
- upgrades: to WebSocket they go to the gateway, others are ignored (RFC 9110, section 7.8).
"""

import asyncio
import re
from collections.abc import Mapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import urlsplit

import httptools

from pokebridge.border import note_unforeseen
from pokebridge.errors import RefusedError
from pokebridge.forwarded import forwarded_for
from pokebridge.gateway.entrance import Entrance
from pokebridge.gateway.handshake import (
    Network,
    UpgradeRequest,
    client_address,
    is_trusted,
    refusal_response,
)
from pokebridge.gateway.sockets import Sockets
from pokebridge.gateway.wheel import Wheel
from pokebridge.server.exchange import Exchange, ExchangeProtocol, Flow
from pokebridge.server.upgrades import head_without_upgrade, wanted_upgrade

MAX_HEAD_BYTES = 16 * 1024
"""The most bytes of the target, the header fields and the trailer fields of a request together."""
_CHUNK_BYTES = 16
"""What the framing of a chunk may take: its size in hexadecimal and two line ends."""
REQUEST_TIMEOUT_S = 10.0
"""How long the head of a request may take to arrive, and SLOW_BODY_BYTES of its body."""
SLOW_BODY_BYTES = 10 * 1024
"""A body of which less arrives in REQUEST_TIMEOUT_S is too slow."""
MAX_PIPELINED = 64
"""The most requests of a connection that wait for the answers ahead of theirs."""
KEEP_ALIVE_S = 75.0
"""How long a connection may wait for its next request. Load balancers wait less."""
UNREAD_TIMEOUT_S = 30.0
"""How long a peer may read nothing of an answer."""

# RFC 9112, section 3.2.2. The path may be empty.
_ABSOLUTE_FORM = re.compile(rb"https?://([^/?#@]+)(/[^?#]*)?(\?[^#]*)?", re.IGNORECASE)
_HOST = re.compile(rb"(\[[0-9a-f:.]+\]|[a-z0-9._~%-]*)(:[0-9]{0,5})?", re.IGNORECASE)
# Of all paths these alone have a part that may need percent-encoding.
_ENCODED_PATHS = b"/v1/sessions/"


class HttpHost(Protocol):
    """What a connection needs of its gateway."""

    entrance: Entrance
    """Answers upgrade requests."""
    wheel: Wheel
    """The deadlines."""

    @property
    def sockets(self) -> Sockets:
        """Counts the connections."""

    @property
    def trusted_proxies(self) -> Sequence[Network]:
        """The proxies whose forwarding fields are believed."""

    @property
    def path_prefix(self) -> str:
        """The beginning of every path that clients use."""

    def now(self) -> float:
        """The time on the loop's clock in seconds."""


class HttpProtocol(ExchangeProtocol):
    """One HTTP connection, until it closes or becomes a WebSocket."""

    def __init__(self, *args: Any, gateway: HttpHost, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gateway = gateway
        self._peer = ""
        # Whether the peer is a proxy, so that each request says whose it is.
        self._is_proxied = False
        self._prefix = gateway.path_prefix.encode()
        # Of the request that arrives: the bytes received that are neither body nor the framing of
        # chunks ...
        self._bytes = 0
        # ... those of its target and fields so far, which are exact in a pipeline too ...
        self._field_bytes = 0
        # ... and those of its body since the last deadline.
        self._body_bytes = 0
        # Whether a request has begun to arrive, and is not here as a whole ...
        self._arriving = False
        # ... whether it began with the bytes that are being parsed ...
        self._has_begun = False
        # ... whether it is in its head ...
        self._in_head = True
        # ... and what becomes of an upgrade that it asks for.
        self._is_handshake = self._ignores_upgrade = False
        # The last Host that was found valid.
        self._host = b""
        # The last thing to do, once all requests ahead are answered.
        self._at_last: partial[None] | None = None
        # The unread bytes of our answers when the peer last stopped reading, or was asked again.
        self._unread = 0
        self.wheel_slot = 0

    # --- called by asyncio ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, and start the deadline of its first request."""
        self.connections.add(self)
        self.transport = transport
        self.flow = Flow(transport)
        # uvicorn asks the transport's socket object, which keeps the answers, 360 bytes, for as
        # long as a WebSocket lives. The transport does not.
        self.server, self.client = _address(transport, "sockname"), _address(transport, "peername")
        self.scheme = "http"
        gateway = self._gateway
        self._peer = self.client[0] if self.client else ""
        trusted = gateway.trusted_proxies
        self._is_proxied = bool(trusted) and is_trusted(self._peer, trusted)
        address = "" if self._is_proxied else client_address(self._peer, (), ())
        self._arm(REQUEST_TIMEOUT_S)
        if not gateway.sockets.enter(self, address):
            self._hang_up(503, "too many connections just now")

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the deadline."""
        self._gateway.wheel.cancel(self)
        self._gateway.sockets.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser, within the limits."""
        if self.transport.is_closing() or self._at_last is not None:
            return
        try:
            self._feed(data)
        except Exception as error:  # noqa: BLE001 - the guard of this border
            note_unforeseen("http", error)
            self._hang_up(500, "a defect of the server: see its log")
        # Nearly every request is here as a whole by now, and needs no deadline.
        if self._has_begun:
            self._has_begun = False
            if self._arriving and not self.transport.is_closing():
                self._follow()

    def eof_received(self) -> bool:  # type: ignore[override]
        """The peer sends nothing more. Returns whether a request is still to be answered."""
        if not self._is_serving or (self._arriving and self._at_last is None):
            return False
        if self.running is not None and self.running.awaits_end:
            return False  # a client that is gone would keep a place for as long as its call waits
        self.cycle.keep_alive = False
        return True

    def pause_writing(self) -> None:
        """The peer does not read its answer: start the deadline for that."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """The peer has read enough: go on with the deadline of the connection's state."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._follow()

    def wake(self, now: float) -> None:  # noqa: ARG002 - the wheel's signature
        """The deadline of the connection's state has passed."""
        if self.transport.is_closing() or self.flow.write_paused:
            if self.transport.get_write_buffer_size() < self._unread:
                self._watch_reader()  # it reads, if slowly
            else:
                self.transport.abort()
        elif self._arriving and self.flow.read_paused:
            self._follow()  # by us: the requests ahead come first
        elif self._arriving and self._is_serving and self._body_bytes >= SLOW_BODY_BYTES:
            self._body_bytes = 0
            self._follow()  # it arrives, if slowly
        elif self._arriving and (self._in_head or self._is_serving):
            self._hang_up(408, "the request took too long to arrive")
        elif not self._is_serving:
            self._close()  # without a word: nothing was asked, or it is answered

    def give_way(self) -> None:
        """Close: another connection needs the descriptor."""
        self._close()

    # --- the parser's calls -----------------------------------------------------------------------

    def _feed(self, data: bytes) -> None:
        self._bytes += len(data)
        rest = None
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            rest = data[upgrade.args[0] :]
        except httptools.HttpParserError as error:
            self._refuse(error)
        if rest is not None:
            self._upgrade(rest)
        if self._bytes < 0:
            self._bytes = 0  # nothing is saved up for later
        elif self._bytes > MAX_HEAD_BYTES:
            self._hang_up(431, f"head and trailer of a request have at most {MAX_HEAD_BYTES} bytes")

    def _refuse(self, error: httptools.HttpParserError) -> None:
        """Answer what the parser, or one of its callbacks here, did not accept."""
        cause = error.__context__
        if isinstance(cause, RefusedError):
            self._hang_up(cause.status, str(cause))
            return
        if cause is not None and not isinstance(cause, httptools.HttpParserError):
            note_unforeseen("http", cause)
        self._hang_up(400, "not a valid HTTP request")

    def on_message_begin(self) -> None:
        """A request begins."""
        self.url, self.headers = b"", []
        self._field_bytes = self._body_bytes = 0
        self._is_handshake = self._ignores_upgrade = False
        self._arriving = self._has_begun = True

    def on_url(self, url: bytes) -> None:
        """Count a piece of the target."""
        self.url += url
        self._field_bytes += len(url)
        if self._field_bytes > MAX_HEAD_BYTES:
            raise _too_large()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a field, and drop it if it belongs to the trailer.

        llhttp leaves the white space at its end, which is no part of it (RFC 9112, section 5.1).
        """
        self._field_bytes += len(name) + len(value) + 4  # with ": " and the line's end
        if self._field_bytes > MAX_HEAD_BYTES:
            raise _too_large()
        if self._in_head:
            self.headers.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        """Check the head, and begin to serve the request."""
        version = self.parser.get_http_version()
        self._check_target()
        if self._prefix and self.url.startswith(self._prefix + b"/"):
            self.url = self.url[len(self._prefix) :]  # unless a proxy has removed it
        fields = dict(self.headers)
        if self.parser.should_upgrade():
            self._is_handshake = version != "1.0" and wanted_upgrade(self.headers) == b"websocket"
            self._ignores_upgrade = not self._is_handshake
        self._check_fields(fields, version)
        if self._is_proxied:
            self._attribute()
        if len(self.pipeline) >= MAX_PIPELINED:
            raise RefusedError(
                HTTPStatus.TOO_MANY_REQUESTS, "too many requests ahead of the answers"
            )
        self._in_head = False  # from now on a mistake is one of the request that is served
        if self._ignores_upgrade:
            return
        # RFC 9110, section 10.1.1: not from HTTP/1.0
        expects = version != "1.0" and fields.get(b"expect", b"").lower() == b"100-continue"
        self.scope = self.create_scope(version)
        if self._is_handshake:
            return
        if b"%" in self.url and not self.url.startswith(_ENCODED_PATHS):
            # What a filter in front of us did not recognise must be unknown here too.
            self.scope["path"] = self.scope["raw_path"].decode("ascii")
        self.serve(self.scope, waits_for_100=expects)

    def on_chunk_header(self) -> None:
        """Do not count the usual framing of a chunk. Extensions are counted."""
        self._bytes -= _CHUNK_BYTES

    def on_body(self, body: bytes) -> None:
        """Do not count the body: the app limits its size."""
        self._bytes -= len(body)
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request has arrived. The app limits the time to answer."""
        self._in_head, self._bytes = True, 0
        if self._ignores_upgrade or self._is_handshake:
            return
        self._arriving = False
        if self.cycle.response_complete:
            self._follow()
        else:
            self.cycle.more_body = False
            self.cycle.message_event.set()
            self._gateway.sockets.serve(self)

    def on_response_complete(self) -> None:
        """Go on with the next request, or wait for it."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            self._watch_reader()
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
        elif self._at_last is not None:
            self._at_last()
        else:
            self._follow()

    # --- checks -----------------------------------------------------------------------------------

    def _check_target(self) -> None:
        """Bring the target into origin-form (RFC 9112, section 3.2)."""
        if not self.url.startswith(b"/"):
            if self.parser.get_method() == b"CONNECT":
                raise RefusedError(HTTPStatus.NOT_IMPLEMENTED, "this server is no proxy")
            if absolute := _ABSOLUTE_FORM.fullmatch(self.url):
                self.url = (absolute[2] or b"/") + (absolute[3] or b"")
                for number, (name, _) in enumerate(self.headers):
                    if name == b"host":  # the target's authority counts
                        self.headers[number] = (name, absolute[1])
            elif self.url == b"*" and self.parser.get_method() == b"OPTIONS":
                self.url = b"/"
        if not (self.url.startswith(b"/") and self.url.isascii() and b"#" not in self.url):
            raise RefusedError(HTTPStatus.BAD_REQUEST, "the target is not a valid URL")
        try:
            if self.url.startswith(b"//"):
                urlsplit(self.url.decode())  # raises what would be raised deep in the app
        except ValueError:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "the target is not a valid URL") from None

    def _check_fields(self, fields: Mapping[bytes, bytes], version: str) -> None:
        """Check the version, Host and Transfer-Encoding (RFC 9112, sections 2.3, 3.2 and 6.1)."""
        if version not in {"1.0", "1.1"}:
            raise RefusedError(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "only HTTP/1.1 is served")
        host = fields.get(b"host")
        if (host is None and version == "1.1") or (
            len(fields) < len(self.headers)
            and [name for name, _ in self.headers].count(b"host") > 1
        ):
            raise RefusedError(HTTPStatus.BAD_REQUEST, "a request needs exactly one Host")
        if host is not None and host != self._host:
            if not _HOST.fullmatch(host):
                raise RefusedError(HTTPStatus.BAD_REQUEST, "the Host is not valid")
            self._host = host
        if b"transfer-encoding" in fields:
            self._check_coding(version)
        if self._is_handshake and fields.get(b"content-length", b"0") != b"0":
            raise RefusedError(HTTPStatus.BAD_REQUEST, "a handshake has no body")

    def _check_coding(self, version: str) -> None:
        if version == "1.0":
            raise RefusedError(HTTPStatus.BAD_REQUEST, "HTTP/1.0 has no Transfer-Encoding")
        for name, coding in self.headers:
            if name == b"transfer-encoding" and coding.lower() != b"chunked":
                raise RefusedError(
                    HTTPStatus.NOT_IMPLEMENTED, "the only transfer coding is chunked"
                )
        if self._is_handshake:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "a handshake has no body")

    def _attribute(self) -> None:
        """Count the connection for the client that the proxy names."""
        forwarded, trusted = forwarded_for(self.headers), self._gateway.trusted_proxies
        address = client_address(self._peer, forwarded, trusted)
        if not self._gateway.sockets.attribute(self, address):
            raise RefusedError(
                HTTPStatus.TOO_MANY_REQUESTS, "too many connections from this address"
            )

    # --- upgrades ---------------------------------------------------------------------------------

    def _upgrade(self, rest: bytes) -> None:
        """Hand a WebSocket upgrade to the gateway. Ignore that a request asks for another."""
        self._has_begun = False
        if self._ignores_upgrade:  # RFC 9110, section 7.8
            version = self.parser.get_http_version().encode()
            line = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)
            head = head_without_upgrade(line, self.headers)
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
            self._feed(head + rest)
            return
        self._arriving = True  # until it is answered
        if rest:
            # RFC 6455, section 4.1: a client sends nothing before the answer to its handshake.
            self._hang_up(400, "bytes before the handshake was answered")
            return
        if self._is_serving:
            self._hang_up(400, "an upgrade must be the only request under way")
            return
        request = UpgradeRequest(
            method=self.scope["method"],
            target=self.url.decode("latin-1"),
            headers=self.headers,
            peer=self._peer,
        )
        self._arm(REQUEST_TIMEOUT_S)  # the gateway may have to fetch a key first
        # Refused it ends at once, and otherwise it counts as a session.
        self._gateway.sockets.leave(self)
        self._gateway.entrance.upgrade(self.transport, request, self._leave)

    def _leave(self) -> None:
        self._gateway.wheel.cancel(self)
        self.connections.discard(self)
        self.parser = None  # type: ignore[assignment] # as uvicorn does: it refers to this object

    # --- the end ----------------------------------------------------------------------------------

    @property
    def _is_serving(self) -> bool:
        """Whether an answer is owed. Answers keep the order of their requests."""
        cycle: Exchange | None = self.cycle  # type: ignore[assignment]
        return cycle is not None and not cycle.response_complete

    def _hang_up(self, status: int, detail: str) -> None:
        """Refuse the request that arrives and everything after it, when its turn has come."""
        if self.transport.is_closing() or self._at_last is not None:
            return
        is_own = self._arriving and not self._in_head and self._is_serving
        if is_own and self.pipeline and self.pipeline[0][0] is self.cycle:
            self.pipeline.popleft()  # the app need not see it
        elif is_own:
            if self.cycle.response_started:
                self._close()
            else:
                self._say_last(status, detail)
            return
        if is_own or self._is_serving:
            self.pause_reading()
            self._at_last = partial(self._say_last, status, detail)
        else:
            self._say_last(status, detail)

    def _say_last(self, status: int, detail: str) -> None:
        self.transport.write(refusal_response(status, detail))
        self._close()

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
            self._watch_reader()

    # --- deadlines --------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Start the deadline of the connection's state, unless that of a slow reader runs."""
        is_read = not self.flow.write_paused
        if self._arriving:
            if is_read:
                self._arm(REQUEST_TIMEOUT_S)
        elif self._is_serving:  # the app limits the time to answer, and `wake` does nothing
            self._gateway.sockets.serve(self)
        else:
            if is_read:
                self._arm(KEEP_ALIVE_S)
            self._gateway.sockets.wait(self)

    def _watch_reader(self) -> None:
        """Start the deadline of a peer that has something to read."""
        self._unread = self.transport.get_write_buffer_size()
        self._arm(UNREAD_TIMEOUT_S)

    def _arm(self, span_s: float) -> None:
        self._gateway.wheel.schedule(self, self._gateway.now() + span_s)


def _address(transport: asyncio.Transport, name: str) -> tuple[str, int] | None:
    """The host and port of one end of ``transport``; ``None`` if it has none."""
    address = transport.get_extra_info(name)
    return (address[0], address[1]) if isinstance(address, tuple) else None


def _too_large() -> RefusedError:
    return RefusedError(
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        f"head and trailer of a request have at most {MAX_HEAD_BYTES} bytes",
    )
