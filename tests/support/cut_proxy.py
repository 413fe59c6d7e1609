"""A TCP proxy whose connections a test can cut and heal."""

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import Self

CHUNK_BYTES = 64 * 1024
DELAYED_CHUNKS = 64

_Queue = asyncio.Queue[tuple[float, bytes | None]]


class CutProxy:
    """Forwards a loopback port to ``host:port`` until it is cut.

    A cut holds everything back, closes included, as a network does that drops packets: both sides
    stay connected and hear nothing, and new connections are accepted and stay silent. ``heal``
    delivers what was held. ``reset`` is the other way to lose a connection, and the loud one.
    ``delay_s`` is how long whatever it reads is on its way; ``lag`` changes that.
    The test's event loop drives it, so it forwards only while that loop runs.
    """

    def __init__(self, host: str, port: int, delay_s: float = 0.0) -> None:
        self._target = (host, port)
        self._delay_s = delay_s
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._connections: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        """Start to listen."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop, and drop what is connected."""
        assert self._server is not None
        self._server.close()
        self.reset()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def port(self) -> int:
        """The loopback port to connect to."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def address(self) -> str:
        """``HOST:PORT`` to connect to."""
        return f"127.0.0.1:{self.port}"

    @property
    def connection_count(self) -> int:
        """How many connections are open now."""
        return len(self._connections)

    def lead_to(self, port: int) -> None:
        """Forward new connections to another loopback port. Those that are open stay."""
        self._target = ("127.0.0.1", port)

    def cut(self) -> None:
        """Let nothing through any more."""
        self._flowing.clear()

    def heal(self) -> None:
        """Let everything through again, what was held first."""
        self._flowing.set()

    def lag(self, delay_s: float) -> None:
        """Let whatever is read from now on be on its way for so long."""
        self._delay_s = delay_s

    def reset(self) -> None:
        """Break every connection at once; new ones are served unless the proxy is cut as well."""
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        self._connections.add(connection)
        self._writers.add(writer)
        try:
            await self._flowing.wait()
            with suppress(OSError):
                await self._forward(reader, writer)
        except asyncio.CancelledError:
            pass  # by __aexit__; Python 3.11 would report it as an error of the server's callback
        finally:
            self._drop(writer)
            self._connections.discard(connection)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(*self._target)
        self._writers.add(upstream_writer)
        try:
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(reader, upstream_writer))
                pumps.create_task(self._pump(upstream_reader, writer))
        finally:
            self._drop(upstream_writer)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        """Carry one direction to its end, and pass the end on."""
        loop = asyncio.get_running_loop()
        under_way: _Queue = asyncio.Queue(DELAYED_CHUNKS if self._delay_s else 1)
        reading = asyncio.create_task(self._read(source, under_way))
        try:
            while True:
                arrives_at, data = await under_way.get()
                await asyncio.sleep(arrives_at - loop.time())
                await self._flowing.wait()
                if not data:
                    break
                sink.write(data)
                await sink.drain()
            if data is not None:
                sink.write_eof()
                return
        except (OSError, RuntimeError):  # uvloop's, where the transport is closed already
            pass
        finally:
            reading.cancel()
        sink.transport.abort()

    async def _read(self, source: asyncio.StreamReader, under_way: _Queue) -> None:
        """Put what ``source`` sends on its way: ``b""`` for its end, ``None`` when it breaks."""
        data: bytes | None = b"the first"
        while data:
            try:
                data = await source.read(CHUNK_BYTES)
            except OSError:
                data = None
            await under_way.put((asyncio.get_running_loop().time() + self._delay_s, data))

    def _drop(self, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()
        self._writers.discard(writer)
