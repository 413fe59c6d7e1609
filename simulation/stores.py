"""The coordination store and the mailbox, as processes reach them over a bad network."""

import asyncio
import contextlib
import copy
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

from pokebridge.coordination.base import Document, Member
from pokebridge.errors import CoordinationError, MailboxError
from pokebridge.mailbox.base import PAGE_BYTES, MailboxStats, RecipientStats
from pokebridge.mailbox.memory import MemoryMailbox
from pokebridge.model import Ack, NewMessage, Page, Poke, Receipt
from simulation.loop import VirtualLoop
from simulation.network import Peer, Server
from simulation.trace import Trace

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Written:
    """A write that succeeded."""

    peer: Peer
    known: object
    """What its writer knew when it asked for it (``Store.knowledge_of``)."""
    after: Document


class Store(Server):
    """A coordination store: what it holds, timed by its own clock."""

    def __init__(self, outside: VirtualLoop, rng: Random, trace: Trace) -> None:
        super().__init__(outside, "store", CoordinationError, rng, trace)
        self.late_expiry = False
        """Whether leases of members are noticed to be over as late as the port allows."""
        self.on_members: Callable[[Peer, Sequence[Member]], None] = lambda _peer, _members: None
        self.on_written: Callable[[Written], None] = lambda _written: None
        self.on_writes: Callable[[Peer], bool] = lambda _peer: False
        """Told that a process is about to write; whether that is to wait a moment."""
        self.knowledge_of: Callable[[Peer], object] = lambda _peer: None
        """Asked when a process asks for a write, which may be carried out much later."""
        self.losses = 0
        self._members: dict[str, tuple[Member, float]] = {}
        self._document: Document | None = None
        self._leader: tuple[str, float] | None = None
        self._revision = 0
        self.changes = 0
        """Grows with whatever a waiting process is to hear of."""
        self._waiting: list[tuple[Peer, asyncio.Future[None]]] = []

    def connect(self, peer: Peer) -> "SimCoordination":
        """The end of ``peer``."""
        return SimCoordination(self, peer)

    def forget_everything(self) -> None:
        """Lose all data, as a store without a disk does when it restarts."""
        self.losses += 1
        self._members.clear()
        self._document = self._leader = None
        self._announce()

    # --- what it does for callers, each at one instant --------------------------------------------

    @property
    def _now(self) -> float:
        return self.outside.scheduler.now

    def renew(self, member: Member, lease_s: float) -> None:
        """See the port."""
        if self.late_expiry:
            lease_s *= 1 + self.rng.random()
        known = self._members.get(member.id)
        self._members[member.id] = (member, self._now + lease_s)
        if known is None or known[0].standing != member.standing:
            self._announce()

    def leave(self, member_id: str, incarnation: str) -> None:
        """See the port."""
        known = self._members.get(member_id)
        if known is not None and known[0].incarnation == incarnation:
            del self._members[member_id]
            self._announce()

    def members(self) -> list[Member]:
        """See the port."""
        now = self._now
        self._members = {key: held for key, held in self._members.items() if held[1] > now}
        return [member for _, (member, _) in sorted(self._members.items())]

    def read(self) -> Document | None:
        """See the port."""
        return self._document

    def write(self, peer: Peer, body: bytes, revision: int | None, known: object) -> bool:
        """See the port."""
        before = self._document
        if revision != (None if before is None else before.revision):
            return False
        self._revision += 1
        self._document = Document(body, self._revision)
        self.on_written(Written(peer, known, self._document))
        self._announce()
        return True

    def lead(self, holder: str, lease_s: float) -> bool:
        """See the port."""
        leader, now = self._leader, self._now
        if leader is not None and leader[0] != holder and leader[1] > now:
            return False
        self._leader = (holder, now + lease_s)
        return True

    def resign(self, holder: str) -> None:
        """See the port."""
        if self._leader is not None and self._leader[0] == holder:
            self._leader = None

    # --- changes ----------------------------------------------------------------------------------

    def watch(self, peer: Peer) -> asyncio.Future[None]:
        """Done a little after the next change, or never, since a watch may miss a change."""
        changed: asyncio.Future[None] = peer.loop.create_future()
        self._waiting.append((peer, changed))
        return changed

    def _announce(self) -> None:
        self.changes += 1
        waiting, self._waiting = self._waiting, []
        for peer, changed in waiting:
            if self.is_reached_by(peer):
                peer.loop.deliver(self.latency_s(), _wake, changed)


