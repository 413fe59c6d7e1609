"""Serve an instance on one port with uvicorn: the HTTP API, and the WebSockets beside it."""

import asyncio
import errno
import functools
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import structlog
import uvicorn

from pokebridge.asgi import ASGIApp
from pokebridge.errors import ConfigError
from pokebridge.server.garbage import keep_what_exists
from pokebridge.server.http import HttpHost, HttpProtocol
from pokebridge.server.instance import Instance

log = structlog.get_logger(__name__)

_BACKLOG = 4096


async def run(
    instance: Instance,
    listener: socket.socket,
    *,
    grace_s: float,
    on_listening: Callable[[str], None],
) -> None:
    """Serve ``instance`` on ``listener`` until SIGTERM or SIGINT, then drain it and close both.

    Requests that are under way then have ``grace_s`` seconds to finish. ``on_listening`` is called
    with the address, once the server listens.
    """
    try:
        await instance.start()
        config = http_config(instance.create_app(), instance.gateway, grace_s=grace_s)
        await _Server(config, instance, on_listening).serve(sockets=[listener])
    finally:
        listener.close()
        await instance.close()


def http_config(app: ASGIApp, gateway: HttpHost, *, grace_s: float) -> uvicorn.Config:
    """How uvicorn serves ``app``, and the WebSockets of ``gateway`` beside it."""
    return uvicorn.Config(
        app,
        http=functools.partial(HttpProtocol, gateway=gateway),  # type: ignore[arg-type] # called, never subclassed
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=int(grace_s),
        backlog=_BACKLOG,
    )


def listen(host: str, port: int) -> socket.socket:
    """Listen on ``host`` and ``port``.

    Raises:
        ConfigError: the address is in use, or does not belong to this machine.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server(
            (host, port),
            family=family,
            backlog=_BACKLOG,
            # Otherwise "::" would be every interface, but for IPv6 alone.
            dualstack_ipv6=host == "::" and socket.has_dualstack_ipv6(),
        )
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]  # which repeats the address
        remedy = ""
        if error.errno == errno.EADDRINUSE:
            remedy = "; stop what listens there, or choose another --port (PORT=9000 for make run)"
        raise ConfigError(
            f"host, port: cannot listen on {_url_host(host)}:{port}: {reason}{remedy}"
        ) from None


def own_url(advertise_url: str | None, listener: socket.socket, *, dev: bool) -> str:
    """Where clients reach this instance and no other; empty when that is unknown.

    With ``dev`` it is the listener's address. Otherwise that address may be behind a proxy, where
    no client can reach it.
    """
    host, port = listener.getsockname()[:2]
    if advertise_url is None and dev and host not in {"0.0.0.0", "::"}:  # noqa: S104 - no bind
        return f"ws://{_url_host(host)}:{port}"
    return advertise_url or ""


def tell_address(listener: socket.socket, on_listening: Callable[[str], None]) -> None:
    """Log the address of ``listener``, and call ``on_listening`` with it."""
    host, port = listener.getsockname()[:2]
    url = f"http://{_url_host(host)}:{port}"
    log.info("listening", url=url)
    on_listening(url)


@contextmanager
def on_stop_signals(stop: Callable[[int], object]) -> Iterator[None]:
    """Call ``stop`` with the signal, instead of ending, on SIGTERM and SIGINT."""
    loop, numbers = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, stop, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


class _Server(uvicorn.Server):
    """uvicorn that drains the sessions before it stops, and exits with status 0."""

    def __init__(
        self, config: uvicorn.Config, instance: Instance, on_listening: Callable[[str], None]
    ) -> None:
        super().__init__(config)
        self._instance = instance
        self._on_listening = on_listening
        self._drain: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on SIGTERM and SIGINT, and do not raise them again."""
        with on_stop_signals(lambda number: self.handle_exit(number, None)):
            yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Log the address, once the server listens."""
        await super().startup(sockets)
        keep_what_exists()
        for listener in sockets or []:
            tell_address(listener, self._on_listening)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop. A second SIGINT stops at once."""
        super().handle_exit(sig, frame)
        if self.force_exit and self._drain is not None:
            self._drain.cancel()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain while pulls are still answered, then stop listening and finish requests."""
        if not self.force_exit:
            self._drain = asyncio.ensure_future(self._instance.drain())
            await asyncio.wait({self._drain})
            if not self._drain.cancelled():
                self._drain.result()
        await super().shutdown(sockets)


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
