"""Instances receive each other's beacons, so a loss between them is noticed within seconds.

A probe proves that an instance receives its own signals. An engine of several servers may still
lose those of others, for example while the route between two servers is down. So each instance
publishes a numbered beacon now and then. When numbers of another instance are missing, pokes may be
missing as well, and this is treated as a gap of all subscriptions.

A beacon also carries the settings that must agree in a cluster, so that a difference is noticed
even without a coordination store. So are two instances with one name, and instances with different
mailboxes. An instance without sessions publishes beacons only for this, and receives none.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from hashlib import sha256
from typing import Final, NamedTuple

import msgspec
import structlog

from pokebridge.telemetry import LogPace
from pokebridge.wire import MAX_BEACON_TEXT_CHARS, Beacon

log = structlog.get_logger(__name__)

FASTEST_S = 2.0
HEARD_PER_S = 4.0
"""About the most beacons a second that an instance receives: with more instances, each publishes
less often."""
ALONE_S = 10.0
"""How often an instance publishes while it receives no other's beacons."""
UNHEARING_S = 60.0
"""How often an instance without sessions publishes. It receives none, and may be one of many."""
REORDER_S = 1.0
"""A missing number may still arrive for this long, since an engine may reorder signals."""
GAP_EVERY_S = 10.0
"""At most one gap in this time: a route that loses some of everything must not cause a storm."""
SILENT_AFTER = 3
"""An instance that has missed this many beacons is silent."""
FORGET_S = 60.0
"""A silent instance is forgotten after this time, unless it is a member of the cluster."""
OLDER_BY_S = 5.0
"""Of two instances that disagree, one that started this much earlier stays ready."""
MAX_PEERS = 10_000
LOG_AGAIN_S = 1.0
"""One line in this time for a setting that disagrees, however many instances are made up."""
LOGGED_CLUSTERS = 100
"""Other clusters that are named in the log. Anyone who publishes may make up more."""
MUST_AGREE: Final = ("shard_count", "carrier", "assignment", "group_prefixes")


class _Hole(NamedTuple):
    """Numbers that are missing, from ``first`` to ``last``."""

    first: int
    last: int
    since: float

    def without(self, number: int) -> Iterator["_Hole"]:
        """What is still missing once ``number`` has arrived."""
        if not self.first <= number <= self.last:
            yield self
            return
        if self.first < number:
            yield self._replace(last=number - 1)
        if number < self.last:
            yield self._replace(first=number + 1)


class _Peer:
    """Another instance, from its first beacon heard until it stops or is forgotten.

    Attributes:
        beacon: its last beacon.
        heard_at: when that was heard.
        began_at: when the instance was started, at the latest.
        silent: whether beacons of it are overdue.
        logged: the differences that were logged.
    """

    def __init__(self, beacon: Beacon, now: float, *, first: int) -> None:
        """``first`` is the first number that should have been heard."""
        self.beacon = beacon
        self.heard_at = now
        self.began_at = now - beacon.up_s
        self.silent = False
        self.logged: set[str] = set()
        self._highest = first - 1
        self._holes: list[_Hole] = []
        self.hear(beacon, now)

    def hear(self, beacon: Beacon, now: float) -> None:
        number = beacon.number
        if number > self._highest + 1:
            self._holes.append(_Hole(self._highest + 1, number - 1, now))
        else:
            self._holes = [rest for hole in self._holes for rest in hole.without(number)]
        if number >= self._highest:
            self._highest, self.beacon = number, beacon
        self.heard_at = now
        self.began_at = min(self.began_at, now - beacon.up_s)

    def take_lost(self, now: float) -> int:
        """How many numbers have not arrived in time. Each is told once."""
        overdue = [hole for hole in self._holes if now - hole.since >= REORDER_S]
        self._holes = [hole for hole in self._holes if hole not in overdue]
        return sum(hole.last - hole.first + 1 for hole in overdue)


