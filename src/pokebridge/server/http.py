"""uvicorn's HTTP protocol with the limits that a server on the open internet needs.

- A request must arrive within a deadline, and its head has a largest size. uvicorn's httptools
  protocol has neither limit, so a client could occupy a socket or memory for ever.
- WebSocket upgrades go to the gateway, which answers them itself.
"""

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pokebridge.gateway.gateway import Gateway
from pokebridge.gateway.handshake import UpgradeRequest, refusal_response

MAX_HEAD_BYTES = 16 * 1024
REQUEST_TIMEOUT_S = 10.0


class HttpProtocol(HttpToolsProtocol):
    """One HTTP connection, until it closes or becomes a WebSocket."""

    def __init__(self, *args: Any, gateway: Gateway, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gateway = gateway
        self._head_bytes = 0
        self._in_head = True
        self.wheel_slot = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline of the first request."""
        super().connection_made(transport)
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
        if self._in_head:
            self._head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._hang_up(400, "not a valid HTTP request")
        else:
            if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
                self._hang_up(431, f"a request head is at most {MAX_HEAD_BYTES} bytes")

    # --- the parser's calls -----------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Start the deadline of a request that begins."""
        super().on_message_begin()
        if not self.wheel_slot:
            self._arm()

    def on_headers_complete(self) -> None:
        """Stop counting the bytes of the head."""
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Cancel the deadline: the request has arrived, and the app limits the time to answer."""
        self._in_head, self._head_bytes = True, 0
        self._gateway.wheel.cancel(self)
        super().on_message_complete()

    def _should_upgrade_to_ws(self) -> bool:
        return True

    # --- upgrades and errors ----------------------------------------------------------------------

    def _upgrade(self, rest: bytes) -> None:
        """Hand a WebSocket upgrade to the gateway. Ignore the request for any other upgrade."""
        if self._get_upgrade() != b"websocket":
            self.cycle.keep_alive = False  # RFC 9110, section 7.8: an upgrade may be ignored
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

    def _leave(self) -> None:
        self._gateway.wheel.cancel(self)
        self.connections.discard(self)

    def _hang_up(self, status: int, detail: str) -> None:
        if not self.transport.is_closing():
            self.transport.write(refusal_response(status, detail))
            self.transport.close()

    def _arm(self) -> None:
        self._gateway.wheel.schedule(self, self._gateway.now() + REQUEST_TIMEOUT_S)
