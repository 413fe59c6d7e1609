"""Which transport a client uses: a WebSocket, or long-polling if no WebSocket works.

Pure, since it is a part of ``client.core``. A WebSocket is tried first. Some networks refuse its
handshake, hold back its frames or soon cut it. After several such failures without an answer from
the bridge the client polls. If polling fails as well, the bridge is unreachable, and a WebSocket is
tried next. While it polls, the client tries a WebSocket after growing pauses, and switches to it
when ``ready`` arrives on it.
"""

from math import inf
from typing import Literal

Transport = Literal["auto", "websocket", "poll"]
"""``auto``: a WebSocket, or polling if none works. The others: only that transport."""

FAILURES_TO_POLL = 3
"""A client polls after this many WebSockets in a row failed without an answer of the bridge."""
YOUNG_S = 10.0
"""A WebSocket that ends sooner after its ``ready`` has failed."""


class Transports:
    """Chooses the transport of each connection, and when a WebSocket is tried beside a poll.

    - ``polls``: whether the next connection polls
    - ``in_query``: whether the next WebSocket's token goes into the query
    - ``try_at``: when a client that polls tries a WebSocket
    """

    def __init__(self, transport: Transport, *, try_base_s: float, try_cap_s: float) -> None:
        self.polls = transport == "poll"
        self.in_query = False
        self.try_at = inf
        self._is_fixed = transport != "auto"
        self._try_base_s = try_base_s
        self._try_cap_s = try_cap_s
        self._failures = 0
        self._tries = 0
        # Whether no WebSocket of this row of failures has got beyond its handshake.
        self._is_refused = True

    def opened(self) -> None:
        """A WebSocket's handshake was accepted."""
        self._is_refused = False

    def failed(self, weight: int = 1) -> None:
        """A WebSocket has failed without an answer from the bridge.

        One that has kept the client waiting counts for more than one that failed at once.
        """
        if self._is_fixed:
            return
        self._failures += weight
        self.polls = self._failures >= FAILURES_TO_POLL

    def lasted(self) -> None:
        """A WebSocket has ended that worked for long enough."""
        self._failures = self._tries = 0
        self._is_refused = True

    def poll_failed(self) -> None:
        """A poll has failed before its ``ready``: perhaps all fails. A WebSocket is next."""
        if not self._is_fixed:
            self.polls = False
            self._failures = 0

    def poll_ready(self, now: float, random: float) -> None:
        """Polling works."""
        if not self._is_fixed and self.try_at == inf:
            self._change_way()
            self._try_later(now, random)

    def try_failed(self, now: float, random: float, *, opened: bool) -> None:
        """The WebSocket that was tried has failed, perhaps once it was ``opened``."""
        if opened:
            self._is_refused = False
        self._change_way()
        self._try_later(now, random)

    def changed_over(self) -> None:
        """The WebSocket that was tried is ready. It has to last, or the client polls again."""
        self.polls = False
        self.try_at = inf
        self._is_refused = False
        self._failures = FAILURES_TO_POLL - 1

    def wake(self, now: float) -> None:
        """The network may be another one."""
        if self.try_at < inf:
            self.try_at = now

    def _change_way(self) -> None:
        """Send the token in another way if no handshake succeeds although HTTP does."""
        if self._is_refused:
            self.in_query = not self.in_query

    def _try_later(self, now: float, random: float) -> None:
        pause_s = min(self._try_cap_s, self._try_base_s * 2.0 ** min(self._tries, 60))
        self._tries += 1
        self.try_at = now + pause_s * (0.5 + 0.5 * random)
