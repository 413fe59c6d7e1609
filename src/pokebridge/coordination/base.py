"""The coordination port: members with leases, one document changed by compare-and-swap, a leader.

It is small so that any store with a clock or a compare-and-swap can carry it, and nothing here
needs to be right for a poke to arrive: when the store is gone the last shard map stays in force,
and interest keeps every client served (ARCHITECTURE.md).
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Report:
    """How a member is doing, as of its last renewal: for display, never for decisions."""

    epoch: int = 0
    """The shard map that it has applied."""
    settled: bool = True
    """Whether it holds what that map wants, proven live, and nothing else."""
    subscriptions: int = 0
    interest: tuple[int, ...] = ()
    """The shards of its sessions."""
    messages_per_s: float = 0.0
    owned_per_s: float = 0.0
    """Of them, those for shards that it owns: so each counts for one member alone."""
    pokes_per_s: float = 0.0
    """Poke frames handed to its sockets."""
    noise_ratio: float = 0.0
    untagged_share: float = 0.0
    """Of the signals it received, those without a shard beside them: 0 to 1."""
    gaps: int = 0
    doubt_s: float = 0.0
    """Seconds since its start in which pokes for its sessions may have been lost."""
    pulls_per_s: float = 0.0
    pull_p99_ms: float = 0.0
    """99 of 100 pulls were answered in that time."""
    cpu_share: float = 0.0
    """CPU time used over time passed: 1 is one core."""
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Member:
    """An instance as the others see it. Its lease is the store's business, not this record's.

    ``id`` is of letters, digits, ``-`` and ``_``: stores make keys of it.
    ``incarnation`` differs at every start, also of the same ``id``. ``joined_at_ms`` is Unix time
    by the member's own clock: for display, never for decisions.
    """

    id: str
    url: str
    incarnation: str
    weight: float
    joined_at_ms: int
    sessions: int = 0
    state: str = "active"
    report: Report = Report()

    @property
    def standing(self) -> tuple[object, ...]:
        """What matters to the others' plans: a change of it is a change of the cluster."""
        return self.id, self.incarnation, self.url, self.weight, self.state


@dataclass(frozen=True, slots=True)
class Document:
    """The one shared document and its ``revision``, which changes with every write."""

    body: bytes
    revision: int


class Coordination(Protocol):
    """Where the members of one cluster meet.

    Promises, held by ``pokebridge.testing.CoordinationContract`` against every adapter:

    - **Members**: who renewed its lease within its length is listed; who has not, is not, no later
      than one further lease length. Leases are timed by the store's clock, or by the reader's
      monotonic clock, never by comparing clocks of two machines.
    - **Document**: ``write`` succeeds for exactly one of several writers that saw the same
      revision. What was written is what every later ``read`` returns, or something newer.
    - **Leader**: at any time at most one holder believes, by its own clock, that its lease lasts,
      as long as clocks run at about the same rate. That is no fence: whoever acts as a leader does
      so through ``write``, which refuses a revision that has moved on.
    - **Errors**: every call raises :class:`~pokebridge.errors.CoordinationError` in bounded time
      when the store can't be had, and works again by itself once it can.
    """

    async def renew(self, member: Member, lease_s: float) -> None:
        """Be a member, with this record, for ``lease_s`` seconds from now."""

    async def leave(self, member_id: str, incarnation: str) -> None:
        """Be one no more, at once; nothing happens when another incarnation has taken over."""

    async def members(self) -> list[Member]:
        """Everyone whose lease lasts, by id."""

    async def read(self) -> Document | None:
        """The shared document; ``None`` when there has never been one."""

    async def write(self, body: bytes, revision: int | None) -> bool:
        """Replace the document if it is still at ``revision`` (``None``: if there is none yet)."""

    async def lead(self, holder: str, lease_s: float) -> bool:
        """Become the leader, or stay it, for ``lease_s`` seconds; False when another one is."""

    async def resign(self, holder: str) -> None:
        """Lead no more, if ``holder`` does."""

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return when the document or a member's standing may have changed, or after ``timeout_s``.

        May have changed since the last wait here returned, or since the start, so that nothing is
        missed between two waits. A renewal that changes no standing wakes nobody: N members renew
        all the time. The end of a lease need not wake anybody either: it is nobody's doing.
        """

    async def close(self) -> None:
        """Close what is open. Leases run out by themselves. May be called twice."""
