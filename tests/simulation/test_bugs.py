"""The simulation can fail: bugs planted in the real code are caught within its fixed seeds."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from pokebridge import processor, publisher
from pokebridge.client.core import ClientCore
from pokebridge.client.events import Ack, TryFailed, Upgraded
from pokebridge.client.listens import Given, Listens
from pokebridge.cluster.membership import Membership
from pokebridge.coordination.base import Document
from pokebridge.errors import SignalError, UnavailableError
from pokebridge.gateway import beacons, gateway, subscriptions
from pokebridge.gateway.acks import Acks
from pokebridge.gateway.audiences import LARGE, Audiences, Walks
from pokebridge.gateway.bridge import Bridge
from pokebridge.gateway.gateway import Gateway
from pokebridge.gateway.listener import Listener
from pokebridge.gateway.polling import PolledSession
from pokebridge.gateway.recall import Recall
from pokebridge.gateway.session_map import SessionMap
from pokebridge.gateway.shard_routing import ShardRouting
from pokebridge.gateway.subscriptions import SubscriptionManager
from pokebridge.gateway.verification import Verification, Verified
from pokebridge.mailbox import memory
from pokebridge.mailbox.memory import MemoryMailbox
from pokebridge.model import MAX_VERSION, Feed, NewMessage, Poke, Receipt
from pokebridge.placement import Placement, ShardMap, Steps
from pokebridge.processor import Processor
from pokebridge.server.revocations import Revocations
from pokebridge.session import UNKNOWN_VERSION, Session, State
from pokebridge.sharding import shard_of
from pokebridge.wire import decode_signal, poke_frame
from pokebridge.workers.link import WorkerLink
from simulation import faults, world
from simulation.runner import simulate
from simulation.scene import Config
from simulation.world import Fault

SEEDS = 200

Plant = Callable[[pytest.MonkeyPatch], None]


def only(patch: pytest.MonkeyPatch, *wanted: Fault, **config: Any) -> None:
    """Let only these faults occur, and kills, in every world, and no instance have workers.

    Nor does anybody listen to more or poll, or is an audience large, unless the ``config`` says so.
    Among all faults too few seeds show the bug. With workers a poke that begins on a host is heard
    there without the engine.
    """

    def draw_config(rng: Random, kinds: Collection[str]) -> Config:
        return replace(real(rng, kinds), faults=list(kinds), **plain | config)

    plain: dict[str, Any] = {"groups": 0, "listen_share": 0.0}
    plain |= {"transport": "websocket", "poll_share": 0.0}
    plain |= {"callers": 0, "large_audience": LARGE, "audience_pulls_per_s": 1000.0}
    real = world.draw_config
    patch.setattr(world, "draw_config", draw_config)
    patch.setattr(world, "WORKERS", (1,))
    patch.setattr(faults, "ALL", {fault.__name__: fault for fault in (faults.kill, *wanted)})


def _without_beacons(patch: pytest.MonkeyPatch) -> None:
    """They would make up for a bug in time."""

    async def nothing(_self: Gateway) -> None:
        pass

    patch.setattr(Gateway, "_keep_beacons", nothing)


def with_workers(patch: pytest.MonkeyPatch, *wanted: Fault) -> None:
    """Let only these faults occur in every world, and each instance have two workers."""
    only(patch, *wanted)
    patch.setattr(world, "WORKERS", (2,))


def break_before_make(patch: pytest.MonkeyPatch) -> None:
    """What is not wanted any more is dropped at once, whatever replaces it."""

    def next_steps(wanted: Any, held: Any) -> Steps:
        return Steps(frozenset(wanted - held.keys()), frozenset(held.keys() - wanted))

    async def retire(self: Any) -> None:
        self._manager.release(self)

    patch.setattr(subscriptions, "next_steps", next_steps)
    patch.setattr(subscriptions._ManagedSubscription, "_retire", retire)
    only(patch, faults.migrate, faults.restart)


def ready_before_live(patch: pytest.MonkeyPatch) -> None:
    """``ready`` does not wait for the subscription to be proven."""
    patch.setattr(SubscriptionManager, "covers", lambda _self, _recipient: True)


def no_gap_poke(patch: pytest.MonkeyPatch) -> None:
    """A gap that the transport reports wakes nobody."""
    patch.setattr(Bridge, "wake", lambda _self, _concerns, _pulls_per_s: None)
    only(patch, faults.restart_broker, faults.cut_from_broker)


def fenceless_leader(patch: pytest.MonkeyPatch) -> None:
    """A leader writes over whatever is there, however long ago it read."""

    async def write(self: Membership, shard_map: ShardMap, stored: Document | None) -> bool:
        stored = await self._coordination.read()
        return await real(self, shard_map, stored)

    real = Membership._write
    patch.setattr(Membership, "_write", write)


def poke_before_commit(patch: pytest.MonkeyPatch) -> None:
    """The poke is published before the mailbox has the message."""

    async def send(self: Processor, message: NewMessage) -> Receipt:
        await self._publisher.publish_now([Poke(message.recipient)])
        receipt = await self._mailbox.append(message)
        await self._mailbox.confirm_outbox([Poke(message.recipient, receipt.version)])
        return receipt

    patch.setattr(Processor, "send", send)


def overflow_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A worker that has caught up is not poked for what its hub has dropped meanwhile."""
    patch.setattr(WorkerLink, "_make_up", lambda _self: None)
    with_workers(patch, faults.stop_worker)


