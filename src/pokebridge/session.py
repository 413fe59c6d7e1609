"""The state of one WebSocket, without the socket: what to send, and when to end.

A poke is level-triggered, so one slot holds all that a session still has to tell its client:
nothing, or "pull", with the newest version if every merged poke had one. With that slot a slow
reader costs O(1). A recipient that the session listens to beside its own has a slot of its own.

``gateway.connection`` owns the socket. It tells the session what happened and when, in seconds on a
monotonic clock. It writes the bytes that the session returns, and calls ``tick`` when ``due_at``
has passed. The rules are those of docs/protocol.md, section 3.
"""

from enum import Enum, auto
from math import inf
from typing import NamedTuple

from pokebridge.framing import encode_close
from pokebridge.wire import (
    PING_CONTROL_FRAME,
    address_poke,
    auth_frame,
    listening_frame,
    poke_frame,
    ready_frame,
    unlistened_frame,
)


class Timing(NamedTuple):
    """The deadlines of a session, in seconds. All sessions of an instance have the same."""

    ping_interval_s: float = 25.0
    pong_timeout_s: float = 20.0
    ready_timeout_s: float = 30.0
    """How long a session waits for ``ready``. After that the client should go elsewhere."""
    close_timeout_s: float = 5.0
    """How long the peer may take to answer our close frame."""
    max_messages_per_ping: int = 1000
    """The most frames that a client may send in one ping interval. Ours send far fewer."""
    max_listened: int = 0
    """To how many recipients beside its own a session may listen."""


class State(Enum):
    """The states of a session, which it passes in this order."""

    WAITING = auto()
    """The handshake is done, but the subscription is not live yet, so ``ready`` is not sent."""
    OPEN = auto()
    CLOSING = auto()
    """Our close frame is sent, the peer's answer is awaited."""
    CLOSED = auto()
    """Nothing more may be written. The socket is to be dropped."""


UNKNOWN_VERSION = 0
"""Stands for "some newer version": the poke had none."""
_NOTHING = -1
# What a client may send between two pings beyond twice the recipients that it may listen to.
_SPARE_LISTENS = 100


def _merged(pending: int, version: int | None) -> int:
    """``pending``, a slot, together with a poke for ``version``."""
    # A poke without a version may be newer than any known version.
    if version is None or pending == UNKNOWN_VERSION:
        return UNKNOWN_VERSION
    return max(pending, version)


def _merged_poke(pending: int) -> bytes:
    """The poke for ``pending``, a slot; nothing if that is empty."""
    if pending == _NOTHING:
        return b""
    return poke_frame(None if pending == UNKNOWN_VERSION else pending)


