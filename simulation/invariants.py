"""The invariants, and the oracle that checks them at every moment.

The oracle knows what no process can know: what is committed, which subscriptions deliver, and who
is in trouble. docs/simulation.md lists the invariants.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from operator import attrgetter
from typing import Final, NamedTuple, Protocol

import msgspec

from pokebridge.coordination.base import Member
from pokebridge.model import NewMessage, Page, Receipt
from pokebridge.placement import ShardMap
from pokebridge.sharding import shard_of
from simulation.network import Peer, Trouble
from simulation.scene import Scene
from simulation.sockets import ClientEnd, Wire
from simulation.stores import Written

SILENCE_BOUND_S: Final = 5.0
"""How long a message may wait for an undisturbed client while the broker reports its losses.
Whatever the broker does, the limit is ``verify_every_s`` plus this."""
UNSENT_BOUND_BYTES: Final = 512
"""How many bytes may wait for a client that does not read: a few small frames."""
_LOOK_AGAIN_S: Final = 1.0

_LISTENING = re.compile(rb'"type":"listening","recipient":"([^"]+)"')
_UNLISTENED = re.compile(rb'"type":"unlistened","recipient":"([^"]+)"')
_decode_map = msgspec.json.Decoder(ShardMap).decode


class Violation(NamedTuple):
    """An invariant that did not hold, at a virtual time in seconds."""

    invariant: str
    detail: str
    at_s: float


class _Commit(NamedTuple):
    """A message that the mailbox has, and since when."""

    version: int
    at_s: float


class _Seen(NamedTuple):
    """The members as one process last read them, and since when (true time) they are these."""

    members: Sequence[Member]
    standing: frozenset[tuple[str, str, bool]]
    since_s: float
    read_s: float
    deaf_since_s: Mapping[str, float]
    """Since when each deaf member is one, without a break."""


class WatchedClient(Protocol):
    """What the oracle needs to know of a client."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def recipient(self) -> str:
        """Whose client it is."""

    @property
    def active(self) -> bool:
        """Whether it has neither left nor been told to stop."""

    @property
    def ready(self) -> bool:
        """Whether it has a session and has heard ``ready``."""

    @property
    def instance(self) -> Peer | None:
        """The instance that its socket is connected to."""

    @property
    def trouble(self) -> Trouble:
        """The trouble of the client itself."""

    @property
    def failing(self) -> bool:
        """Whether its last pull failed."""

    @property
    def pull_is_troubled(self) -> bool:
        """Whether something has gone wrong since its running pull began."""