def queue_for_a_slow_reader(patch: pytest.MonkeyPatch) -> None:
    """Pokes for a peer that does not read pile up."""
    patch.setattr(Session, "poke", lambda self, _version: self.state is State.OPEN)
    only(patch, faults.slow_reader)


def stale_disconnect_evicts(patch: pytest.MonkeyPatch) -> None:
    """The end of an old session takes its recipient's newer ones out of the map."""

    def remove(self: SessionMap[Any], session: Any) -> bool:
        return self._sessions.pop(session.recipient, None) is not None

    patch.setattr(SessionMap, "remove", remove)


def no_sweep(patch: pytest.MonkeyPatch) -> None:
    """Nobody looks for messages whose poke went missing."""

    async def nothing(_self: Processor) -> None:
        pass

    patch.setattr(Processor, "_sweep", nothing)
    only(patch, faults.kill_after_commit)


def owners_only(patch: pytest.MonkeyPatch) -> None:
    """An instance holds what it owns, and not the shards of its own sessions."""
    patch.setattr(ShardRouting, "interest", property(lambda _self: frozenset()))


def untagged_unheard(patch: pytest.MonkeyPatch) -> None:
    """Partitioned, nobody listens to signals without a shard."""

    def decide(self: Placement, *given: Any) -> frozenset[Any]:
        return real(self, *given) - {Feed.UNTAGGED}

    def covers(self: SubscriptionManager, recipient: str) -> bool:
        shard = shard_of(recipient, self._shard_count)
        return self._is_live(Feed.ALL) or self._is_live(shard)

    real = Placement.decide
    patch.setattr(Placement, "decide", decide)
    patch.setattr(SubscriptionManager, "covers", covers)


def gap_forgotten_at_retiring(patch: pytest.MonkeyPatch) -> None:
    """A subscription that is replaced takes a gap along that nobody was told of.

    Nor do beacons show the gap: they would make up for it in time.
    """

    async def retire(self: Any) -> None:
        self._retiring = None
        self._manager.release(self)

    async def close_retired(_self: SubscriptionManager, managed: Any) -> None:
        await managed.close()

    patch.setattr(subscriptions._ManagedSubscription, "_retire", retire)
    patch.setattr(SubscriptionManager, "_close_retired", close_retired)
    _without_beacons(patch)
    only(patch, faults.migrate_over_a_gap)


