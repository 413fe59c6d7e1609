"""What stands between a client and its bridge, and answers in the bridge's place."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Self

from tests.support.stream_server import relay, stream_server

HTML = "<html><h1>Please sign in</h1></html>"
LOGIN = "Location: http://login.invalid/?next=here"


def answer(
    status: int, *fields: str, body: str = HTML, media_type: str = "text/html"
) -> list[bytes]:
    """An answer in one piece."""
    # 520 is a status that only one vendor's proxies use.
    phrase = HTTPStatus(status).phrase if status != 520 else "Web Server Returned an Unknown Error"
    length = len(body.encode())
    own = [f"Content-Type: {media_type}", f"Content-Length: {length}", "Connection: close"]
    head = [f"HTTP/1.1 {status} {phrase}", *own, *fields]
    return ["\r\n".join([*head, "", body]).encode()]


def problem(
    status: int, *fields: str, said: int | None = None, media_type: str = "application/problem+json"
) -> list[bytes]:
    """A refusal as the bridge writes it; ``said`` is the status in its body."""
    body = {"type": "about:blank", "title": "No", "status": said or status, "detail": "as asked"}
    return answer(status, *fields, body=json.dumps(body), media_type=media_type)


UPGRADE = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"

STRANGERS: Mapping[str, Sequence[bytes]] = {
    **{
        f"{status} page": answer(status)
        for status in (400, 401, 402, 403, 404, 407, 410, 418, 451, 500, 502, 503, 504, 511, 520)
    },
    "login page": answer(200),
    "redirect to a login page": answer(302, LOGIN),
    "lasting redirect": answer(301, LOGIN),
    "redirect to what is no URL": answer(302, "Location: portal:login"),
    "redirect that keeps the method": answer(307, LOGIN),
    "an API gateway's 401": answer(
        401,
        'WWW-Authenticate: Basic realm="proxy"',
        body='{"message":"Unauthorized"}',
        media_type="application/json",
    ),
    "an API gateway's 403": answer(
        403, body='{"detail":"Forbidden","status":403}', media_type="application/json"
    ),
    "a problem of another kind": answer(403, body="{}", media_type="application/problem+json"),
    "a problem about another answer": problem(403, said=500),
    "a problem that is called text": problem(401, media_type="text/plain"),
    "a problem that is no JSON": answer(401, media_type="application/problem+json"),
    "JSON that is no page": answer(200, body='{"ok":true}', media_type="application/json"),
    "an empty 204": [b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"],
    "a 304 that nobody asked for": [b"HTTP/1.1 304 Not Modified\r\nConnection: close\r\n\r\n"],
    "101 with a wrong accept": [f"{UPGRADE}Sec-WebSocket-Accept: d3Jvbmc=\r\n\r\n".encode()],
    "101 without an accept": [f"{UPGRADE}\r\n".encode()],
    "no HTTP": [b"220 mail.example ESMTP\r\n"],
    "nothing": [b""],
}
"""Answers of what is not the bridge, in pieces."""

_CHUNKED = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
)
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"

DRIPS: Mapping[str, Sequence[bytes]] = {
    "status line": [b"H", b"T"],
    "header fields": [b"HTTP/1.1 200 OK\r\nX-", *[b"x"] * 1000],
    "interim answers": [b"HTTP/1.1 102 Processing\r\n\r\n"] * 1000,
    "body": [_HEAD + b"Content-Length: 10000\r\n\r\n", *[b" "] * 1000],
    "body without end": [_HEAD + b"\r\n", *[b" "] * 1000],
    "chunk sizes": [_CHUNKED, *[b"0"] * 1000],
    "chunks": [_CHUNKED, *[b"1\r\n \r\n"] * 1000],
    "trailer fields": [_CHUNKED + b"0\r\nX-", *[b"x"] * 1000],
}
"""Answers that come a piece at a time, and never end."""


class Between:
    """Forwards to the bridge at ``port``, but answers by itself what ``answers`` has for a path.

    The pieces of an answer come ``pause_s`` apart. ``asked`` has the paths it has answered, and
    ``handshakes`` counts those whose sub-protocols it has changed.
    """

    def __init__(self, port: int) -> None:
        self.url = ""
        self.answers: dict[str, list[Sequence[bytes]]] = {}
        self.asked: list[str] = []
        self.handshakes = 0
        self.pause_s = 0.05
        self._port = port

    @asynccontextmanager
    async def run(self) -> AsyncIterator[Self]:
        """Serve on a free port."""
        async with stream_server(self._answer) as port:
            self.url = f"http://127.0.0.1:{port}"
            yield self

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.split(b" ")[1].decode().partition("?")[0]
        if self.answers.get(path):
            self.asked.append(path)
            for piece in self.answers[path].pop(0):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(self.pause_s)
            writer.write_eof()
            await reader.read()
            return
        # One request for each connection, so that every request is seen.
        if b"upgrade: websocket" not in head.lower():
            head = head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
        await self._forward(head, reader, writer)

    async def _forward(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await relay(reader, writer, self._port, first=head)


class FirstProtocolOnly(Between):
    """A proxy that keeps only the first ``kept`` of the sub-protocols that a client offers."""

    def __init__(self, port: int, *, kept: int = 1) -> None:
        super().__init__(port)
        self._kept = kept

    async def _forward(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        lines = []
        for line in head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"sec-websocket-protocol":
                self.handshakes += 1
                line = name + b":" + b",".join(value.split(b",")[: self._kept])  # noqa: PLW2901
                if not self._kept:
                    continue
            lines.append(line)
        await super()._forward(b"\r\n".join(lines), reader, writer)
