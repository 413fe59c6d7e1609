"""What has happened to the cluster, in plain words: told from what changes between two views.

It is for people, who look at it in the console. Every instance tells its own story of the same
events, and gives each the same id, so that whoever asks several instances can merge the answers.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence

from pokebridge.api.schema import Event
from pokebridge.cluster.membership import View
from pokebridge.coordination.base import Member

KEPT = 200
"""The newest so many events are kept."""


class Events:
    """The newest events, oldest first."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """``clock`` tells Unix time in seconds."""
        self._clock = clock
        self._kept: deque[Event] = deque(maxlen=KEPT)
        self._before: View | None = None
        self._migrating: int | None = None
        self.count = 0
        """Of all events since the start, those that are forgotten too."""

    def __iter__(self) -> Iterator[Event]:
        """The events that are kept, oldest first."""
        return iter(list(self._kept))

    def see(self, view: View) -> Sequence[Event]:
        """Take the next view of the cluster; returns what has happened since the one before."""
        before, self._before = self._before, view
        events = [*self._arrivals(before, view)]
        if before is not None:
            events += self._departures(before, view)
            events += self._drains(before, view)
            events += self._gaps(before, view)
            events += self._moves(before, view, because=[event.id for event in events])
            events += self._migration(before, view)
        self._kept.extend(events)
        self.count += len(events)
        return events

    def _event(self, kind: str, key: object, text: str, instance: str = "") -> Event:
        return Event(f"{kind}:{key}", int(self._clock() * 1000), kind, instance, text)

    def _arrivals(self, before: View | None, view: View) -> Iterator[Event]:
        known = {} if before is None else before.members
        for member in view.members.values():
            if member.id not in known:
                event = self._event("joined", _life(member), f"{member.id} joined", member.id)
                if before is None:  # it was here before anybody looked
                    event.at_ms = member.joined_at_ms
                yield event
            elif known[member.id].incarnation != member.incarnation:
                text = f"{member.id} came back, restarted"
                yield self._event("joined", _life(member), text, member.id)

    def _departures(self, before: View, view: View) -> Iterator[Event]:
        for member in before.members.values():
            if member.id in view.members:
                continue
            if member.state == "draining" or member.id in before.shard_map.draining:
                text = f"{member.id} left, after it had drained"
                yield self._event("left", _life(member), text, member.id)
            else:
                text = f"{member.id} died: its lease was not renewed"
                yield self._event("died", _life(member), text, member.id)

    def _drains(self, before: View, view: View) -> Iterator[Event]:
        for member in view.members.values():
            if _drains(member, view) and not _drains(before.members.get(member.id), before):
                text = f"{member.id} drains: it gives its shards up, then its sessions"
                yield self._event("draining", _life(member), text, member.id)

    def _gaps(self, before: View, view: View) -> Iterator[Event]:
        for member, earlier in _those_that_stayed(before, view):
            gaps = member.report.gaps - earlier.report.gaps
            if gaps > 0:
                text = (
                    f"{member.id} had {_counted(gaps, 'gap')} in the transport:"
                    " every session concerned was poked"
                )
                yield self._event("gap", f"{_life(member)}:{member.report.gaps}", text, member.id)

    def _moves(self, before: View, view: View, *, because: Sequence[str]) -> Iterator[Event]:
        old, new = before.shard_map.owners, view.shard_map.owners
        ways = Counter(way for way in zip(old, new, strict=True) if way[0] != way[1])
        if ways:
            told = ", ".join(
                f"{moved} from {giver or 'nobody'} to {taker or 'nobody'}"
                for (giver, taker), moved in ways.most_common()
            )
            # With a ring of members the owners change and the epoch does not.
            key = ":".join([str(view.shard_map.epoch), *because])
            yield self._event("moved", key, f"{_counted(ways.total(), 'shard')} moved: {told}")

    def _migration(self, before: View, view: View) -> Iterator[Event]:
        mode, epoch = view.shard_map.mode, view.shard_map.epoch
        if before.shard_map.mode != mode:
            self._migrating = epoch
            yield self._event("migrating", epoch, f"migrating to {_MODES[mode]}")
        if self._migrating is not None and all(
            member.report.settled and member.report.epoch >= self._migrating
            for member in view.members.values()
        ):
            key, self._migrating = self._migrating, None
            yield self._event("migrated", key, f"migrated: all instances are in {_MODES[mode]}")


_MODES = {"fanout": "fan-out", "partitioned": "partitioned mode"}


def _life(member: Member) -> str:
    return f"{member.id}:{member.incarnation}"


def _drains(member: Member | None, view: View) -> bool:
    return member is not None and (
        member.state == "draining" or member.id in view.shard_map.draining
    )


def _those_that_stayed(before: View, view: View) -> Iterator[tuple[Member, Member]]:
    for member in view.members.values():
        earlier = before.members.get(member.id)
        if earlier is not None and earlier.incarnation == member.incarnation:
            yield member, earlier


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