class Session:
    """The state machine of one session."""

    __slots__ = (
        "_awaiting_pong",
        "_blocked",
        "_due_at",
        "_ends_at",
        "_expires_at",
        "_heard",
        "_listens",
        "_pending",
        "_timing",
        "device",
        "id",
        "listened",
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
        """At ``ends_at`` the client is told to reconnect, before the platform cuts it off."""
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
        self.listened: dict[str, ListenedRecipient] | None = None
        """What is listened to beside ``recipient``; ``None`` takes less memory than no entries."""
        self._awaiting_pong = False
        self._blocked = False
        self._heard = 0
        self._listens = 0

    @property
    def due_at(self) -> float:
        """When ``tick`` must be called, unless something else happens first."""
        if self.state is State.CLOSING:
            return self._due_at
        return min(self._due_at, self._expires_at, self._ends_at)

    @property
    def flows(self) -> bool:
        """Whether a poke is written at once: the session is open, and the peer reads."""
        return self.state is State.OPEN and not self._blocked

    def open(
        self, *, instance: str, now: float, first_ping_s: float, takes_acks: bool = False
    ) -> bytes:
        """The subscription is live. Returns the ``ready`` frame.

        ``first_ping_s`` spreads the pings of sessions that began together. With ``takes_acks`` the
        client may ack over its socket.
        """
        self.state = State.OPEN
        self._due_at = now + first_ping_s
        return ready_frame(
            session=self.id,
            instance=instance,
            expires_in_s=max(0, int(self._expires_at - now)),
            takes_acks=takes_acks,
            listens=self._timing.max_listened,
        )

    def poke(self, version: int | None) -> bool:
        """Returns whether to write a poke now. Otherwise it is merged, if that is necessary.

        Before ``ready`` it is not: the pull that ``ready`` causes sees the poke's commit.
        """
        if self.flows:
            return True
        if self.state is not State.OPEN:
            return False
        self._pending = _merged(self._pending, version)
        return False

    def block(self, now: float) -> None:
        """The peer does not read what was written: merge pokes from now on, with a deadline."""
        self._blocked = True
        if self.state is State.OPEN and not self._awaiting_pong:
            self._due_at = now + self._timing.pong_timeout_s

    def drain(self, now: float) -> bytes:
        """The peer has read everything. Returns the merged poke, if there is one."""
        self._blocked = False
        if self.state is not State.OPEN:
            return b""
        if not self._awaiting_pong:  # a peer that reads is alive
            self._due_at = now + self._timing.ping_interval_s
        pending, self._pending = self._pending, _NOTHING
        return _merged_poke(pending)

    def drain_listened(self) -> list[bytes]:
        """The same for each recipient that is listened to. To be called after ``drain``."""
        if self.listened is None or not self.flows:
            return []
        return [poke for each in self.listened.values() if (poke := each.drain())]

    def hear(self) -> bool:
        """Count a frame from the client. Returns False when it has sent too many."""
        self._heard += 1
        return self._heard <= self._timing.max_messages_per_ping

    def may_listen(self) -> bool:
        """Count a ``listen``. Returns False when the client has sent too many."""
        self._listens += 1
        return self._listens <= 2 * self._timing.max_listened + _SPARE_LISTENS

    def count_anew(self) -> None:
        """Begin another span in which the client's frames are counted."""
        self._heard = self._listens = 0

    @property
    def ping_interval_s(self) -> float:
        """The time between two pings, in seconds."""
        return self._timing.ping_interval_s

    @property
    def ready_timeout_s(self) -> float:
        """How long a subscription may take to be proven live, in seconds."""
        return self._timing.ready_timeout_s

    @property
    def listens_at_most(self) -> int:
        """To how many recipients beside its own it may listen."""
        return self._timing.max_listened

    def pong(self, now: float) -> None:
        """The client answered a ping."""
        if self._awaiting_pong and self.state is State.OPEN:
            self._awaiting_pong = False
            self._due_at = now + self._timing.ping_interval_s

    def renew(self, *, expires_at: float, now: float) -> bytes:
        """A new token was accepted. Returns the frame that says so."""
        self._expires_at = expires_at
        return auth_frame(max(0, int(expires_at - now)))

    def close(self, code: int, reason: str, now: float) -> bytes:
        """Start the closing handshake. Returns the close frame, and nothing the second time."""
        if self.state in {State.CLOSING, State.CLOSED}:
            return b""
        self.state = State.CLOSING
        self._due_at = now + self._timing.close_timeout_s
        return encode_close(code, reason)

    def tick(self, now: float) -> bytes:
        """Do what is due. Returns the bytes to write. May change ``state`` and ``due_at``."""
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
        self.count_anew()
        self._due_at = now + self._timing.pong_timeout_s
        return PING_CONTROL_FRAME


class ListenedRecipient:
    """A recipient that a session listens to beside its own: what to send, and until when.

    It begins when its token is accepted, and ends without any harm to the session.

    - ``recipient``: whose pokes are heard
    - ``session``: the session that hears them
    - ``told``: as the session's, for this recipient
    - ``_state``: WAITING until its subscription is live, then OPEN, at last CLOSED
    - ``_expires_at``, ``_ready_by``: its deadlines
    - ``_pending``: its slot
    """

    __slots__ = (
        "_expires_at",
        "_pending",
        "_ready_by",
        "_state",
        "recipient",
        "session",
        "told",
    )

    def __init__(self, session: Session, recipient: str, *, expires_at: float, now: float) -> None:
        self.recipient = recipient
        self.session = session
        self.told = UNKNOWN_VERSION
        self._state = State.WAITING
        self._expires_at = expires_at
        self._ready_by = now + session.ready_timeout_s
        self._pending = _NOTHING
        if session.listened is None:
            session.listened = {}
        session.listened[recipient] = self

    @property
    def due_at(self) -> float:
        """When ``tick`` must be called, unless something else happens first."""
        return min(self._expires_at, self._ready_by)

    @property
    def is_open(self) -> bool:
        """Whether ``listening`` is said, and neither this nor the session has ended."""
        return self._state is State.OPEN and self.session.state is State.OPEN

    @property
    def is_closed(self) -> bool:
        """Whether this or the session has ended, or is about to."""
        ended = {State.CLOSING, State.CLOSED}
        return self._state in ended or self.session.state in ended

    def begin(self, now: float) -> bytes:
        """The subscription is live. Returns the ``listening`` frame."""
        if self._state is not State.WAITING or self.is_closed:
            return b""
        self._state = State.OPEN
        self._ready_by = inf
        return listening_frame(self.recipient, max(0, int(self._expires_at - now)))

    def poke(self, version: int | None) -> bool:
        """As :meth:`Session.poke`, for this recipient."""
        if not self.is_open:
            return False
        if self.session.flows:
            return True
        self._pending = _merged(self._pending, version)
        return False

    def drain(self) -> bytes:
        """The merged poke, if there is one."""
        pending, self._pending = self._pending, _NOTHING
        poke = _merged_poke(pending)
        return poke and address_poke(poke, self.recipient)

    def renew(self, expires_at: float, now: float) -> bytes:
        """A new token was accepted. Returns the frame that says so; before ``begin`` none."""
        self._expires_at = expires_at
        if not self.is_open:
            return b""
        return listening_frame(self.recipient, max(0, int(expires_at - now)))

    def end(self, code: int, reason: str) -> bytes:
        """Listen no longer. Returns the frame that says so, and nothing the second time."""
        said = b"" if self.is_closed else unlistened_frame(self.recipient, code, reason)
        self._state = State.CLOSED
        if self.session.listened is not None and self.session.listened.get(self.recipient) is self:
            del self.session.listened[self.recipient]
        return said

    def tick(self, now: float) -> bytes:
        """Do what is due. Returns the frame that says so. May end it, and change ``due_at``."""
        if now >= self._expires_at:
            return self.end(4401, "token expired")
        if now >= self._ready_by:
            return self.end(1013, "the subscription is not live")
        return b""
