"""The port of a host: connections are accepted by the hub, and passed to its workers.

Each goes to the worker with the fewest connections. So sockets are spread evenly, even after a
worker was replaced, and a hung worker gets none. With SO_REUSEPORT the kernel would choose by a
hash: it would leave a new worker almost empty, give connections to a hung one, reset those queued
for one that dies, and let a second server take the same port unnoticed.
"""

import asyncio
import socket
from collections.abc import Callable, Iterator
from typing import Final, Protocol

import structlog

from pokebridge.telemetry import LogPace

_AT_ONCE: Final = 64
_RETRY_S: Final = 0.02
_LOG_AGAIN_S: Final = 60.0

log = structlog.get_logger(__name__)


class Place(Protocol):
    """A worker: where connections are passed to it, and how many have been."""

    door: socket.socket | None
    passed: int


class Door:
    """Accepts connections and passes them on.

    - ``_listener``: where clients connect
    - ``_places``: the workers that serve, in the order in which they are tried
    - ``_family``: the byte that tells a worker the family of the addresses
    - ``_waiting``: a connection that no worker could take yet; none is accepted meanwhile
    - ``_retry``: the timer that tries again
    - ``_is_open``: whether connections are accepted
    - ``_pace``: how often a failure is logged
    """

    def __init__(self, listener: socket.socket, places: Callable[[], Iterator[Place]]) -> None:
        self._listener = listener
        self._places = places
        self._family = b"6" if listener.family == socket.AF_INET6 else b"4"
        self._waiting: socket.socket | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._is_open = False
        self._pace = LogPace(_LOG_AGAIN_S)
        self._loop = asyncio.get_running_loop()

    def open(self) -> None:
        """Accept connections from now on."""
        self._listener.settimeout(0)
        self._is_open = True
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def close(self) -> None:
        """Accept none any more. Those in the kernel's queue stay there until it is closed."""
        if self._is_open:
            self._is_open = False
            self._pause(None)
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None

    def retry(self) -> None:
        """Another worker serves: pass on what waits."""
        if self._retry is not None:
            self._retry.cancel()
            self._resume()

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no descriptor or no memory is left
                if self._pace.allows("accept", self._loop.time()):
                    log.warning("accept_failed", reason=str(error))
                self._pause(_RETRY_S)
                return
            if not self._pass(connection):
                self._waiting = connection
                self._pause(_RETRY_S)
                return

    def _pass(self, connection: socket.socket) -> bool:
        """Pass ``connection`` to the first worker that takes it. Returns whether one did."""
        for place in self._places():
            if place.door is None:
                continue
            try:
                socket.send_fds(place.door, [self._family], [connection.fileno()])
            except OSError:  # its queue is full, or it is dying
                continue
            place.passed += 1
            connection.close()
            return True
        return False

    def _pause(self, retry_s: float | None) -> None:
        self._loop.remove_reader(self._listener.fileno())
        if self._retry is not None:
            self._retry.cancel()
        self._retry = None if retry_s is None else self._loop.call_later(retry_s, self._resume)

    def _resume(self) -> None:
        self._retry = None
        if not self._is_open:
            return
        if self._waiting is not None:
            if not self._pass(self._waiting):
                self._retry = self._loop.call_later(_RETRY_S, self._resume)
                return
            self._waiting = None
        self._loop.add_reader(self._listener.fileno(), self._accept)
        self._accept()
