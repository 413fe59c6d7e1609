"""One WebSocket of a recipient, without the socket: what it must hear, and when it must end.

A poke is level-triggered, so all that a session owes its client fits one slot: nothing, or "pull",
with the newest version when every merged poke had one. That slot is why a slow reader costs O(1).

The shell (``gateway.connection``) owns the socket. It tells the session what happened and when, in
seconds of one monotonic clock, writes the bytes that it gets back, and calls ``tick`` when
``due_at`` has passed. The rules are protocol.md section 3's.
"""

from enum import Enum, auto
from math import inf
from typing import NamedTuple

from pokebridge.framing import encode_close
from pokebridge.wire import PING_CONTROL_FRAME, auth_frame, poke_frame, ready_frame


class Timing(NamedTuple):
    """How long a session waits for what, in seconds; the same for all of an instance."""

    ping_interval_s: float = 25.0
    pong_timeout_s: float = 20.0
    ready_timeout_s: float = 30.0
    """Until the subscription must be proven live; then the client is better off elsewhere."""
    close_timeout_s: float = 5.0
    """Until the peer must have answered our close frame."""
    max_messages_per_ping: int = 1000
    """Frames a client may send in one ping interval; one that says more is not one of ours."""


class State(Enum):
    """A session's life; it only ever moves down this list."""

    WAITING = auto()
    """The handshake is done, ``ready`` is not sent: the subscription is not proven live."""
    OPEN = auto()
    CLOSING = auto()
    """Our close frame is sent, the peer's answer is awaited."""
    CLOSED = auto()
    """Nothing more may be written; the socket is to be dropped."""


UNKNOWN_VERSION = 0
"""Stands for "some newer version": the poke had none."""
_NOTHING = -1


class Session:
    """The state machine of one session."""

    __slots__ = (
        "_awaiting_pong",
        "_blocked",
        "_due_at",
        "_ends_at",
        "_expires_at",
        "_heard",
        "_pending",
        "_timing",
        "device",
        "id",
        "recipient",
        "state",
        "told",
    )

    def __init__(
        self,
        recipient: str,
        device: str,
        session_id: str,
        *,
        expires_at: float,
        now: float,
        timing: Timing,
        ends_at: float = inf,
    ) -> None:
        """``ends_at``: when the client is to reconnect, before the platform cuts it off."""
        self.recipient = recipient
        self.device = device
        self.id = session_id
        self.state = State.WAITING
        self._timing = timing
        self._expires_at = expires_at
        self._ends_at = ends_at
        self._due_at = now + timing.ready_timeout_s
        self._pending = _NOTHING
        self.told = UNKNOWN_VERSION
        """The newest version that the client was poked for; unknown after a poke without one."""
        self._awaiting_pong = False
        self._blocked = False
        self._heard = 0

    @property
    def due_at(self) -> float:
        """When ``tick`` must be called next, unless something else happens first."""
        if self.state is State.CLOSING:
            return self._due_at
        return min(self._due_at, self._expires_at, self._ends_at)

    @property
    def flows(self) -> bool:
        """Whether a poke is written at once: it is open, and the peer takes what is written."""
        return self.state is State.OPEN and not self._blocked

    def open(self, *, instance: str, now: float, first_ping_s: float) -> bytes:
        """The subscription is live: the ``ready`` frame to write.

        ``first_ping_s`` spreads the pings of sessions that came together.
        """
        self.state = State.OPEN
        self._due_at = now + first_ping_s
        return ready_frame(
            session=self.id, instance=instance, expires_in_s=max(0, int(self._expires_at - now))
        )

    def poke(self, version: int | None) -> bool:
        """Whether to write a poke now; otherwise it is merged into what the session owes.

        Before ``ready`` a poke needs neither: the pull that ``ready`` causes sees its commit.
        """
        if self.flows:
            return True
        if self.state is not State.OPEN:
            return False
        # An unversioned poke may be newer than any version that we know, so it absorbs.
        if version is None or self._pending == UNKNOWN_VERSION:
            self._pending = UNKNOWN_VERSION
        else:
            self._pending = max(self._pending, version)
        return False

    def block(self, now: float) -> None:
        """The peer does not take what was written: merge from now on, and give it a deadline."""
        self._blocked = True
        if self.state is State.OPEN and not self._awaiting_pong:
            self._due_at = now + self._timing.pong_timeout_s

    def drain(self, now: float) -> bytes:
        """The peer has taken everything: the merged poke to write, if one is owed."""
        self._blocked = False
        if self.state is not State.OPEN:
            return b""
        if not self._awaiting_pong:  # a peer that reads is alive
            self._due_at = now + self._timing.ping_interval_s
        pending, self._pending = self._pending, _NOTHING
        if pending == _NOTHING:
            return b""
        return poke_frame(None if pending == UNKNOWN_VERSION else pending)

    def hear(self) -> bool:
        """Count a frame from the client; False when it sends more than any client of ours does."""
        self._heard += 1
        return self._heard <= self._timing.max_messages_per_ping

    def pong(self, now: float) -> None:
        """The client answered a ping."""
        if self._awaiting_pong and self.state is State.OPEN:
            self._awaiting_pong = False
            self._due_at = now + self._timing.ping_interval_s

    def renew(self, *, expires_at: float, now: float) -> bytes:
        """A new token was accepted: the frame that says so."""
        self._expires_at = expires_at
        return auth_frame(max(0, int(expires_at - now)))

    def close(self, code: int, reason: str, now: float) -> bytes:
        """Start the closing handshake: the close frame to write, at most once."""
        if self.state in {State.CLOSING, State.CLOSED}:
            return b""
        self.state = State.CLOSING
        self._due_at = now + self._timing.close_timeout_s
        return encode_close(code, reason)

    def tick(self, now: float) -> bytes:
        """Do what is due: the bytes to write. Then ``state`` may be CLOSED, ``due_at`` new."""
        if now < self.due_at or self.state is State.CLOSED:
            return b""
        if self.state is State.CLOSING or self._blocked:
            self.state = State.CLOSED
            return b""
        for is_over, code, reason in (
            (now >= self._expires_at, 4401, "token expired"),
            (now >= self._ends_at, 1012, "the session has lasted its time"),
            (self.state is State.WAITING, 1013, "the subscription is not live"),
            (self._awaiting_pong, 1011, "no pong"),
        ):
            if is_over:
                return self.close(code, reason, now)
        self._awaiting_pong = True
        self._heard = 0
        self._due_at = now + self._timing.pong_timeout_s
        return PING_CONTROL_FRAME
