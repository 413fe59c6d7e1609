"""A server on asyncio's streams that leaves no connection behind."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from ssl import SSLContext

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def stream_server(
    serve: Serve, *, host: str = "127.0.0.1", port: int = 0, tls: SSLContext | None = None
) -> AsyncIterator[int]:
    """Serve each connection with ``serve`` until the block ends. Yields the port.

    When ``serve`` returns, its connection is closed once all is sent that it has written. When its
    client goes away, or the block ends, the connection is dropped.

    Raises:
        BaseExceptionGroup: when the block ends, what else ``serve`` has raised.
    """
    connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
    errors: list[BaseException] = []

    async def attend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, EOFError):
            await serve(reader, writer)
            writer.close()
            await writer.wait_closed()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(attend(reader, writer))
        connections[task] = writer
        task.add_done_callback(drop)

    def drop(task: asyncio.Task[None]) -> None:
        connections.pop(task).transport.abort()
        if not task.cancelled() and (error := task.exception()) is not None:
            errors.append(error)

    server = await asyncio.start_server(accept, host, port, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
    if errors:
        raise BaseExceptionGroup("errors of a stream server", errors)


async def relay(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    port: int,
    *,
    host: str = "127.0.0.1",
    first: bytes = b"",
) -> None:
    """Carry what comes to ``host:port`` and back until both sides have ended.

    ``first`` goes before what comes.
    """
    from_target, to_target = await asyncio.open_connection(host, port)
    to_target.write(first)
    try:
        await asyncio.gather(_pump(reader, to_target), _pump(from_target, writer))
    finally:
        to_target.transport.abort()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(65536):
        sink.write(data)
        await sink.drain()
    if sink.can_write_eof():
        sink.write_eof()
    else:  # TLS has no half-closed connections
        sink.close()
