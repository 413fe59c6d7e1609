"""Coordination within one process."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pokebridge.coordination.base import Document, Member
from pokebridge.errors import CoordinationError


@dataclass(slots=True)
class _Store:
    """What all ends share. A lease is the time, by ``clock``, at which it ends."""

    members: dict[str, tuple[Member, float]] = field(default_factory=dict)
    document: Document | None = None
    leader: tuple[str, float] | None = None
    changes: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class MemoryCoordination:
    """One end of a store inside this process. ``clock`` is monotonic, in seconds."""

    is_shared = False
    is_static = False

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._store = _Store()
        self._changes_seen = 0
        self._closed = False

    def connect(self) -> "MemoryCoordination":
        """Return another end of the same store."""
        other = MemoryCoordination(self._clock)
        other._store = self._store
        other._changes_seen = self._store.changes
        return other

    async def renew(self, member: Member, lease_s: float) -> None:
        """Store ``member``'s record, with a lease of ``lease_s`` seconds from now."""
        store, now = self._open_store(), self._clock()
        known = store.members.get(member.id)
        store.members[member.id] = (member, now + lease_s)
        if known is None or known[1] <= now or known[0].standing != member.standing:
            self._announce()

    async def leave(self, member_id: str, incarnation: str) -> None:
        """End the lease, unless another incarnation has taken over."""
        store = self._open_store()
        known = store.members.get(member_id)
        if known is not None and known[0].incarnation == incarnation:
            del store.members[member_id]
            self._announce()

    async def members(self) -> list[Member]:
        """Return the members whose lease lasts, ordered by id."""
        store, now = self._open_store(), self._clock()
        store.members = {key: held for key, held in store.members.items() if held[1] > now}
        return [member for _, (member, _) in sorted(store.members.items())]

    async def read(self) -> Document | None:
        """Return the shared document."""
        return self._open_store().document

    async def write(self, body: bytes, revision: int | None) -> bool:
        """Replace the document if its revision is ``revision``."""
        store = self._open_store()
        current = None if store.document is None else store.document.revision
        if revision != current:
            return False
        store.document = Document(body, (current or 0) + 1)
        self._announce()
        return True

    async def lead(self, holder: str, lease_s: float) -> bool:
        """Lead, or go on leading, unless another holder leads."""
        store, now = self._open_store(), self._clock()
        if store.leader is not None and store.leader[0] != holder and store.leader[1] > now:
            return False
        store.leader = (holder, now + lease_s)
        return True

    async def resign(self, holder: str) -> None:
        """Stop leading, if ``holder`` leads."""
        store = self._open_store()
        if store.leader is not None and store.leader[0] == holder:
            store.leader = None

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return at the next change, or after ``timeout_s`` seconds."""
        store = self._open_store()
        if self._changes_seen == store.changes:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await store.changed.wait()
        self._changes_seen = store.changes

    async def close(self) -> None:
        """Close this end. The other ends stay open."""
        self._closed = True

    def _open_store(self) -> _Store:
        if self._closed:
            raise CoordinationError("the in-process coordination is closed")
        return self._store

    def _announce(self) -> None:
        self._store.changes += 1
        self._store.changed.set()
        self._store.changed = asyncio.Event()