def confirmed_unpublished(patch: pytest.MonkeyPatch) -> None:
    """A poke is ticked off in the outbox although the transport did not take it."""

    async def publish(self: Processor, pokes: Any) -> None:
        try:
            await real(self, pokes)
        except UnavailableError:
            self.stats.poke_failures += 1

    real = Processor._publish
    patch.setattr(Processor, "_publish", publish)


def no_verification(patch: pytest.MonkeyPatch) -> None:
    """Nobody compares sessions with the mailbox. Nor do beacons show what was lost."""

    async def nothing(_self: Verification, _now: float, *, in_doubt: bool) -> None:
        pass

    patch.setattr(Verification, "step", nothing)
    _without_beacons(patch)
    only(patch, faults.break_route, faults.demote_server)


def unversioned_pokes_believed(patch: pytest.MonkeyPatch) -> None:
    """Verification takes a session that was poked without a version for one that knows all."""

    async def verify(self: Verification, sessions: Sequence[Verified], now: float) -> None:
        await real(self, [each for each in sessions if each.told != UNKNOWN_VERSION], now)

    real = Verification._verify
    patch.setattr(Verification, "_verify", verify)


def generation_at_the_restored_head(patch: pytest.MonkeyPatch) -> None:
    """After a restore the versions go on where the backup ended."""
    first = property(lambda _self: 0, lambda _self, _base: None)
    patch.setattr(MemoryMailbox, "_base", first, raising=False)


def young_generation_deletes(patch: pytest.MonkeyPatch) -> None:
    """After a restore an ack deletes what a forgotten device has not read."""
    patch.setattr(memory, "is_young", lambda _base, _now_ms: False)
    only(patch, faults.restore_mailbox, faults.come_and_go)


def deaf_instance_keeps_shards(patch: pytest.MonkeyPatch) -> None:
    """An instance that hears nothing says that it is well."""
    patch.setattr(Gateway, "is_deaf", property(lambda _self: False))
    only(patch, faults.deafen)


def deaf_instance_keeps_sessions(patch: pytest.MonkeyPatch) -> None:
    """An instance that hears nothing sends no session elsewhere."""
    patch.setattr(Gateway, "let_go", lambda _self, *, lets_go: None)
    only(patch, faults.deafen)


def deaf_to_some_shards_is_well(patch: pytest.MonkeyPatch) -> None:
    """A new subscription that fails raises no doubt while others deliver."""
    missed_something = property(lambda self: any(each.missed for each in self._managed.values()))
    patch.setattr(SubscriptionManager, "is_in_doubt", missed_something)
    only(patch, faults.deny_subscriptions)


def holes_unnoticed(patch: pytest.MonkeyPatch) -> None:
    """Beacons that are missing are nothing to worry about."""
    patch.setattr(beacons._Peer, "take_lost", lambda _self, _now: 0)
    only(patch, faults.break_route, faults.demote_server)


def forged_versions_believed(patch: pytest.MonkeyPatch) -> None:
    """Verification takes a session that was poked for any version for one that has it.

    Nor do beacons show what was lost.
    """

    async def verify(self: Verification, sessions: Sequence[Any], now: float) -> None:
        await real(self, [each for each in sessions if each.told < MAX_VERSION], now)

    real = Verification._verify
    patch.setattr(Verification, "_verify", verify)
    _without_beacons(patch)
    only(patch, faults.poison, faults.break_route, faults.demote_server)


def poison_ends_the_reader(patch: pytest.MonkeyPatch) -> None:
    """What can't be decoded raises where signals are read."""

    def decode(body: bytes) -> Any:
        try:
            return decode_signal(body)
        except SignalError as error:
            raise ValueError(str(error)) from None

    patch.setattr("pokebridge.gateway.bridge.decode_signal", decode)
    only(patch, faults.poison)