def _wake(changed: asyncio.Future[None]) -> None:
    if not changed.done():
        changed.set_result(None)


class SimCoordination:
    """One process's end of the store."""

    is_shared = True
    is_static = False

    def __init__(self, store: Store, peer: Peer) -> None:
        self._store = store
        self._peer = peer
        self._noticed = store.changes
        self._read_members: Sequence[Member] | None = None
        self._closed = False

    async def renew(self, member: Member, lease_s: float) -> None:
        """See the port."""
        await self._call(lambda: self._store.renew(member, lease_s))

    async def leave(self, member_id: str, incarnation: str) -> None:
        """See the port."""
        await self._call(lambda: self._store.leave(member_id, incarnation))

    async def members(self) -> list[Member]:
        """See the port."""
        members = self._read_members = await self._call(self._store.members)
        return members

    async def read(self) -> Document | None:
        """See the port."""
        stored = await self._call(self._store.read)
        if self._read_members is not None:  # from here on its process takes them in
            self._store.on_members(self._peer, self._read_members)
            self._read_members = None
        return stored

    async def write(self, body: bytes, revision: int | None) -> bool:
        """See the port."""
        known = self._store.knowledge_of(self._peer)
        if self._store.on_writes(self._peer):
            await asyncio.sleep(0)
        return await self._call(lambda: self._store.write(self._peer, body, revision, known))

    async def lead(self, holder: str, lease_s: float) -> bool:
        """See the port."""
        return await self._call(lambda: self._store.lead(holder, lease_s))

    async def resign(self, holder: str) -> None:
        """See the port."""
        await self._call(lambda: self._store.resign(holder))

    async def wait_for_change(self, timeout_s: float) -> None:
        """See the port."""
        self._check_open()
        store = self._store
        if store.changes == self._noticed or not store.is_reached_by(self._peer):
            changed = store.watch(self._peer)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await changed
        else:
            await asyncio.sleep(store.latency_s())
        self._noticed = store.changes

    async def close(self) -> None:
        """See the port."""
        self._closed = True

    async def _call(self, operation: Callable[[], T]) -> T:
        self._check_open()
        return await self._store.call(self._peer, operation)

    def _check_open(self) -> None:
        if self._closed:
            raise CoordinationError("the simulated store is closed")


