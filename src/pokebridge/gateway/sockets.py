"""The HTTP connections of an instance: how many there may be, and which one gives way.

A session or a request needs a descriptor more than an idle connection does. So at a limit the
connection that has been idle longest is closed for the new one, which HTTP clients expect from any
server. The new one is refused only if no connection is idle.
"""

import time
from collections.abc import Callable, Iterator
from typing import Final, Protocol

import structlog

from pokebridge.telemetry import LogPace

LOG_AGAIN_S: Final = 60.0

log = structlog.get_logger(__name__)


class HttpConnection(Protocol):
    """What is counted: a connection until it closes or becomes a session."""

    def give_way(self) -> None:
        """Close, because another connection needs the place."""


class Sockets:
    """Counts the HTTP connections of an instance against their limits. ``None`` is no limit.

    - ``at_most``: for these connections and the sessions together
    - ``at_most_per_address``: for these connections of one client address
    - ``entered``: all there have been
    - ``limited``: how many were closed or refused because of a limit
    - ``_sessions``: counts the sessions
    - ``_addresses``: the address of each connection; empty where none is known yet
    - ``_waiting``: those that wait for a request, the longest first
    - ``_by_address``: all of an address; those that wait are in the same order
    - ``_pace``: how often it is logged that a limit is reached, by the limit's name
    """

    def __init__(
        self,
        *,
        at_most: int | None,
        at_most_per_address: int | None,
        sessions: Callable[[], int],
    ) -> None:
        self.at_most = at_most
        self.at_most_per_address = at_most_per_address
        self.entered = self.limited = 0
        self._sessions = sessions
        self._addresses: dict[HttpConnection, str] = {}
        self._waiting: dict[HttpConnection, None] = {}
        self._by_address: dict[str, dict[HttpConnection, None]] = {}
        self._pace = LogPace(LOG_AGAIN_S)

    def __len__(self) -> int:
        """How many HTTP connections are open."""
        return len(self._addresses)

    def __iter__(self) -> Iterator[HttpConnection]:
        """The open HTTP connections."""
        return iter(self._addresses)

    def enter(self, connection: HttpConnection, address: str) -> bool:
        """Count a new connection, which waits for its first request.

        Returns False, and does not count it, when it must be refused. An empty ``address`` has no
        limit: a proxy's, whose clients are known with their requests.
        """
        if self._is_full() and not self._make_room("all", self._waiting, self.at_most):
            return False
        if not self._has_room_for(address):
            return False
        self._add(connection, address)
        self._waiting[connection] = None
        self.entered += 1
        return True

    def attribute(self, connection: HttpConnection, address: str) -> bool:
        """Count ``connection`` for another address. Returns False when it must be refused."""
        if connection not in self._addresses or self._addresses[connection] == address:
            return True
        self._remove(connection)
        is_allowed = self._has_room_for(address)
        self._add(connection, address)
        return is_allowed

    def serve(self, connection: HttpConnection) -> None:
        """A whole request of ``connection`` has arrived. Until ``wait`` it does not give way."""
        self._waiting.pop(connection, None)

    def wait(self, connection: HttpConnection) -> None:
        """``connection`` waits for a request from now on."""
        address = self._addresses.get(connection)
        if address is None:
            return
        for order in (self._waiting, self._by_address[address]):
            order.pop(connection, None)
            order[connection] = None

    def leave(self, connection: HttpConnection) -> None:
        """``connection`` is closed, or is a session from now on."""
        if connection in self._addresses:
            self._remove(connection)
            self._waiting.pop(connection, None)

    def relieve(self, count: int) -> None:
        """Close up to ``count`` connections: the process has no descriptor left."""
        for _ in range(count):
            if not self._make_room("descriptors", self._waiting, None):
                return

    def _is_full(self) -> bool:
        return self.at_most is not None and len(self) + self._sessions() >= self.at_most

    def _has_room_for(self, address: str) -> bool:
        limit = self.at_most_per_address
        those = self._by_address.get(address, {}) if address else {}
        return limit is None or len(those) < limit or self._make_room("address", those, limit)

    def _make_room(self, which: str, among: dict[HttpConnection, None], limit: int | None) -> bool:
        """Close the one ``among`` these that has waited longest. Returns whether there was one."""
        self.limited += 1
        self._tell(which, limit)
        for connection in among:
            if connection in self._waiting:
                self.leave(connection)
                connection.give_way()
                return True
        return False

    def _tell(self, which: str, limit: int | None) -> None:
        if self._pace.allows(which, time.monotonic()):
            log.warning(
                "connections_limited",
                by=which,
                limit=limit,
                connections=len(self),
                sessions=self._sessions(),
                limited=self.limited,
            )

    def _add(self, connection: HttpConnection, address: str) -> None:
        self._addresses[connection] = address
        self._by_address.setdefault(address, {})[connection] = None

    def _remove(self, connection: HttpConnection) -> None:
        address = self._addresses.pop(connection)
        those = self._by_address[address]
        del those[connection]
        if not those:
            del self._by_address[address]
