"""A small bridge that speaks protocol.md and misbehaves where a test wants it to."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from ssl import SSLContext
from typing import Any, NamedTuple

from aiohttp import WSCloseCode, WSMsgType, web

STOPPING = WSCloseCode.GOING_AWAY
DRIP_S = 0.02
CHUNK_BYTES = 16_384


class Bad(NamedTuple):
    """An answer in place of the right one."""

    status: int
    headers: Mapping[str, str] = {}
    body: bytes = b""

    def as_response(self) -> web.Response:
        """The same for aiohttp."""
        return web.Response(status=self.status, headers=self.headers, body=self.body)


def problem(status: int, detail: str = "as asked") -> Bad:
    """A refusal as the bridge writes it (RFC 9457)."""
    body = {"type": "about:blank", "title": "No", "status": status, "detail": detail}
    headers = {"Content-Type": "application/problem+json"}
    return Bad(status, headers, json.dumps(body).encode())


class FaultyBridge:
    """One recipient's mailbox and sockets.

    What it got is kept; what it is to do wrong is taken from lists, the first entry first.
    """

    def __init__(self) -> None:
        self.url = ""
        self.messages: list[dict[str, Any]] = []
        self.head = 0
        self.page_size = 50
        self.ready: dict[str, Any] = {"type": "ready", "session": "s", "instance": "i"}
        # Faults to come.
        self.refusals: list[Bad] = []
        self.bad_pulls: list[Bad] = []
        self.bad_acks: list[Bad] = []
        self.silent = False
        # Pages whose head comes, and then: "silence", "drip" (a byte now and then), or "cut".
        self.stalls: list[str] = []
        self.bytes_per_s: float | None = None
        # What has come.
        self.connects: list[dict[str, str]] = []
        self.pulls: list[dict[str, str]] = []
        self.acks: list[int] = []
        self.socket_acks: list[int] = []
        self.heard: list[dict[str, Any]] = []
        self.closes: list[int | None] = []
        self.sockets: list[web.WebSocketResponse] = []
        self.requests: list[web.Request] = []

    def commit(self, *bodies: Any) -> int:
        """Put messages into the mailbox, without a poke."""
        for body in bodies:
            self.head += 1
            self.messages.append(
                {
                    "id": f"id-{self.head}",
                    "version": self.head,
                    "sender": "urn:user:eve",
                    "body": body,
                    "sent_at": "2026-11-24T05:30:00.123Z",
                }
            )
        return self.head

    async def say(self, **frame: Any) -> None:
        """Send a message to the newest socket."""
        await self.sockets[-1].send_json(frame)

    async def close(self, code: int, reason: str = "") -> None:
        """Close the newest socket in good order."""
        await self.sockets[-1].close(code=code, message=reason.encode())

    def cut(self) -> None:
        """Break the newest socket's connection."""
        transport = self.requests[-1].transport
        assert transport is not None
        transport.abort()

    @asynccontextmanager
    async def run(self, tls: SSLContext | None = None) -> AsyncIterator["FaultyBridge"]:
        """Serve on a free port."""
        app = web.Application()
        app.router.add_get("/v1/connect", self._connect)
        app.router.add_get("/v1/messages", self._pull)
        app.router.add_post("/v1/messages/ack", self._ack)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            for socket in self.sockets:
                if not socket.closed:
                    await socket.close(code=STOPPING)
            await runner.cleanup()

    async def _connect(self, request: web.Request) -> web.StreamResponse:
        self.connects.append({"token": _token(request), **request.query})
        if self.silent:
            await asyncio.Event().wait()
        if self.refusals:
            return self.refusals.pop(0).as_response()
        socket = web.WebSocketResponse(protocols=["pokebridge.v1"], timeout=0.1)
        await socket.prepare(request)
        self.sockets.append(socket)
        self.requests.append(request)
        await socket.send_json(self.ready)
        async for message in socket:
            assert message.type is WSMsgType.TEXT
            await self._hear(socket, message.json())
        self.closes.append(socket.close_code)
        return socket

    async def _hear(self, socket: web.WebSocketResponse, frame: dict[str, Any]) -> None:
        self.heard.append(frame)
        if frame["type"] == "ping" and not self.silent:
            await socket.send_json({"type": "pong"})
        if frame["type"] == "ack":
            self.socket_acks.append(frame["version"])
        if frame["type"] == "auth":
            await socket.send_json({"type": "auth", "expires_in": 900})

    async def _pull(self, request: web.Request) -> web.StreamResponse:
        asked_etag = request.headers.get("If-None-Match", "")
        self.pulls.append({"token": _token(request), "etag": asked_etag, **request.query})
        if self.bad_pulls:
            return self.bad_pulls.pop(0).as_response()
        etag = f'"{self.head}"'
        if asked_etag == etag:
            return web.Response(status=304, headers={"ETag": etag})
        after, limit = int(request.query["after"]), int(request.query["limit"])
        newer = [message for message in self.messages if message["version"] > after]
        page = newer[: min(limit, self.page_size)]
        version = page[-1]["version"] if page else self.head
        more = len(page) < len(newer)
        body = {"messages": page, "version": version, "more": more}
        if self.stalls:
            return await self._stall(request, self.stalls.pop(0))
        if self.bytes_per_s:
            return await self._trickle(request, json.dumps(body).encode(), self.bytes_per_s)
        return web.json_response(body, headers={"ETag": etag})

    async def _stall(self, request: web.Request, kind: str) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        transport = request.transport
        assert transport is not None
        with suppress(ConnectionError):
            await response.write(b"{")
            while kind == "drip":
                await response.write(b" ")
                await asyncio.sleep(DRIP_S)
        if kind == "silence":
            await asyncio.Event().wait()
        transport.abort()
        return response

    async def _trickle(
        self, request: web.Request, body: bytes, bytes_per_s: float
    ) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for start in range(0, len(body), CHUNK_BYTES):
            await response.write(body[start : start + CHUNK_BYTES])
            await asyncio.sleep(CHUNK_BYTES / bytes_per_s)
        return response

    async def _ack(self, request: web.Request) -> web.Response:
        if self.bad_acks:
            return self.bad_acks.pop(0).as_response()
        self.acks.append((await request.json())["version"])
        return web.Response(status=204)


def _token(request: web.Request) -> str:
    return request.headers.get("Authorization", "").removeprefix("Bearer ")
