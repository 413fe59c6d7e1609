"""uvicorn's HTTP protocol with the limits that a server on the open internet needs.

- A request must arrive within a deadline, and everything in it but its body has a largest size.
  uvicorn's httptools protocol has neither limit, so a client could occupy a socket or memory for
  ever.
- Trailer fields are dropped. uvicorn adds them to the head, where they could authenticate a caller.
- An upgrade to anything but WebSocket is ignored. httptools would drop the body of such a request.
- WebSocket upgrades go to the gateway, which answers them itself.
"""

import asyncio
from typing import Any
from urllib.parse import urlsplit

import httptools
from uvicorn.protocols.http.flow_control import FlowControl

from pokebridge.gateway.gateway import Gateway
from pokebridge.gateway.handshake import UpgradeRequest, refusal_response
from pokebridge.server.exchange import ExchangeProtocol

MAX_HEAD_BYTES = 16 * 1024
"""The most bytes of the target, the header fields and the trailer fields of a request together."""
_CHUNK_BYTES = 16
"""What the framing of a chunk may take: its size in hexadecimal and two line ends."""
REQUEST_TIMEOUT_S = 10.0


class HttpProtocol(ExchangeProtocol):
    """One HTTP connection, until it closes or becomes a WebSocket."""

    def __init__(self, *args: Any, gateway: Gateway, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gateway = gateway
        # Of the request that arrives: the bytes received that are neither body nor the framing of
        # chunks ...
        self._bytes = 0
        # ... and those of its target and fields so far, which are exact in a pipeline too.
        self._field_bytes = 0
        self._in_head = True
        self.wheel_slot = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline of the first request."""
        self.connections.add(self)
        self.transport = transport
        self.flow = FlowControl(transport)
        # uvicorn asks the transport's socket object, which keeps the answers, 360 bytes, for as
        # long as a WebSocket lives. The transport does not.
        self.server, self.client = _address(transport, "sockname"), _address(transport, "peername")
        self.scheme = "http"
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the deadline."""
        self._gateway.wheel.cancel(self)
        super().connection_lost(exc)

    def wake(self, now: float) -> None:  # noqa: ARG002 - the wheel's signature
        """Close the connection: the request did not arrive in time."""
        self._hang_up(408, "the request took too long to arrive")

    def data_received(self, data: bytes) -> None:
        """Feed the parser, within the limits."""
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self._feed(data)

    def _feed(self, data: bytes) -> None:
        self._bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            if self._field_bytes <= MAX_HEAD_BYTES:
                self._hang_up(400, "not a valid HTTP request")
        self._bytes = max(self._bytes, 0)  # nothing is saved up for later
        if max(self._bytes, self._field_bytes) > MAX_HEAD_BYTES:
            self._hang_up(431, f"head and trailer of a request have at most {MAX_HEAD_BYTES} bytes")

    # --- the parser's calls -----------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Start the deadline of a request that begins."""
        super().on_message_begin()
        self._field_bytes = 0
        if not self.wheel_slot:
            self._arm()

    def on_url(self, url: bytes) -> None:
        """Count a piece of the target."""
        self._count_field(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a field, and drop it if it belongs to the trailer."""
        self._count_field(len(name) + len(value) + 4)  # with ": " and the line's end
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Stop counting the bytes of the head."""
        self._in_head = False
        urlsplit(self.url.decode("latin-1"))  # raises what would be raised deep in the application
        if not self._ignores_upgrade():
            super().on_headers_complete()

    def on_chunk_header(self) -> None:
        """Do not count the usual framing of a chunk. Extensions are counted."""
        self._bytes -= _CHUNK_BYTES

    def on_body(self, body: bytes) -> None:
        """Do not count the body: the app limits its size."""
        self._bytes -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Cancel the deadline: the request has arrived, and the app limits the time to answer."""
        self._in_head, self._bytes = True, 0
        if self._ignores_upgrade():
            return
        self._gateway.wheel.cancel(self)
        super().on_message_complete()

    def _count_field(self, size: int) -> None:
        self._field_bytes += size
        if self._field_bytes > MAX_HEAD_BYTES:
            raise ValueError("too large")  # stops the parser

    def _get_upgrade(self) -> bytes | None:
        values = {b"connection": b"", b"upgrade": b""}
        for name, value in self.headers:
            if name in values:
                values[name] += b"," + value.lower()
        if b"upgrade" not in _tokens(values[b"connection"]):
            return None
        return b",".join(_tokens(values[b"upgrade"]))

    def _should_upgrade_to_ws(self) -> bool:
        return True

    def _ignores_upgrade(self) -> bool:
        """Whether the request asks for an upgrade to ignore (RFC 9110, section 7.8)."""
        upgrade = self._get_upgrade() if self.parser.should_upgrade() else None
        return upgrade not in {None, b"websocket"}

    # --- upgrades and errors ----------------------------------------------------------------------

    def _upgrade(self, rest: bytes) -> None:
        """Hand a WebSocket upgrade to the gateway. Ignore that a request asks for another."""
        if self._ignores_upgrade():
            head = self._head_without_upgrade()
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
            self._feed(head + rest)
            return
        if rest:
            # RFC 6455, section 4.1: a client sends nothing before the answer to its handshake.
            self._hang_up(400, "bytes before the handshake was answered")
            return
        request = UpgradeRequest(
            method=self.scope["method"],
            target=self.url.decode("latin-1"),
            headers=self.headers,
            peer=self.client[0] if self.client else "",
        )
        self._arm()  # the gateway may have to fetch a key first
        self._gateway.entrance.upgrade(self.transport, request, self._leave)

    def _head_without_upgrade(self) -> bytes:
        """Return the head of the request without its upgrade."""
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        for name, value in self.headers:
            if name == b"connection":
                kept = b", ".join(each for each in _tokens(value) if each.lower() != b"upgrade")
                lines.append(b"connection: " + kept)
            elif name != b"upgrade":
                lines.append(b"%s: %s" % (name, value))
        return b"\r\n".join([*lines, b"", b""])

    def _leave(self) -> None:
        self._gateway.wheel.cancel(self)
        self.connections.discard(self)
        self.parser = None  # type: ignore[assignment] # as uvicorn does: it refers to this object

    def _hang_up(self, status: int, detail: str) -> None:
        if not self.transport.is_closing():
            self.transport.write(refusal_response(status, detail))
            self.transport.close()

    def _arm(self) -> None:
        self._gateway.wheel.schedule(self, self._gateway.now() + REQUEST_TIMEOUT_S)


def _address(transport: asyncio.Transport, name: str) -> tuple[str, int] | None:
    """The host and port of one end of ``transport``; ``None`` if it has none."""
    address = transport.get_extra_info(name)
    return (address[0], address[1]) if isinstance(address, tuple) else None


def _tokens(value: bytes) -> list[bytes]:
    """Return the members of a field that is a list (RFC 9110, section 5.6.1)."""
    return [token.strip() for token in value.split(b",") if token.strip()]