class RestorableMailbox(MemoryMailbox):
    """A mailbox that can go back in time; then a new generation begins, as in PostgreSQL."""

    _STATE = ("_logs", "_receipts", "_outbox", "_expiries", "_seen_ms")

    def snapshot(self) -> Mapping[str, Any]:
        """A copy of all that it holds."""
        return {name: copy.deepcopy(getattr(self, name)) for name in self._STATE}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go back to a copy, and begin a new generation."""
        for name, value in snapshot.items():
            setattr(self, name, value)
        at_once(self.begin_generation())

    def spoil_outbox(self) -> None:
        """Put an entry that nobody can publish into the outbox, as another program might."""
        self._outbox["urn:user:jos\u00e9"] = (1, 0)

    def acked(self, recipient: str, device: str) -> int:
        """The version that a device has acked; 0 if it has acked nothing."""
        log = self._logs.get(recipient)
        return 0 if log is None else log.acked.get(device, 0)

    def newest(self) -> Mapping[str, int]:
        """The newest version of every recipient."""
        return {recipient: log.head for recipient, log in self._logs.items()}


class Post(Server):
    """All mailboxes: the in-process one, at the other end of a network."""

    def __init__(
        self,
        outside: VirtualLoop,
        rng: Random,
        trace: Trace,
        mailbox: RestorableMailbox | None = None,
    ) -> None:
        super().__init__(outside, "mailbox", MailboxError, rng, trace)
        self.mailbox = mailbox or RestorableMailbox(outside.wall)
        self.restoring = False
        """Whether a backup is made that it will go back to."""
        self.on_committed: Callable[[Peer, NewMessage, Receipt], None] = lambda *_: None

    def connect(self, peer: Peer) -> "SimMailbox":
        """The end of ``peer``."""
        return SimMailbox(self, peer)

    def append(self, peer: Peer, message: NewMessage) -> Receipt:
        """See the port."""
        receipt = at_once(self.mailbox.append(message))
        if not receipt.duplicate:
            self.on_committed(peer, message, receipt)
        return receipt


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise AssertionError("it waits")


class SimMailbox:
    """One process's end of the mailboxes."""

    is_shared = True

    def __init__(self, post: Post, peer: Peer) -> None:
        self._post = post
        self._peer = peer
        self._closed = False

    async def append(self, message: NewMessage) -> Receipt:
        """See the port."""
        return await self._at_the_post(lambda: self._post.append(self._peer, message))

    async def read(
        self,
        recipient: str,
        *,
        after: int,
        limit: int,
        max_bytes: int = PAGE_BYTES,
        unless_head: int | None = None,
    ) -> Page:
        """See the port."""
        return await self._call(
            lambda kept: kept.read(
                recipient, after=after, limit=limit, max_bytes=max_bytes, unless_head=unless_head
            )
        )

    async def heads(self, recipients: Sequence[str]) -> Mapping[str, int]:
        """See the port."""
        return await self._call(lambda kept: kept.heads(recipients))

    async def see_device(self, recipient: str, device: str) -> None:
        """See the port."""
        await self._call(lambda kept: kept.see_device(recipient, device))

    async def ack(self, recipient: str, device: str, version: int) -> None:
        """See the port."""
        await self._call(lambda kept: kept.ack(recipient, device, version))

    async def ack_all(self, acks: Sequence[Ack]) -> None:
        """See the port."""
        await self._call(lambda kept: kept.ack_all(acks))

    async def claim_outbox(self, *, older_than_s: float, limit: int) -> Sequence[Poke]:
        """See the port."""
        return await self._call(
            lambda kept: kept.claim_outbox(older_than_s=older_than_s, limit=limit)
        )

    async def confirm_outbox(self, pokes: Sequence[Poke]) -> None:
        """See the port."""
        await self._call(lambda kept: kept.confirm_outbox(pokes))

    async def purge(self, *, limit: int) -> int:
        """See the port."""
        return await self._call(lambda kept: kept.purge(limit=limit))

    async def clear(self, recipient: str) -> int:
        """See the port."""
        return await self._call(lambda kept: kept.clear(recipient))

    async def begin_generation(self) -> int:
        """See the port."""
        return await self._call(lambda kept: kept.begin_generation())

    async def stats(self) -> MailboxStats:
        """See the port."""
        return await self._call(lambda kept: kept.stats())

    async def inspect(self, recipient: str) -> RecipientStats:
        """See the port."""
        return await self._call(lambda kept: kept.inspect(recipient))

    async def check(self) -> None:
        """See the port."""
        await self._call(lambda kept: kept.check())

    async def close(self) -> None:
        """See the port."""
        self._closed = True

    async def _call(self, work: Callable[[MemoryMailbox], Coroutine[Any, Any, T]]) -> T:
        return await self._at_the_post(lambda: at_once(work(self._post.mailbox)))

    async def _at_the_post(self, operation: Callable[[], T]) -> T:
        if self._closed:
            raise MailboxError("the simulated mailbox is closed")
        return await self._post.call(self._peer, operation)
