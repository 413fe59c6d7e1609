"""Addresses that neither accept nor refuse, and names that lead to them."""

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest

MUTE, LIVE = "127.0.0.2", "127.0.0.1"
# More than the kernel keeps for a listener whose backlog is 0.
CONNECTIONS_THAT_FILL = 4


@contextmanager
def mute_listener(*, accepts: bool, host: str = MUTE, port: int = 0) -> Iterator[str]:
    """A listener that never answers; ``HOST:PORT``.

    Unless it ``accepts``, its backlog is full: a connection is not even made.
    """
    with ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(100 if accepts else 0)
        for _ in range(0 if accepts else CONNECTIONS_THAT_FILL):
            waiting = sockets.enter_context(socket.socket())
            waiting.settimeout(0)
            with suppress(BlockingIOError):
                waiting.connect(listener.getsockname())
        yield f"{host}:{listener.getsockname()[1]}"


Names = Callable[[str, list[str]], None]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """A resolver that knows a further name: ``names("db.test", ["127.0.0.2", "127.0.0.1"])``."""
    known: dict[str, list[str]] = {}
    resolve = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in known:
            return resolve(host, port, *args, **options)
        return [
            answer for address in known[name] for answer in resolve(address, port, *args, **options)
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return known.__setitem__
