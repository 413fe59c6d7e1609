"""The ASGI side of an HTTP connection: one request and its response.

uvicorn's own ``RequestResponseCycle`` costs more than our application. :class:`Exchange` takes its
place. It does the same for an application, so that any ASGI middleware may be around that, but

- it makes a future only if the application waits for something that is still on its way;
- it writes head and body together when the body has one piece, as all of ours have;
- it looks for line ends in the head as a whole, where uvicorn matches each name and value.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from pokebridge.asgi import IN_TIME, ASGIApp, Message, Scope
from pokebridge.border import note_unforeseen
from pokebridge.gateway.handshake import refusal_response

_ASGI = {"version": "3.0", "spec_version": "2.3"}
_EXTENSIONS: dict[str, dict[str, str]] = {IN_TIME: {}}
_NO_BODY = frozenset({204, 304})

_Headers = list[tuple[bytes, bytes]]


class Exchange:
    """One request, and the response of the application to it.

    - ``scope``: the ASGI scope
    - ``body``, ``more_body``: of the request what has arrived, and whether there is more to come
    - ``keep_alive``: whether the connection stays open
    - ``disconnected``: whether the client has gone away
    - ``response_started``, ``response_complete``: what the application has sent
    - ``on_response``: called when the response is complete
    - ``awaits_end``: whether the application waits for nothing more than that the client goes away
    - ``_transport``, ``_flow``: of the connection
    - ``_default_headers``: what the server adds to each response
    - ``_waits_for_100``: whether the client waits for a word before it sends the body
    - ``_is_read``: whether the application has received the whole body
    - ``_arrived``: resolved when something arrives; made when the application waits for that
    - ``_head``: the head of the response, until the first piece of the body is written with it
    - ``_left_bytes``: what the body must still have; ``None`` if it is sent in chunks
    """

    __slots__ = (
        *("_arrived", "_default_headers", "_flow", "_head", "_is_read", "_left_bytes"),
        *("_transport", "_waits_for_100", "awaits_end", "body", "disconnected", "keep_alive"),
        "more_body",
        *("on_response", "response_complete", "response_started", "scope"),
    )

    def __init__(
        self,
        scope: Scope,
        transport: asyncio.Transport,
        flow: FlowControl,
        default_headers: _Headers,
        on_response: Callable[[], None],
        *,
        keep_alive: bool,
        waits_for_100: bool,
    ) -> None:
        self.scope = scope
        self.body = bytearray()
        self.keep_alive = keep_alive
        self.more_body = True
        self.disconnected = self.response_started = self.response_complete = self._is_read = False
        self.on_response = on_response
        self.awaits_end = False
        self._transport = transport
        self._flow = flow
        self._default_headers = default_headers
        self._waits_for_100 = waits_for_100
        self._arrived: asyncio.Future[None] | None = None
        self._head = b""
        self._left_bytes: int | None = None

    async def run_asgi(self, app: ASGIApp) -> None:
        """Have ``app`` answer."""
        try:
            await app(self.scope, self.receive, self.send)
        except Exception as error:  # noqa: BLE001 - the guard of a request: the client must hear
            note_unforeseen("api", error)
        if self.response_complete or self.disconnected:
            return
        if self._head or not self.response_started:  # nothing is written yet
            self._transport.write(refusal_response(500, "a defect of the server: see its log"))
        self.response_complete = True
        self._transport.close()  # the client sees that a response that has begun is incomplete
        self._complete()

    @property
    def message_event(self) -> "Exchange":
        """What uvicorn's protocol sets when something arrives."""
        return self

    def set(self) -> None:
        """Something has arrived, or nothing will any more."""
        arrived, self._arrived = self._arrived, None
        if arrived is not None and not arrived.done():
            arrived.set_result(None)

    async def receive(self) -> Message:
        """ASGI's ``receive``."""
        if self._waits_for_100 and not self._transport.is_closing():
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._waits_for_100 = False
        while not (self.disconnected or self.response_complete):
            if self.body or not (self.more_body or self._is_read):
                body, self.body = bytes(self.body), bytearray()
                self._is_read = not self.more_body
                return {"type": "http.request", "body": body, "more_body": self.more_body}
            self._flow.resume_reading()
            self.awaits_end = self._is_read
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """ASGI's ``send``."""
        if self._flow.write_paused and not self.disconnected:
            await self._flow.drain()
        if self.disconnected:
            return
        if message["type"] == "http.response.start" and not self.response_started:
            self._head = self._encode_head(message["status"], message.get("headers", ()))
            self.response_started, self._waits_for_100 = True, False
        elif message["type"] == "http.response.body" and self.response_started:
            self._send_body(message.get("body", b""), is_last=not message.get("more_body", False))
        else:
            raise RuntimeError(f"{message['type']!r} is out of order")

    def _encode_head(self, status: int, headers: _Headers) -> bytes:
        if self._waits_for_100:  # what follows may be the body or another request
            self.keep_alive = False
        is_empty = status in _NO_BODY or self.scope["method"] == "HEAD"
        length: bytes | None = None
        lines = [STATUS_LINE[status]]
        for name, value in (*self._default_headers, *headers):
            if name == b"content-length":
                length = value
            elif name == b"connection" and b"close" in value.lower():
                self.keep_alive = False
                continue
            lines.append(b"%s: %s\r\n" % (name, value))
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        if is_empty:
            self._left_bytes = 0
        elif length is not None:
            self._left_bytes = int(length)
        else:
            lines.append(b"transfer-encoding: chunked\r\n")
        head = b"".join(lines)
        if not head.count(b"\n") == head.count(b"\r") == len(lines):
            raise RuntimeError("a header has a line end")
        return head + b"\r\n"

    def _send_body(self, body: bytes, *, is_last: bool) -> None:
        if self.response_complete:
            raise RuntimeError("the response is complete")
        if self._left_bytes is None:
            body = b"%x\r\n%s\r\n" % (len(body), body) if body else b""
            body += b"0\r\n\r\n" if is_last else b""
        elif self.scope["method"] == "HEAD":
            body = b""
        else:
            self._left_bytes -= len(body)
            if self._left_bytes < 0 or (is_last and self._left_bytes > 0):
                raise RuntimeError("the response's body has another length than its head says")
        head, self._head = self._head, b""
        if head or body:
            self._transport.write(head + body)
        if is_last:
            self.response_complete = True
            self.set()
            if not self.keep_alive:
                self._transport.close()
            self._complete()

    def _complete(self) -> None:
        on_response, self.on_response = self.on_response, _nothing  # refers to us in turn
        on_response()


