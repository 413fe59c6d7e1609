"""Which sockets of this instance a recipient has: the ``SessionMap`` of docs/roadmap.md.

It knows nothing about shards, phases or transports: a migration between the phases leaves
``handle_poke`` and this map untouched (docs/roadmap.md).
"""

from collections.abc import Collection, Iterator
from typing import Final, Generic, Protocol, TypeVar

# Up to this many sessions of a recipient are kept in a tuple, more in a dict. A dict for one or two
# would take four times the memory, and a tuple of thousands would be copied for each change.
FEW: Final = 8


class Addressed(Protocol):
    """What the map holds: a session of a recipient, or another session that listens to it."""

    @property
    def recipient(self) -> str:
        """The recipient that it belongs to."""

    @property
    def is_session(self) -> bool:
        """Whether it is a session of this recipient. Only these are counted and limited."""


T = TypeVar("T", bound=Addressed)


class SessionMap(Generic[T]):
    """Recipient → its sessions here, oldest first. To add, remove or find costs the same for any.

    A user has at most so many sessions. A group, whose recipient begins with one of ``groups``, may
    have any number.
    """

    __slots__ = ("_count", "_groups", "_limit", "_sessions", "listened")

    def __init__(self, max_sessions_per_recipient: int, groups: tuple[str, ...] = ()) -> None:
        self._limit = max_sessions_per_recipient
        self._groups = groups
        self._sessions: dict[str, tuple[T, ...] | dict[T, None]] = {}
        self._count = 0
        self.listened = 0
        """To how many recipients beside their own the sessions listen, all sessions together."""

    def __len__(self) -> int:
        """How many sessions there are."""
        return self._count

    def __iter__(self) -> Iterator[T]:
        """All that is in the map, as of now: it may change meanwhile."""
        return iter([session for sessions in self._sessions.values() for session in sessions])

    @property
    def recipients(self) -> int:
        """How many recipients are heard."""
        return len(self._sessions)

    def find(self, recipient: str) -> Collection[T]:
        """The sessions of ``recipient``, oldest first; empty when it has none here.

        It may change with the map. To change the map meanwhile, iterate over a copy.
        """
        return self._sessions.get(recipient, ())

    def add(self, session: T) -> T | None:
        """Add ``session``; returns the oldest, now out of the map, when there is one too many."""
        recipient = session.recipient
        sessions = self._sessions.get(recipient, ())
        if isinstance(sessions, dict):
            sessions[session] = None
        else:
            sessions = (*sessions, session)
            if len(sessions) > FEW:
                sessions = dict.fromkeys(sessions)
            self._sessions[recipient] = sessions
        if not session.is_session:
            self.listened += 1
            return None
        self._count += 1
        if len(sessions) <= self._limit or recipient.startswith(self._groups):
            return None
        own = [each for each in sessions if each.is_session]
        if len(own) <= self._limit:
            return None
        self.remove(own[0])
        return own[0]

    def remove(self, session: T) -> bool:
        """Take out exactly ``session``, never one that came after it; False when it is not in."""
        recipient = session.recipient
        sessions = self._sessions.get(recipient, ())
        if session not in sessions:
            return False
        if isinstance(sessions, dict):
            del sessions[session]
            kept = tuple(sessions) if len(sessions) <= FEW else sessions
        else:
            kept = tuple(other for other in sessions if other is not session)
        if kept:
            self._sessions[recipient] = kept
        else:
            del self._sessions[recipient]
        if session.is_session:
            self._count -= 1
        else:
            self.listened -= 1
        return True