def invalid_entry_blocks_the_sweep(patch: pytest.MonkeyPatch) -> None:
    """An entry of the outbox that nobody can publish takes all others of its batch along."""
    patch.setattr(processor, "_is_valid", lambda _poke: True)
    only(patch, faults.poison, faults.kill_after_commit)


def batch_not_split(patch: pytest.MonkeyPatch) -> None:
    """One signal that is refused takes all others of its batch along."""

    async def publish(self: publisher._Attempt) -> None:
        await self._transport.publish([signal for signal, _ in self._signals])
        self.published = sum(len(pokes) for _, pokes in self._signals)

    patch.setattr(publisher._Attempt, "publish", publish)
    only(patch, faults.limit_signals)


def too_large_not_halved(patch: pytest.MonkeyPatch) -> None:
    """The pokes of a signal that is too large are set aside, and not tried one by one."""

    def halve(self: publisher._Attempt, pokes: Any, _shard: int, reason: str) -> None:
        self.too_large.update(poke.recipient for poke in pokes)
        self._refuse(pokes, reason)

    patch.setattr(publisher._Attempt, "_halve", halve)
    only(patch, faults.limit_signals)


def gap_forgets_disconnects(patch: pytest.MonkeyPatch) -> None:
    """After a gap nobody asks for the disconnects that were lost in it."""
    patch.setattr(Recall, "on_missed", lambda _self: None)
    only(patch, faults.disconnect, faults.cut_from_broker, faults.break_subscription)


def revocations_unread(patch: pytest.MonkeyPatch) -> None:
    """After a gap nobody reads in the mailbox what was revoked, nor asks."""

    async def nothing(_self: Revocations) -> None:
        pass

    patch.setattr(Revocations, "_read_if_possible", nothing)
    patch.setattr(Recall, "on_missed", lambda _self: None)
    only(patch, faults.revoke, faults.cut_from_broker, faults.break_subscription)


def ack_before_the_pull(patch: pytest.MonkeyPatch) -> None:
    """A client acks what a poke announces, which it has not pulled yet."""

    def on_frame(self: ClientCore, frame: dict[str, Any]) -> None:
        real(self, frame)
        if frame.get("type") == "poke" and "version" in frame:
            self._actions.append(Ack(frame["version"]))

    real = ClientCore._on_frame
    patch.setattr(ClientCore, "_on_frame", on_frame)


def ack_sent_once(patch: pytest.MonkeyPatch) -> None:
    """A client does not repeat an ack that an earlier socket has carried."""

    def on_frame(self: ClientCore, frame: dict[str, Any]) -> None:
        carried = self._acked
        real(self, frame)
        self._acked = carried

    real = ClientCore._on_frame
    patch.setattr(ClientCore, "_on_frame", on_frame)
    patch.setattr(gateway, "RECORD_EVERY_S", 2.0)
    only(patch)


def device_of_an_ack_ignored(patch: pytest.MonkeyPatch) -> None:
    """The instance takes the ack of any device of a recipient for that of all its devices."""

    def add(self: Acks, recipient: str, device: str, version: int) -> None:
        devices.setdefault(recipient, set()).add(device)
        for each in devices[recipient]:
            real(self, recipient, each, version)

    devices: dict[str, set[str]] = {}
    real = Acks.add
    patch.setattr(Acks, "add", add)


def listening(patch: pytest.MonkeyPatch, *wanted: Fault, **config: Any) -> None:
    """Let many clients listen to two groups, and only these faults occur."""
    many = {"groups": 2, "listen_share": 0.5, "listens_at_most": 10}
    only(patch, *wanted, **many | config)


def listening_before_live(patch: pytest.MonkeyPatch) -> None:
    """``listening`` does not wait for the subscription to be proven."""

    def hear(self: Gateway, session: Listener, response: bytes = b"") -> None:
        real(self, session, response)
        if not session.is_session and self._waiting.pop(session, self) is None:
            self._open(session)

    real = Gateway.hear
    patch.setattr(Gateway, "hear", hear)