class Beacons:
    """The beacons of one instance, and what it hears of others'.

    Callers pass ``now`` in seconds of a monotonic clock, and publish what ``next`` returns.

    Attributes:
        lost: beacons of other instances that did not arrive.
        members: the ids of the cluster's members that publish beacons; ``None`` if nobody knows.
        mailbox: names the mailbox of this instance; empty if it has none that others could have.
    """

    def __init__(self, me: Beacon) -> None:
        """``me`` is the beacon of this instance without its number and times."""
        self.lost = 0
        self.members: AbstractSet[str] | None = None
        self.mailbox: Callable[[], str] = str
        self._me = me
        # When this instance began, and whether it listens.
        self._began_at = 0.0
        self._hears = True
        self._peers: dict[tuple[str, str, str], _Peer] = {}
        # Members that were never heard, with the time since when, and those of them that are
        # overdue: they may use another engine.
        self._awaited: dict[str, float] = {}
        self._unheard: AbstractSet[str] = frozenset()
        # Other clusters that were heard, so that each is logged once ...
        self._other_clusters: set[str] = set()
        # ... and how often it is logged that a setting disagrees.
        self._pace = LogPace(LOG_AGAIN_S)
        # The number of the last beacon that the engine accepted, and when the next is due.
        self._sent = 0
        self._sent_at = float("-inf")
        # Whether a loss is still to be reported as a gap, and when the last one was.
        self._owes_gap = False
        self._gap_at = float("-inf")

    def begin(self, now: float, *, hears: bool = True) -> None:
        """This instance runs from now on. Unless it ``hears``, it does not listen to others."""
        self._began_at, self._hears = now, hears

    # --- publishing -------------------------------------------------------------------------------

    @property
    def every_s(self) -> float:
        """How often this instance publishes a beacon now."""
        if not self._hears:
            return UNHEARING_S
        return max(FASTEST_S, len(self._peers) / HEARD_PER_S) if self._peers else ALONE_S

    def next(self, now: float, jitter: float = 1.0) -> Beacon | None:
        """The beacon to publish now, if it is time: ``jitter`` times the usual pause has passed."""
        if now - self._sent_at < self.every_s * jitter:
            return None
        self._sent_at = now
        return self._stamped(now)

    def farewell(self, now: float) -> Beacon:
        """The last beacon, so that no instance waits for another."""
        return msgspec.structs.replace(self._stamped(now), last=True)

    def sent(self, beacon: Beacon) -> None:
        """Note that the engine has accepted ``beacon``. If it has not, its number is used again."""
        self._sent = beacon.number

    def _stamped(self, now: float) -> Beacon:
        return msgspec.structs.replace(
            self._me,
            number=self._sent + 1,
            up_s=round(now - self._began_at, 3),
            every_s=self.every_s,
            mailbox=self.mailbox(),
        )

    # --- hearing ----------------------------------------------------------------------------------

    def hear(self, beacon: Beacon, now: float) -> None:
        """Take a beacon, from this instance or another."""
        if (beacon.sender, beacon.incarnation) == (self._me.sender, self._me.incarnation):
            return
        key = beacon.cluster, beacon.sender, beacon.incarnation
        if (peer := self._peers.get(key)) is not None:
            peer.hear(beacon, now)
        elif len(self._peers) < MAX_PEERS:
            peer = self._peers[key] = _Peer(beacon, now, first=self._first_expected(beacon, now))
        else:
            return
        self._compare(peer, now)

    def _first_expected(self, beacon: Beacon, now: float) -> int:
        """The first number of a new peer that should have been heard.

        It is its first one, unless the peer was there before and this instance has not listened
        long enough to have heard of it.
        """
        listening_s = now - self._began_at
        return 1 if listening_s > min(beacon.up_s, SILENT_AFTER * beacon.every_s) else beacon.number

    def _compare(self, peer: _Peer, now: float) -> None:
        theirs, others = peer.beacon, self._other_clusters
        if theirs.cluster != self._me.cluster:
            if theirs.cluster not in others and len(others) < LOGGED_CLUSTERS:
                others.add(theirs.cluster)
                log.warning("other_cluster_heard", cluster=theirs.cluster, peer=theirs.sender)
            return
        values = {name: (getattr(theirs, name), getattr(self._me, name)) for name in MUST_AGREE}
        values["mailbox"] = theirs.mailbox, self.mailbox()
        values["instance"] = theirs.sender, self._me.sender
        for setting in self._differences(peer):
            if setting not in peer.logged and self._pace.allows(setting, now):
                peer.logged.add(setting)
                their_value, our_value = values[setting]
                log.error(
                    "settings_disagree",
                    setting=setting,
                    peer=theirs.sender,
                    theirs=their_value,
                    ours=our_value,
                )

    def _differences(self, peer: _Peer) -> list[str]:
        """What is wrong between ``peer`` and this instance, by the names of the settings."""
        theirs = peer.beacon
        names = [
            name
            for name in MUST_AGREE
            if getattr(theirs, name) not in {None, getattr(self._me, name)}
        ]
        mailboxes = {theirs.mailbox, self.mailbox()}
        if len(mailboxes) > 1 and "" not in mailboxes:
            names.append("mailbox")
        # An earlier life of this instance may be heard for a moment.
        lives_on = not peer.silent and peer.heard_at - self._began_at > OLDER_BY_S
        if theirs.sender == self._me.sender and lives_on:
            names.append("instance")
        return names

    # --- what follows -----------------------------------------------------------------------------

    def step(self, now: float) -> str | None:
        """Look for losses; to be called about once a second.

        Returns:
            Why there must have been a gap of all subscriptions; ``None`` if there was none.
        """
        lost = sum(peer.take_lost(now) for peer in self._peers.values())
        self.lost += lost
        self._owes_gap |= lost > 0
        self._note_silence(now)
        if not self._owes_gap or now - self._gap_at < GAP_EVERY_S:
            return None
        self._owes_gap, self._gap_at = False, now
        return "beacons of other instances did not arrive"

    def _note_silence(self, now: float) -> None:
        new = self._note_unheard(now)
        for key, peer in list(self._peers.items()):
            away_s = now - peer.heard_at
            every_s = max(peer.beacon.every_s, self.every_s)
            was_silent, peer.silent = peer.silent, away_s > SILENT_AFTER * every_s
            is_member = self.members is not None and peer.beacon.sender in self.members
            if peer.silent and not was_silent and is_member:
                new.append(peer.beacon.sender)
            is_over = peer.beacon.last and away_s > REORDER_S
            if is_over or (away_s > max(FORGET_S, 2 * SILENT_AFTER * every_s) and not is_member):
                del self._peers[key]
        if new:  # one line: when this instance is cut off, it is all of them
            log.warning("peers_silent", count=len(new), peer=new[0])

    def _note_unheard(self, now: float) -> list[str]:
        """Note which members should have been heard by now. Returns those that are new."""
        members = self.members if self._hears and self.members is not None else frozenset()
        never = members - {peer.beacon.sender for peer in self._mine()} - {self._me.sender}
        self._awaited = {member: self._awaited.get(member, now) for member in never}
        allowed_s = SILENT_AFTER * max(ALONE_S, len(members) / HEARD_PER_S)
        before = self._unheard
        self._unheard = {it for it, since in self._awaited.items() if now - since > allowed_s}
        return sorted(self._unheard - before)

    @property
    def heard(self) -> int:
        """How many other instances of the cluster are heard."""
        return sum(not peer.silent for peer in self._mine())

    @property
    def silent_members(self) -> int:
        """How many members of the cluster renew their lease, but no beacons of them arrive."""
        heard = {peer.beacon.sender for peer in self._mine() if not peer.silent}
        silent = {peer.beacon.sender for peer in self._mine() if peer.silent} | self._unheard
        return len((silent - heard) & (self.members or frozenset()))

    @property
    def disagreements(self) -> Mapping[str, int]:
        """How many instances differ in each setting; ``cluster``: how many are of another.

        ``instance``: how many others have the id of this one.
        """
        counts = Counter(name for peer in self._mine() for name in self._differences(peer))
        counts["cluster"] = len(self._peers) - sum(1 for _ in self._mine())
        return counts

    @property
    def trouble(self) -> str | None:
        """Why this instance must not serve: settings that differ from an older instance's.

        An instance that began clearly earlier stays ready, so that one wrong instance does not take
        all the others away.
        """
        for peer in self._mine():
            if self._began_at < peer.began_at - OLDER_BY_S:
                continue
            for name in self._differences(peer):
                if name not in MUST_AGREE:
                    continue
                ours, theirs = getattr(self._me, name), getattr(peer.beacon, name)
                return (
                    f"{name} is {_shown(ours)} here and"
                    f" {_shown(theirs)} at instance {peer.beacon.sender!r}:"
                    " set the same everywhere in the cluster"
                )
        return None

    def _mine(self) -> Iterator[_Peer]:
        """The peers of this instance's cluster."""
        return (peer for peer in self._peers.values() if peer.beacon.cluster == self._me.cluster)


def group_prefixes_text(prefixes: Iterable[str]) -> str:
    """``prefixes`` as beacons compare them: the same text wherever the same names are groups.

    A text that is too long for a beacon is cut, and ends with a digest of the whole.
    """
    needed: list[str] = []
    for prefix in sorted(prefixes):  # a shorter one comes before those that it includes
        if not (needed and prefix.startswith(needed[-1])):
            needed.append(prefix)
    text = ",".join(needed)
    if len(text) <= MAX_BEACON_TEXT_CHARS:
        return text
    digest = sha256(text.encode()).hexdigest()[:16]
    return f"{text[: MAX_BEACON_TEXT_CHARS - len(digest) - 1]}…{digest}"


def _shown(value: object) -> object:
    """``value`` of a setting, in words if it is empty."""
    return "not set" if value == "" else value
