"""What has happened to the cluster, in plain words: derived from two successive views.

People read it in the console. Every instance keeps its own history. An event has the same id on
every instance, so a caller that asks several can merge the answers.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from pokebridge.cluster.membership import View
from pokebridge.coordination.base import Member

KEPT = 200
"""How many entries are kept, the newest ones."""
_MODES = {"fanout": "fan-out", "partitioned": "partitioned mode"}


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """Something that happened to the cluster."""

    id: str
    """The same on every instance that saw it."""
    at_ms: int
    """Unix time."""
    kind: str
    """``joined``, ``left``, ``died``, ``draining``, ``gap``, ``moved``, ``migrating`` or
    ``migrated``."""
    instance: str
    """The instance that it is about; empty for the whole cluster."""
    text: str


class History:
    """The newest entries, oldest first."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """``clock`` returns Unix time in seconds."""
        self._clock = clock
        self._kept: deque[HistoryEntry] = deque(maxlen=KEPT)
        self._before: View | None = None
        self._migrating: int | None = None
        self.count = 0
        """Number of entries since the start, those no longer kept included."""

    def __iter__(self) -> Iterator[HistoryEntry]:
        """The entries that are kept, oldest first."""
        return iter(list(self._kept))

    def add(self, view: View) -> Sequence[HistoryEntry]:
        """Compare the next view with the one before; returns the new entries."""
        before, self._before = self._before, view
        entries = [*self._arrivals(before, view)]
        if before is not None:
            entries += self._departures(before, view)
            entries += self._drains(before, view)
            entries += self._gaps(before, view)
            entries += self._moves(before, view, because=[entry.id for entry in entries])
            entries += self._migration(before, view)
        self._kept.extend(entries)
        self.count += len(entries)
        return entries

    def _entry(self, kind: str, key: object, text: str, instance: str = "") -> HistoryEntry:
        return HistoryEntry(f"{kind}:{key}", int(self._clock() * 1000), kind, instance, text)

    def _arrivals(self, before: View | None, view: View) -> Iterator[HistoryEntry]:
        known = {} if before is None else before.members
        for member in view.members.values():
            if member.id not in known:
                entry = self._entry("joined", _life(member), f"{member.id} joined", member.id)
                # In the first view are members that joined before this instance looked.
                yield entry if before is not None else replace(entry, at_ms=member.joined_at_ms)
            elif known[member.id].incarnation != member.incarnation:
                text = f"{member.id} came back, restarted"
                yield self._entry("joined", _life(member), text, member.id)

    def _departures(self, before: View, view: View) -> Iterator[HistoryEntry]:
        for member in before.members.values():
            if member.id in view.members:
                continue
            if _is_draining(member, before):
                text = f"{member.id} left, after it had drained"
                yield self._entry("left", _life(member), text, member.id)
            else:
                text = f"{member.id} died: its lease was not renewed"
                yield self._entry("died", _life(member), text, member.id)

    def _drains(self, before: View, view: View) -> Iterator[HistoryEntry]:
        for member in view.members.values():
            earlier = before.members.get(member.id)
            was_draining = earlier is not None and _is_draining(earlier, before)
            if _is_draining(member, view) and not was_draining:
                text = f"{member.id} drains: it gives its shards up, then its sessions"
                yield self._entry("draining", _life(member), text, member.id)

    def _gaps(self, before: View, view: View) -> Iterator[HistoryEntry]:
        for member in view.members.values():
            earlier = before.members.get(member.id)
            if earlier is None or earlier.incarnation != member.incarnation:
                continue
            gaps = member.report.gaps - earlier.report.gaps
            if gaps > 0:
                text = (
                    f"{member.id} had {_counted(gaps, 'gap')} in the transport:"
                    " every session concerned was poked"
                )
                yield self._entry("gap", f"{_life(member)}:{member.report.gaps}", text, member.id)

    def _moves(self, before: View, view: View, *, because: Sequence[str]) -> Iterator[HistoryEntry]:
        old, new = before.shard_map.owners, view.shard_map.owners
        moves = Counter(move for move in zip(old, new, strict=True) if move[0] != move[1])
        if moves:
            described = ", ".join(
                f"{count} from {giver or 'nobody'} to {taker or 'nobody'}"
                for (giver, taker), count in moves.most_common()
            )
            # With a ring of members the owners change and the epoch does not.
            key = ":".join([str(view.shard_map.epoch), *because])
            text = f"{_counted(moves.total(), 'shard')} moved: {described}"
            yield self._entry("moved", key, text)

    def _migration(self, before: View, view: View) -> Iterator[HistoryEntry]:
        mode, epoch = view.shard_map.mode, view.shard_map.epoch
        if before.shard_map.mode != mode:
            self._migrating = epoch
            yield self._entry("migrating", epoch, f"migrating to {_MODES[mode]}")
        if self._migrating is not None and all(
            member.report.settled and member.report.epoch >= self._migrating
            for member in view.members.values()
        ):
            key, self._migrating = self._migrating, None
            yield self._entry("migrated", key, f"migrated: all instances are in {_MODES[mode]}")


def _life(member: Member) -> str:
    return f"{member.id}:{member.incarnation}"


def _is_draining(member: Member, view: View) -> bool:
    return member.state == "draining" or member.id in view.shard_map.draining


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