def gap_wakes_no_listener(patch: pytest.MonkeyPatch) -> None:
    """After a gap sessions are poked for their own recipients alone."""

    def wake(self: Bridge, concerns: Callable[[str], bool], _pulls_per_s: float) -> None:
        for each in self._sessions:
            if each.is_session and concerns(each.recipient):
                each.notify(None, poke_frame(None))

    patch.setattr(Bridge, "wake", wake)
    listening(patch, faults.restart_broker, faults.cut_from_broker)


def listeners_unverified(patch: pytest.MonkeyPatch) -> None:
    """Verification compares sessions for their own recipients alone. Nor do beacons make up."""

    def add(self: Verification, session: Any) -> None:
        if session.is_session:
            real(self, session)

    real = Verification.add
    patch.setattr(Verification, "add", add)
    _without_beacons(patch)
    listening(patch, faults.break_route, faults.demote_server, faults.lag_route)


def lost_socket_not_told(patch: pytest.MonkeyPatch) -> None:
    """When a client's socket is gone, what listens over it is not told."""

    def lose(self: Listens) -> Sequence[Given]:
        real(self)
        return ()

    real = Listens.lose
    patch.setattr(Listens, "lose", lose)
    listening(patch, faults.lose_socket)


def switch_forgets_the_cursor(patch: pytest.MonkeyPatch) -> None:
    """A client that changes from polling to a WebSocket begins at the beginning."""

    def on_try(self: ClientCore, event: Upgraded | TryFailed) -> None:
        if isinstance(event, Upgraded):
            self._pulls.cursor = 0
        real(self, event)

    real = ClientCore._on_try
    patch.setattr(ClientCore, "_on_try", on_try)
    listening(patch, faults.block_sockets, listens_at_most=0, transport="auto")


def waiting_call_not_answered(patch: pytest.MonkeyPatch) -> None:
    """A poke does not end the wait of a call."""

    def notify(self: PolledSession, version: int | None, frame: bytes) -> bool:
        return not self.is_awaited and real(self, version, frame)

    real = PolledSession.notify
    patch.setattr(PolledSession, "notify", notify)
    only(patch, poll_share=1.0)


def pull_waits_without_a_look(patch: pytest.MonkeyPatch) -> None:
    """A pull waits for a poke although something new is there."""

    async def read_when_new(self: PolledSession, wait_s: float, *given: Any) -> Any:
        _, read, _ = given
        await self.fetch(wait_s)
        self.abort()
        return await read()

    patch.setattr(PolledSession, "read_when_new", read_when_new)
    only(patch, callers=3)


def waiting_pulls_unverified(patch: pytest.MonkeyPatch) -> None:
    """A pull that waits for a poke believes that it will come."""

    async def read_when_new(self: PolledSession, wait_s: float, *given: Any) -> Any:
        _, read, is_news = given
        return await real(self, wait_s, wait_s, read, is_news)

    real = PolledSession.read_when_new
    patch.setattr(PolledSession, "read_when_new", read_when_new)
    only(patch, faults.break_route, faults.demote_server, faults.lose_broker, callers=3)


def gathering(patch: pytest.MonkeyPatch, *wanted: Fault) -> None:
    """Let many clients listen to groups, each of which has large audiences."""
    listening(patch, *wanted, listen_share=0.9, large_audience=2, audience_pulls_per_s=10.0)


def only_one_slice_poked(patch: pytest.MonkeyPatch) -> None:
    """Of a large audience the first few are poked, and the others forgotten."""

    def do(self: Walks, sessions: Collection[Listener], act: Callable[[Listener], object]) -> None:
        real(self, list(sessions)[:2], act)

    real = Walks.do
    patch.setattr(Walks, "do", do)
    gathering(patch)


