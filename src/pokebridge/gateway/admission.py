"""The limits on handshakes and sessions. Refusals are cheap, because strangers cause them."""

import math
import random
from collections import Counter, deque
from http import HTTPStatus

from pokebridge.errors import RefusedError

MOST_RETRY_AFTER_S = 60
"""The longest Retry-After, however long the queue is: some of the clients never come back."""

FAILED_HANDSHAKES_PER_ADDRESS = 100
"""The handshakes without a valid token that an address may send in two seconds."""


class HandshakePace:
    """Lets at most ``rate_per_s`` handshakes pass in any second, and refuses the others.

    A second has up to ten slices, each with its share of the rate. A token bucket with a capacity
    of one second would let twice the rate pass in one second, and half of it in one turn of the
    loop. No poke is delivered during a turn.

    A refused client gets a Retry-After that covers the queue ahead of it. So refused clients come
    back at the rate at which they can be admitted. With a constant Retry-After they would all come
    back at once, and be refused again. ``now`` is seconds on a monotonic clock.
    """

    def __init__(self, rate_per_s: float) -> None:
        slices = min(10, max(1, int(rate_per_s // 10)))
        self._rate_per_s = rate_per_s
        self._slice_s = 1 / slices
        self._passed: deque[float] = deque(maxlen=max(1, int(rate_per_s // slices)))
        self._queued = 0.0
        self._counted_at = -math.inf

    def is_full(self, now: float) -> bool:
        """Whether no handshake may pass now."""
        passed = self._passed
        return len(passed) == passed.maxlen and now - passed[0] < self._slice_s

    def take(self, now: float) -> bool:
        """Whether a handshake may pass. If so it is counted."""
        if self.is_full(now):
            return False
        self._passed.append(now)
        return True

    def queue(self, now: float) -> int:
        """Put a refused client at the end of the queue. Returns its Retry-After in seconds."""
        served = (now - self._counted_at) * self._rate_per_s
        most = self._rate_per_s * MOST_RETRY_AFTER_S
        self._queued = min(max(0.0, self._queued - served) + 1, most)
        self._counted_at = now
        return math.ceil(self._queued / self._rate_per_s)


class Strangers:
    """Counts failed handshakes by address, in this second and the one before."""

    def __init__(self) -> None:
        self._second = 0
        self._failed: Counter[str] = Counter()
        self._failed_before: Counter[str] = Counter()

    def note(self, address: str, now: float) -> None:
        """A handshake from ``address`` had no valid token."""
        self._move_to(int(now))
        self._failed[address] += 1

    def are_many(self, address: str, now: float) -> bool:
        """Whether ``address`` has used up its budget."""
        self._move_to(int(now))
        failed = self._failed[address] + self._failed_before[address]
        return failed > FAILED_HANDSHAKES_PER_ADDRESS

    def _move_to(self, second: int) -> None:
        if second != self._second:
            is_next = second == self._second + 1
            self._failed_before = self._failed if is_next else Counter()
            self._failed, self._second = Counter(), second


class Admission:
    """Counts handshakes and sessions against their limits. ``None`` is no limit.

    Only a handshake with a valid token takes a share of the common pace. So strangers can't use it
    up, however many they send.

    - ``sessions``: those that are open, and the handshakes that wait for a key
    - ``draining``: whether all new sessions are refused
    """

    def __init__(
        self,
        *,
        handshakes_per_s: float | None,
        max_sessions: int | None,
        max_sessions_per_address: int | None,
    ) -> None:
        self._pace = HandshakePace(handshakes_per_s) if handshakes_per_s else None
        self._strangers = Strangers()
        self._max_sessions = max_sessions
        self._max_per_address = max_sessions_per_address
        self.sessions = 0
        self._by_address: dict[str, int] = {}
        self.draining = False

    def check_handshake(self, address: str, now: float) -> None:
        """Check whether a handshake that begins can pass at all, before its token is verified.

        Raises:
            RefusedError: 503 when this instance is draining, or the rate of handshakes is reached.
        """
        if self.draining:
            raise RefusedError(
                HTTPStatus.SERVICE_UNAVAILABLE, "this instance is draining", {"Retry-After": "1"}
            )
        # Strangers would make the queue of the others longer: their tokens are verified first.
        is_full = self._pace is not None and self._pace.is_full(now)
        if is_full and not self._strangers.are_many(address, now):
            self.pass_handshake(now)

    def pass_handshake(self, now: float) -> None:
        """Count a handshake, whose token is valid.

        Raises:
            RefusedError: 503 when the rate of handshakes is reached.
        """
        if self._pace is not None and not self._pace.take(now):
            raise RefusedError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "too many handshakes just now",
                {"Retry-After": str(self._pace.queue(now))},
            )

    def note_stranger(self, address: str, now: float) -> bool:
        """Count a handshake without a valid token.

        Returns whether ``address`` is within its budget. Off where addresses have no limit.
        """
        if self._max_per_address is None:
            return True
        self._strangers.note(address, now)
        return not self._strangers.are_many(address, now)

    def check_session(self, address: str) -> None:
        """Check that another session from ``address`` is within the limits.

        Raises:
            RefusedError: 503 when the instance is full, 429 when the address has its limit.
        """
        if self._max_sessions is not None and self.sessions >= self._max_sessions:
            raise RefusedError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "this instance has all the sessions it takes",
                retry_within(5, 15),
            )
        limit = self._max_per_address
        if limit is not None and self._by_address.get(address, 0) >= limit:
            raise RefusedError(
                HTTPStatus.TOO_MANY_REQUESTS,
                "too many sessions from this address",
                retry_within(30, 60),
            )

    def enter(self, address: str) -> str:
        """Count a session that begins. ``leave`` must be called with what this returns.

        That is the address, or nothing to keep if there is no limit on addresses.
        """
        self.sessions += 1
        if self._max_per_address is None:
            return ""
        self._by_address[address] = self._by_address.get(address, 0) + 1
        return address

    def leave(self, address: str) -> None:
        """Count a session that has ended."""
        self.sessions -= 1
        if self._max_per_address is not None:
            left = self._by_address.get(address, 0) - 1
            if left > 0:
                self._by_address[address] = left
            else:
                self._by_address.pop(address, None)


def retry_within(least_s: int, most_s: int) -> dict[str, str]:
    """A random Retry-After, so that clients refused at the same time do not come back together."""
    return {"Retry-After": str(random.randint(least_s, most_s))}  # noqa: S311 - spreads load