class Oracle:
    """Watches one world."""

    def __init__(self, scene: Scene) -> None:
        self.violation: Violation | None = None
        self.committed = 0
        self.silences_s: list[float] = []
        """How long each message waited for each client that was undisturbed."""
        self.bounded_s: list[float] = []
        """The same for clients that only the broker disturbed, or that it kept in the dark."""
        self.waits_s: list[float] = []
        """How long each message waited for each client, whatever the reason."""
        self.listened = self.polled = self.switched = 0
        """How often a client began to hear a further recipient, polled a session, and changed from
        that to a WebSocket."""
        self.moves = 0
        self._scene = scene
        self._commits: dict[str, list[_Commit]] = {}
        self._undone: dict[str, set[int]] = {}
        """The versions that a restore of the mailbox has undone."""
        self._restores = 0
        """How often the mailbox was restored."""
        self._restored_at = 0.0
        self._generations: dict[str, int] = {}
        """How often it had been, when a recipient got the newest message."""
        self._ids: dict[tuple[str, str], tuple[str, int]] = {}
        self._cursors: dict[WatchedClient, int | None] = {}
        self._ready_at: dict[WatchedClient, float] = {}
        self._watched: set[WatchedClient] = set()
        self._seen: dict[Peer, _Seen] = {}
        self._map: ShardMap | None = None
        self._maps: dict[int, ShardMap] = {}
        self._owned_since: dict[int, float] = {}
        self._mapped_at = 0.0
        self._losses = 0
        self._settle_s = 2 * scene.config.lease_s
        self._remembering_until = 0.0
        self._views: dict[Peer, ShardMap] = {}

    def fail(self, invariant: str, detail: str) -> None:
        """Note the first violation: it ends the run."""
        if self.violation is None:
            now = self._scene.scheduler.now
            self.violation = Violation(invariant, detail, now)
            self._scene.trace.note("ORACLE", f"{invariant}: {detail}")
            self._scene.scheduler.stop()

    def _missing(self, client: WatchedClient) -> Sequence[_Commit]:
        """What ``client`` has not pulled yet."""
        commits = self._commits.get(client.recipient, [])
        cursor = self._cursors.get(client) or 0
        return commits[bisect_right(commits, cursor, key=attrgetter("version")) :]

    def is_up_to_date(self, client: WatchedClient) -> bool:
        """Whether ``client`` has seen everything."""
        return not self._missing(client)

    def is_well_and_up_to_date(self, client: WatchedClient) -> bool:
        """Whether ``client`` is undisturbed too."""
        undisturbed = self.undisturbed_since(client) < float("inf")
        return undisturbed and self.is_up_to_date(client)

    # --- messages ---------------------------------------------------------------------------------

    def on_committed(
        self,
        peer: Peer,
        message: NewMessage,
        receipt: Receipt,
        clients: Iterable[WatchedClient],
    ) -> None:
        """The mailbox has committed a message for ``clients``."""
        commits = self._commits.setdefault(message.recipient, [])
        self._check_version(message.recipient, receipt.version)
        commits.append(_Commit(receipt.version, self._scene.scheduler.now))
        self.committed += 1
        self._scene.trace.note(
            peer.name, f"commits {message.id} as {message.recipient} {receipt.version}"
        )
        key = message.sender, message.id
        if key in self._ids:
            self.fail("no message doubled", f"{message.id} was committed twice")
        self._ids[key] = message.recipient, receipt.version
        for client in clients:
            self._watch(client)

    def _check_version(self, recipient: str, version: int) -> None:
        commits, undone = self._commits[recipient], self._undone.get(recipient, set())
        newest = commits[-1].version if commits else 0
        if version in undone or version <= newest:
            self.fail("no version twice", f"{recipient} got {version} again")
        elif version != newest + 1 and self._generations.get(recipient, 0) == self._restores:
            self.fail("dense versions", f"{recipient} got {version} after {newest}")
        self._generations[recipient] = self._restores

    def on_restored(self, heads: Mapping[str, int]) -> None:
        """The mailbox went back to ``heads``: what is above them is gone."""
        self._restores += 1
        self._restored_at = self._scene.scheduler.now
        for recipient, commits in self._commits.items():
            kept = bisect_right(commits, heads.get(recipient, 0), key=attrgetter("version"))
            undone = self._undone.setdefault(recipient, set())
            undone.update(commit.version for commit in commits[kept:])
            del commits[kept:]
        self._ids = {
            key: (recipient, version)
            for key, (recipient, version) in self._ids.items()
            if version not in self._undone[recipient]
        }

    def received(self, client: WatchedClient, page: Page) -> None:
        """``client`` has pulled a page."""
        versions = [message.version for message in page.messages]
        self._scene.trace.note(client.name, f"pulls {versions} up to {page.version}")
        cursor = self._cursors.get(client)
        if cursor is None:  # a new device does not get what all known devices had acked
            cursor = self._cursors[client] = versions[0] - 1 if versions else page.version
        # A page may have been read before the mailbox was restored.
        undone = self._undone.get(client.recipient, set())
        kept = [version for version in versions if version not in undone]
        pulled = self._missing(client)[: len(kept)]
        if kept != [commit.version for commit in pulled]:
            self.fail("no message lost or doubled", f"{client.name} at {cursor} got {versions}")
        skipped = [each.version for each in self._missing(client)[len(kept) :]]
        if not page.more and skipped and skipped[0] <= page.version:
            self.fail("no message lost or doubled", f"{client.name} at {cursor} misses {skipped}")
        has_cursor = any(each.version == cursor for each in self._commits.get(client.recipient, ()))
        if not versions and not page.more and page.version < cursor and has_cursor:
            self.fail("cursors only grow", f"{client.name} at {cursor} was told {page.version}")
        for commit in pulled:
            self._note_waits(client, commit.at_s)
        self._cursors[client] = max(cursor, page.version if not versions else versions[-1])

    def handled(self, client: WatchedClient | None) -> int:
        """The version up to which ``client`` has pulled everything."""
        return (self._cursors.get(client) or 0) if client is not None else 0

    def goes_on(self, before: WatchedClient, after: WatchedClient) -> None:
        """The client ``after`` goes on where ``before`` has left."""
        self._cursors[after] = self._cursors.get(before)

    def owes_ack(self, client: WatchedClient, acked: int) -> bool:
        """Whether an ack of ``client`` is lost: of its device only those up to ``acked`` are known.

        What a restored mailbox has forgotten is acked with the next message, or the next session.
        """
        commits = self._commits.get(client.recipient, [])
        pulled = commits[: len(commits) - len(self._missing(client))]
        is_newer_session = self._ready_at.get(client, 0.0) > self._restored_at
        return is_newer_session and bool(pulled) and acked < pulled[-1].version

    def _note_waits(self, client: WatchedClient, committed_at: float) -> None:
        now = self._scene.scheduler.now
        self.waits_s.append(now - committed_at)
        undisturbed_at, well_at = self.undisturbed_since(client), self._well_since(client)
        if undisturbed_at <= now and self._was_true_since(committed_at):
            self.silences_s.append(now - max(committed_at, undisturbed_at))
        elif well_at <= now:
            self.bounded_s.append(now - max(committed_at, well_at))

    def _was_true_since(self, at_s: float) -> bool:
        """Whether the broker has reported all that it lost since ``at_s``."""
        return self._scene.broker.servers.lies.over_at <= at_s

    def undisturbed_since(self, client: WatchedClient) -> float:
        """Since when ``client`` is undisturbed; infinity while it is disturbed.

        Trouble of its network, its pulls, the instance of its socket, the broker or the mailbox
        disturbs a client. Trouble of other instances, of the coordination store or of the shard
        map does not: a client may not notice that.
        """
        line = float("inf") if client.instance is None else client.instance.line.over_at
        return max(self._well_since(client), line, self._scene.broker.trouble.over_at)

    def _well_since(self, client: WatchedClient) -> float:
        """The same, but the broker is no excuse."""
        scene = self._scene
        if client.instance is None or client not in self._ready_at or client.failing:
            return float("inf")
        if client.pull_is_troubled:
            return float("inf")
        return max(
            self._ready_at[client],
            client.trouble.over_at,
            client.instance.trouble.over_at,
            scene.post.trouble.over_at,
        )

    def _watch(self, client: WatchedClient) -> None:
        if client not in self._watched:
            self._watched.add(client)
            self._scene.outside.deliver(SILENCE_BOUND_S, self._look, client)

    def _look(self, client: WatchedClient) -> None:
        """Check whether the oldest message for ``client`` has waited too long."""
        missing = self._missing(client)
        if not client.active or not missing:
            self._watched.discard(client)
            return
        now = self._scene.scheduler.now
        version, committed_at = missing[0]
        verified_in_s = self._scene.config.verify_every_s + SILENCE_BOUND_S
        due_at = max(committed_at, self._well_since(client)) + verified_in_s
        if self._was_true_since(committed_at):
            undisturbed_at = max(committed_at, self.undisturbed_since(client))
            due_at = min(due_at, undisturbed_at + SILENCE_BOUND_S)
        if now >= due_at:
            self.fail(
                "no silence",
                f"{client.name} on {client.instance and client.instance.name} has not pulled"
                f" {version}, committed at {committed_at:.3f}",
            )
            return
        again_s = min(due_at - now, _LOOK_AGAIN_S)
        self._scene.outside.deliver(again_s, self._look, client)

    # --- sessions ---------------------------------------------------------------------------------

    def readiness_changed(self, client: WatchedClient) -> None:
        """The core of ``client`` has become ready, or no longer is."""
        if client.ready:
            self._ready_at[client] = self._scene.scheduler.now
            if not self.is_up_to_date(client):
                self._watch(client)
        else:
            self._ready_at.pop(client, None)

    def heard(self, client: WatchedClient, text: str) -> None:
        """``client`` has heard a message of its session."""
        self._scene.trace.note(client.name, f"hears {text}")

    def written(self, instance: Peer, wire: Wire, data: bytes, unsent: int) -> None:
        """``instance`` has written ``data`` to a client, for whom ``unsent`` bytes wait."""
        client = wire.client
        if unsent > UNSENT_BOUND_BYTES:
            self.fail("a slow reader costs O(1)", f"{unsent} bytes wait for {client.name}")
        if b'"type":"ready"' in data:
            self._check_live(instance, client, client.recipient)
        for recipient in map(bytes.decode, _LISTENING.findall(data)):
            # It is said again when a token is renewed, whatever has become of the subscription.
            if recipient not in wire.listened:
                wire.listened.add(recipient)
                self._check_live(instance, client, recipient)
        wire.listened.difference_update(map(bytes.decode, _UNLISTENED.findall(data)))

    def _check_live(self, instance: Peer, client: ClientEnd, recipient: str) -> None:
        shard = shard_of(recipient, self._scene.config.shard_count)
        if not self._scene.broker.has_covered(instance, shard):
            self.fail(
                "ready only when live",
                f"{instance.name} said to {client.name} that it hears {recipient};"
                f" shard {shard} is not delivered",
            )

    # --- the shard map ----------------------------------------------------------------------------

    def on_members(self, peer: Peer, members: Sequence[Member]) -> None:
        """``peer`` has read who the members are, and the shard map as well."""
        standing = frozenset(
            (member.id, member.incarnation, member.state == "deaf") for member in members
        )
        before = self._seen.get(peer)
        now = self._scene.scheduler.now
        since_s = before.since_s if before and before.standing == standing else now
        known = before.deaf_since_s if before else {}
        deaf_since_s = {id_: known.get(id_, now) for id_, _, is_deaf in standing if is_deaf}
        self._seen[peer] = _Seen(members, standing, since_s, now, deaf_since_s)

    def knowledge_of(self, peer: Peer) -> object:
        """What ``peer`` has read of the members."""
        return self._seen.get(peer)

    def on_written(self, written: Written) -> None:
        """A shard map was written."""
        shard_map = _decode_map(written.after.body)
        before = self._map
        lost, self._losses = self._losses != self._scene.store.losses, self._scene.store.losses
        self._scene.trace.note(
            written.peer.name, f"writes the map of epoch {shard_map.epoch}, {shard_map.mode}"
        )
        now = self._scene.scheduler.now
        if lost:
            self._maps.clear()
            self._remembering_until = now + 2 * self._settle_s
        elif before is not None and shard_map.epoch <= before.epoch:
            self.fail("epochs only grow", f"{shard_map.epoch} was written after {before.epoch}")
        elif before is not None and not self._is_remembering():
            self._check_moves(written.known, before, shard_map)
        for shard, owner in enumerate(shard_map.owners):
            if before is None or owner != before.owners[shard]:
                self._owned_since[shard] = now
        if before is None or before.mode != shard_map.mode:
            self._mapped_at = now
        self._map = self._maps[shard_map.epoch] = shard_map

    def _check_moves(self, seen: object, before: ShardMap, after: ShardMap) -> None:
        """Check that a writer that has ``seen`` the members may write ``after``."""
        assert isinstance(seen, _Seen), "who writes has read the members"
        moved = [
            shard
            for shard, owner in enumerate(before.owners)
            if owner is not None and owner != after.owners[shard]
        ]
        self.moves += len(moved)
        staying = {each.id for each in seen.members if each.state in {"active", "deaf"}}
        staying -= before.draining | after.draining
        now = self._scene.scheduler.now
        can_own = staying - _deaf(seen.deaf_since_s, staying, seen.read_s - 1.1 * self._settle_s)
        keep = staying - _deaf(seen.deaf_since_s, staying, now - 0.9 * self._settle_s)
        for shard in moved:
            if after.owners[shard] not in can_own and can_own:
                self.fail("a shard moves to who can own it", f"{shard} to {after.owners[shard]}")
        needless = [shard for shard in moved if before.owners[shard] in keep]
        settled_s = now - seen.since_s
        if needless and settled_s < 0.9 * self._settle_s:
            self.fail(
                "a shard moves only when it must",
                f"{needless} moved though their owners live and the cluster changed"
                f" at {seen.since_s:.3f}",
            )
        fair = after.shard_count // max(1, len(can_own))
        for owner in {before.owners[shard] for shard in needless}:
            kept = sum(each == owner for each in after.owners)
            if kept < fair:
                self.fail("a shard moves only when it must", f"{owner} is left with {kept}")

    def look_at_views(self, views: Iterable[tuple[Peer, ShardMap]]) -> None:
        """Check the map of each running instance; called several times a second."""
        for instance, shard_map in views:
            before = self._views.get(instance)
            if before is shard_map:
                continue
            self._views[instance] = shard_map
            if before is not None and shard_map.epoch < before.epoch:
                self.fail("epochs only grow", f"{instance.name}: {before.epoch}, {shard_map.epoch}")
            if self._is_remembering() or self._scene.config.assignment == "ring":
                continue
            known = self._maps.get(shard_map.epoch)
            if known is not None and known != shard_map:
                self.fail("one map an epoch", f"{instance.name} has another {shard_map.epoch}")

    def look_at_deaf(
        self, instance: Peer, clients: Iterable[WatchedClient], since_s: float
    ) -> None:
        """``instance`` is deaf since ``since_s``: others must have its shards and clients."""
        if self._owned_for_long(instance, since_s):
            self.fail("a deaf instance lets go", f"{instance.name} still owns shards")
        for client in clients:
            ready_at = self._ready_at.get(client, float("inf"))
            disturbed_at = max(ready_at, client.trouble.over_at)
            if client.instance is instance and disturbed_at < since_s:
                self.fail("a deaf instance lets go", f"{instance.name} still has {client.name}")

    def look_at_denied(self, instance: Peer, since_s: float) -> None:
        """``instance`` may not hear some shards since ``since_s``: others must own those.

        Unless it hears everything: that is another permission.
        """
        if self._scene.broker.delivers_all(instance):
            return
        if shards := self._owned_for_long(instance, since_s) & instance.denied:
            self.fail("a deaf instance lets go", f"{instance.name} still owns {sorted(shards)}")

    def _owned_for_long(self, instance: Peer, since_s: float) -> frozenset[int]:
        """The shards that ``instance`` has owned since ``since_s``, where a leader gives them."""
        shard_map = self._map
        if shard_map is None or shard_map.mode == "fanout" or self._is_remembering():
            return frozenset()
        if self._scene.config.assignment != "coordinator" or self._mapped_at > since_s:
            return frozenset()
        owned = shard_map.owned_by(instance.name)
        return frozenset(shard for shard in owned if self._owned_since.get(shard, 0.0) <= since_s)

    def _is_remembering(self) -> bool:
        """Whether the store has lost its data, and instances may still restore the map."""
        has_lost = self._losses != self._scene.store.losses
        return has_lost or self._scene.scheduler.now < self._remembering_until


def _deaf(
    since_s: Mapping[str, float], staying: AbstractSet[str], before_s: float
) -> AbstractSet[str]:
    """Those of ``staying`` that are deaf since ``before_s``, if another one hears."""
    if staying <= since_s.keys():
        return frozenset()
    return {id_ for id_ in staying & since_s.keys() if since_s[id_] <= before_s}
