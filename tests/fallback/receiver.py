"""A webhook's receiver of a test's own, on a real socket; it can be down, slow or refuse."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.support import free_port
from tests.support.stream_server import stream_server


@dataclass(frozen=True)
class Request:
    """What came in."""

    headers: Mapping[str, str]
    body: bytes

    @property
    def id(self) -> str:
        """The notification's."""
        return self.headers["webhook-id"]

    @property
    def json(self) -> Any:
        """The body's value."""
        return json.loads(self.body)


@dataclass
class Receiver:
    """Answers every request with ``status``, after ``gate`` is open."""

    port: int = field(default_factory=free_port)
    status: str = "204 No Content"
    extra: bytes = b""
    requests: list[Request] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    _server: AsyncExitStack = field(default_factory=AsyncExitStack)

    @property
    def url(self) -> str:
        """Where it listens when it is up."""
        return f"http://127.0.0.1:{self.port}/hook"

    @property
    def arrived(self) -> Counter[str]:
        """How often each recipient was notified."""
        return Counter(request.json["recipient"] for request in self.requests)

    async def start(self) -> None:
        """Be there."""
        await self._server.enter_async_context(stream_server(self._serve, port=self.port))

    async def stop(self) -> None:
        """Be gone."""
        await self._server.aclose()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[1:-2]
        headers = {name.lower(): value for name, _, value in (h.partition(": ") for h in head)}
        body = await reader.readexactly(int(headers["content-length"]))
        self.requests.append(Request(headers, body))
        await self.gate.wait()
        writer.write(
            f"HTTP/1.1 {self.status}\r\nconnection: close\r\n".encode() + self.extra + b"\r\n"
        )


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    """A receiver that is up."""
    receiver = Receiver()
    receiver.gate.set()
    await receiver.start()
    yield receiver
    receiver.gate.set()
    await receiver.stop()