def _nothing() -> None:
    pass


class Flow(FlowControl):
    """uvicorn's flow control, without an event for each connection: hardly any answer waits."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.read_paused = self.write_paused = False
        self._drained: asyncio.Future[None] | None = None

    def resume_reading(self) -> None:
        """Read on, unless the connection is closing: uvloop would raise."""
        if not self._transport.is_closing():
            super().resume_reading()

    async def drain(self) -> None:
        """Wait until the peer has read. One answer at a time does."""
        while self.write_paused:
            self._drained = asyncio.get_running_loop().create_future()
            await self._drained

    def pause_writing(self) -> None:
        """The peer does not read."""
        self.write_paused = True

    def resume_writing(self) -> None:
        """The peer has read, or is gone."""
        self.write_paused = False
        drained, self._drained = self._drained, None
        if drained is not None and not drained.done():
            drained.set_result(None)


class ExchangeProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, with an :class:`Exchange` for each request."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A deque takes 0.6 KB, and hardly any client sends a request before the last is answered.
        self.pipeline: Any = ()
        # The exchange that the application works on. ``cycle`` is the newest one.
        self.running: Exchange | None = None

    def on_headers_complete(self) -> None:
        """Serve the request."""
        self.scope = self.create_scope(self.parser.get_http_version())
        self.serve(self.scope, waits_for_100=self.expect_100_continue)

    def create_scope(self, version: str) -> Any:
        """The ASGI scope of the request whose head is complete. Its target is in origin-form."""
        raw_path, _, query = self.url.partition(b"?")
        path = raw_path.decode("ascii")
        return {
            "type": "http",
            "asgi": _ASGI,
            "http_version": version,
            "method": self.parser.get_method().decode("ascii"),
            "scheme": self.scheme,
            "path": unquote(path) if "%" in path else path,
            "raw_path": raw_path,
            "query_string": query,
            "root_path": "",
            "headers": self.headers,
            "server": self.server,
            "client": self.client,
            "extensions": _EXTENSIONS,
        }

    def serve(self, scope: Any, *, waits_for_100: bool) -> None:
        """Let the application answer, at once or after the requests ahead."""
        before: Any = self.cycle
        exchange: Any = Exchange(
            scope,
            self.transport,
            self.flow,
            self.server_state.default_headers,
            self.on_response_complete,
            keep_alive=scope["http_version"] != "1.0" and self.parser.should_keep_alive(),
            waits_for_100=waits_for_100,
        )
        self.cycle = exchange
        if before is None or before.response_complete:
            self._start_asgi_task(exchange, self.app)
        else:
            self.pause_reading()
            self.pipeline = self.pipeline or deque()
            self.pipeline.appendleft((exchange, self.app))

    def pause_reading(self) -> None:
        """Stop reading until more is needed, unless reading is how a client's end is noticed."""
        if self.running is None or not self.running.awaits_end:
            self.flow.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the application too, which may work on an earlier request than the last."""
        if self.running is not None and not self.running.response_complete:
            self.running.disconnected = True
            self.running.set()
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self.running = cycle
        task = self.loop.create_task(cycle.run_asgi(app))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
