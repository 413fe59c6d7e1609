"""Who may open a session now: limits on what a stranger can ask for, cheap to refuse."""

import math
from http import HTTPStatus

from pokebridge.errors import RefusedError


class TokenBucket:
    """At most ``rate_per_s`` takes a second over time, and one second's worth at once."""

    def __init__(self, rate_per_s: float) -> None:
        self._rate_per_s = rate_per_s
        self._burst = max(1.0, rate_per_s)
        self._tokens = self._burst
        self._refilled_at = -math.inf

    def take(self, now: float) -> bool:
        """Take one, if there is one; ``now`` in seconds of a monotonic clock."""
        grown = self._tokens + (now - self._refilled_at) * self._rate_per_s
        self._tokens = min(self._burst, grown)
        self._refilled_at = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


class Admission:
    """Counts handshakes and sessions against their limits; ``None`` is no limit."""

    def __init__(
        self,
        *,
        handshakes_per_s: float | None,
        max_sessions: int | None,
        max_sessions_per_address: int | None,
    ) -> None:
        self._handshakes = TokenBucket(handshakes_per_s) if handshakes_per_s else None
        self._max_sessions = max_sessions
        self._max_per_address = max_sessions_per_address
        self._sessions = 0
        self._by_address: dict[str, int] = {}
        self.draining = False

    def check_handshake(self, now: float) -> None:
        """Count a handshake that begins.

        Raises:
            RefusedError: 503; this instance drains, or takes no more handshakes this second.
        """
        if self.draining:
            raise RefusedError(
                HTTPStatus.SERVICE_UNAVAILABLE, "this instance is draining", {"Retry-After": "1"}
            )
        if self._handshakes is not None and not self._handshakes.take(now):
            raise RefusedError(
                HTTPStatus.SERVICE_UNAVAILABLE, "too many handshakes just now", {"Retry-After": "2"}
            )

    def check_session(self, address: str) -> None:
        """See whether another session from ``address`` fits.

        Raises:
            RefusedError: 503 when the instance is full, 429 when the address has its share.
        """
        if self._max_sessions is not None and self._sessions >= self._max_sessions:
            raise RefusedError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "this instance has all the sessions it takes",
                {"Retry-After": "5"},
            )
        limit = self._max_per_address
        if limit is not None and self._by_address.get(address, 0) >= limit:
            raise RefusedError(
                HTTPStatus.TOO_MANY_REQUESTS,
                "too many sessions from this address",
                {"Retry-After": "30"},
            )

    def enter(self, address: str) -> None:
        """Count a session that begins; ``leave`` must follow."""
        self._sessions += 1
        if self._max_per_address is not None:
            self._by_address[address] = self._by_address.get(address, 0) + 1

    def leave(self, address: str) -> None:
        """Count a session that has ended."""
        self._sessions -= 1
        if self._max_per_address is not None:
            left = self._by_address.get(address, 0) - 1
            if left > 0:
                self._by_address[address] = left
            else:
                self._by_address.pop(address, None)