def owed_poke_forgotten(patch: pytest.MonkeyPatch) -> None:
    """What is published while a large audience pulls is not poked for."""

    def end(self: Audiences, recipient: str) -> None:
        del self._poked[recipient]

    patch.setattr(Audiences, "_end", end)
    gathering(patch)


PLANTS: list[tuple[Plant, str]] = [
    (ack_before_the_pull, "no message lost or doubled"),
    (ack_sent_once, "all recovers"),
    (device_of_an_ack_ignored, "no message lost or doubled"),
    (break_before_make, "no silence"),
    (ready_before_live, "ready only when live"),
    (no_gap_poke, "no silence"),
    (fenceless_leader, "epochs only grow"),
    (poke_before_commit, "no silence"),
    (overflow_forgotten, "no silence"),
    (queue_for_a_slow_reader, "a slow reader costs O(1)"),
    (stale_disconnect_evicts, "no silence"),
    (no_sweep, "no silence"),
    (owners_only, "all recovers"),
    (untagged_unheard, "ready only when live"),
    (gap_forgotten_at_retiring, "no silence"),
    (confirmed_unpublished, "no silence"),
    (no_verification, "no silence"),
    (unversioned_pokes_believed, "no silence"),
    (generation_at_the_restored_head, "no version twice"),
    (deaf_instance_keeps_shards, "a deaf instance lets go"),
    (deaf_instance_keeps_sessions, "a deaf instance lets go"),
    (deaf_to_some_shards_is_well, "a deaf instance lets go"),
    (holes_unnoticed, "a hole is a gap"),
    (forged_versions_believed, "no silence"),
    (poison_ends_the_reader, "no error goes uncaught"),
    (invalid_entry_blocks_the_sweep, "no silence"),
    (batch_not_split, "no silence"),
    (too_large_not_halved, "no silence"),
    (gap_forgets_disconnects, "a disconnect reaches every session"),
    (revocations_unread, "a disconnect reaches every session"),
    (young_generation_deletes, "no message lost or doubled"),
    (listening_before_live, "ready only when live"),
    (gap_wakes_no_listener, "no silence"),
    (listeners_unverified, "no silence"),
    (lost_socket_not_told, "no silence"),
    (switch_forgets_the_cursor, "no message lost or doubled"),
    (waiting_call_not_answered, "no silence"),
    (pull_waits_without_a_look, "no silence"),
    (waiting_pulls_unverified, "no silence"),
    (only_one_slice_poked, "no silence"),
    (owed_poke_forgotten, "no silence"),
]
"""Each bug, and the invariant that it breaks."""

FIRST = {
    "holes_unnoticed": 17,
    "no_sweep": 12,
    "owners_only": 3,  # without further recipients and silent clients
    "unversioned_pokes_believed": 32,
    "overflow_forgotten": 64,
    "gap_forgotten_at_retiring": 54,
    "deaf_to_some_shards_is_well": 84,
    "forged_versions_believed": 31,
    "invalid_entry_blocks_the_sweep": 67,
    "gap_forgets_disconnects": 39,
    "young_generation_deletes": 21,
    "listeners_unverified": 9,
    "confirmed_unpublished": 8,
    "deaf_instance_keeps_sessions": 3,
    "stale_disconnect_evicts": 1,
}
"""Which seed to try first. It saves time: from another seed on all are tried as well."""


@pytest.mark.parametrize(("plant", "breaks"), PLANTS, ids=[each.__name__ for each, _ in PLANTS])
def test_a_planted_bug_is_caught(
    plant: Plant, breaks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of the seeds that pass with the real code fail with the bug, for the right reason."""
    plant(monkeypatch)
    first = FIRST.get(plant.__name__, 0)
    for seed in (*range(first, SEEDS), *range(first)):
        violation = simulate(seed).violation
        if violation is not None:
            assert violation.invariant == breaks, violation
            return
    pytest.fail(f"not caught in {SEEDS} seeds")
