"""Which sockets of this instance a recipient has: the ``SessionMap`` of docs/roadmap.md.

It knows nothing of shards, phases or transports; ``handle_poke`` and this map are what a migration
between the phases leaves untouched (docs/roadmap.md).
"""

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class Addressed(Protocol):
    """What the map holds: anything that belongs to a recipient."""

    @property
    def recipient(self) -> str:
        """The recipient that it belongs to."""


T = TypeVar("T", bound=Addressed)


class SessionMap(Generic[T]):
    """Recipient → its sessions here, oldest first.

    The sessions of a recipient are an immutable tuple: almost all recipients have one, for which a
    set or a list would weigh four times as much, and a caller may close sessions while it iterates.
    """

    __slots__ = ("_count", "_limit", "_sessions")

    def __init__(self, max_sessions_per_recipient: int) -> None:
        self._limit = max_sessions_per_recipient
        self._sessions: dict[str, tuple[T, ...]] = {}
        self._count = 0

    def __len__(self) -> int:
        """How many sessions there are."""
        return self._count

    def __iter__(self) -> Iterator[T]:
        """Every session, as of now: the map may change meanwhile."""
        return iter([session for sessions in self._sessions.values() for session in sessions])

    @property
    def recipients(self) -> int:
        """How many recipients have a session."""
        return len(self._sessions)

    def find(self, recipient: str) -> tuple[T, ...]:
        """The sessions of ``recipient``, oldest first; empty when it has none here."""
        return self._sessions.get(recipient, ())

    def add(self, session: T) -> T | None:
        """Add ``session``; returns the oldest, now out of the map, when there is one too many."""
        sessions = (*self.find(session.recipient), session)
        replaced = None
        if len(sessions) > self._limit:
            replaced, *kept = sessions
            sessions = tuple(kept)
        else:
            self._count += 1
        self._sessions[session.recipient] = sessions
        return replaced

    def remove(self, session: T) -> bool:
        """Take out exactly ``session``, never one that came after it; False when it is not in."""
        sessions = self.find(session.recipient)
        kept = tuple(other for other in sessions if other is not session)
        if len(kept) == len(sessions):
            return False
        if kept:
            self._sessions[session.recipient] = kept
        else:
            del self._sessions[session.recipient]
        self._count -= 1
        return True
