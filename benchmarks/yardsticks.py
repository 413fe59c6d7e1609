"""Servers that answer every request alike: ``python -m benchmarks.yardsticks asgi|httptools``.

They print their port. Each looks at the Authorization header and answers what a pull without news
answers. ``asgi`` is an application on uvicorn with httptools and uvloop, ``httptools`` the parser
in an asyncio protocol on uvloop. Node's HTTP server is in ``yardstick.cjs``.
"""

import asyncio
import socket
import sys
from typing import Any, cast

import httptools
import msgspec
import uvicorn
import uvloop

NOTHING: dict[str, object] = {"messages": [], "version": 0, "more": False}


async def application(scope: Any, receive: Any, send: Any) -> None:
    """The smallest ASGI application that looks at a header."""
    status = 401
    for name, value in scope["headers"]:
        if name == b"authorization" and value.startswith(b"Bearer "):
            status = 200
    if scope["method"] == "POST":
        await receive()
    body = msgspec.json.encode(NOTHING)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Protocol(asyncio.Protocol):
    """The parser, and nothing else."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)
        self._parser = httptools.HttpRequestParser(self)
        self._status = b"401 Unauthorized"

    def data_received(self, data: bytes) -> None:
        """Parse it."""
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Look for the one header."""
        if name.lower() == b"authorization" and value.startswith(b"Bearer "):
            self._status = b"200 OK"

    def on_message_complete(self) -> None:
        """Answer."""
        body = msgspec.json.encode(NOTHING)
        self._transport.write(
            b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            % (self._status, len(body), body)
        )


def _listening() -> socket.socket:
    it = socket.create_server(("127.0.0.1", 0), backlog=4096)
    print(it.getsockname()[1], flush=True)
    return it


async def _serve_protocol() -> None:
    server = await asyncio.get_running_loop().create_server(Protocol, sock=_listening())
    await server.serve_forever()


def main(kind: str) -> None:
    """Serve until killed."""
    if kind == "httptools":
        uvloop.run(_serve_protocol())
    else:
        config = uvicorn.Config(
            application,
            http="httptools",
            loop="uvloop",
            ws="none",
            lifespan="off",
            access_log=False,
            log_level="warning",
        )
        uvicorn.Server(config).run(sockets=[_listening()])


if __name__ == "__main__":
    main(sys.argv[1])
