"""Serve an instance on one port with uvicorn: the HTTP API, and the WebSockets beside it."""

import asyncio
import contextlib
import functools
import gc
import signal
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

import structlog
import uvicorn

from pokebridge.coordination.base import Coordination
from pokebridge.errors import ConfigError
from pokebridge.ingress.base import Source
from pokebridge.mailbox.base import Mailbox
from pokebridge.server.http import HttpProtocol
from pokebridge.server.instance import Instance
from pokebridge.settings import Settings
from pokebridge.transport.base import Transport

if TYPE_CHECKING:  # its libraries are an extra
    from pokebridge.tracing import Tracing

log = structlog.get_logger(__name__)

_KEEP_ALIVE_S = 75  # longer than load balancers keep theirs, so that they close first
_BACKLOG = 4096


async def serve(
    settings: Settings,
    *,
    transport: Transport,
    mailbox: Mailbox | None,
    coordination: Coordination,
    ingress: Source | None = None,
    tracing: "Tracing | None" = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain, finish what is under way and return.

    The parts are closed at the end. ``mailbox`` is ``None`` for an instance that keeps no messages.
    ``ingress`` is where messages come from besides HTTP. ``tracing`` has been put over the
    transport already.

    Raises:
        ConfigError: the address can't be listened on.
        TransportError: the transport can't be had.
        CoordinationError: the coordination store can't be had.
    """
    listener = _listen(settings.host, settings.port)
    instance = Instance(
        settings,
        transport,
        mailbox,
        coordination,
        ingress=ingress,
        url=_reached_at(settings, listener),
        tracing=tracing,
    )
    try:
        await instance.start()
        config = uvicorn.Config(
            instance.app,
            http=functools.partial(HttpProtocol, gateway=instance.gateway),  # type: ignore[arg-type] # called, never subclassed
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(settings.grace_s),
            backlog=_BACKLOG,
        )
        await _Server(config, instance).serve(sockets=[listener])
    finally:
        listener.close()
        await instance.close()


class _Server(uvicorn.Server):
    """uvicorn, stopped our way: sessions are drained first, and the exit status is 0."""

    def __init__(self, config: uvicorn.Config, instance: Instance) -> None:
        super().__init__(config)
        self._instance = instance

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on SIGTERM and SIGINT, and do not raise them again afterwards."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell where we listen, once we do."""
        await super().startup(sockets)
        # What is there now stays. A full collection, of which there is one whenever sessions have
        # grown by a quarter, would look through all of it, and hold up pokes for 0.1 s.
        gc.collect()
        gc.freeze()
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            log.info("listening", url=f"http://{_url_host(host)}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain while pulls are still answered, then stop listening and finish requests."""
        if not self.force_exit:
            await self._instance.drain()
        await super().shutdown(sockets)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"host, port: can't listen on {_url_host(host)}:{port} ({error.strerror})"
        ) from None


def _reached_at(settings: Settings, listener: socket.socket) -> str:
    """Where clients reach this instance and no other; empty when that is not known.

    With ``--dev`` it is the address itself. Elsewhere that may be one behind a proxy, which no
    client can reach.
    """
    host, port = listener.getsockname()[:2]
    if settings.advertise_url is None and settings.dev and host not in {"0.0.0.0", "::"}:  # noqa: S104 - no bind
        return f"ws://{_url_host(host)}:{port}"
    return settings.advertise_url or ""


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
