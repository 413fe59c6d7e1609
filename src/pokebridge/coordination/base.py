"""The coordination port: members with leases, one document changed by compare-and-swap, a leader.

The port is small, so that any store with a clock and a compare-and-swap can implement it. No poke
depends on it: while the store is unavailable the last shard map stays in force, and every instance
still serves the shards of its own sessions (ARCHITECTURE.md, "What an instance subscribes to").
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """One worker process of a member."""

    number: int
    """From 1. A process that replaces a dead one has the same number."""
    sessions: int = 0
    """Number of open sessions."""
    starts: int = 0
    """Number of processes that have had this number, the present one included."""
    memory_bytes: int = 0
    """Resident memory."""


@dataclass(frozen=True, slots=True)
class Report:
    """A member's state as of its last renewal. Used for display only, never for decisions."""

    epoch: int = 0
    """The epoch of the shard map that the member has applied."""
    settled: bool = True
    """Whether the member holds exactly what that map asks for, and all of it is proven live."""
    subscriptions: int = 0
    """Number of the member's subscriptions on the transport."""
    interest: tuple[int, ...] = ()
    """The shards of its sessions."""
    messages_per_s: float = 0.0
    """Signals received per second."""
    owned_per_s: float = 0.0
    """Signals received per second for shards that the member owns."""
    pokes_per_s: float = 0.0
    """Poke frames sent to clients per second."""
    noise_ratio: float = 0.0
    """Share of the CPU time that went into pokes for sessions of other instances, 0 to 1."""
    untagged_share: float = 0.0
    """Share of the received signals that were published without a shard, 0 to 1."""
    gaps: int = 0
    """Number of gaps since the member's start."""
    lost: int = 0
    """Number of lost pokes that verification has sent again since the member's start."""
    doubt_s: float = 0.0
    """Seconds since the member's start in which pokes for its sessions may have been lost."""
    pulls_per_s: float = 0.0
    """Pulls answered per second."""
    pull_p99_ms: float = 0.0
    """99th percentile of the time to answer a pull, in milliseconds."""
    cpu_share: float = 0.0
    """CPU time used divided by time passed. 1 means one core."""
    memory_bytes: int = 0
    """Resident memory, that of its workers included."""
    workers: tuple[WorkerLoad, ...] = ()
    """Its worker processes; empty where one process does everything."""
    version: str = ""
    """The release that it runs; empty when it is too old to say."""


@dataclass(frozen=True, slots=True)
class Member:
    """An instance as the other instances see it. The store keeps the lease beside this record."""

    id: str
    """Letters, digits, ``-`` and ``_``, since stores use it in keys."""
    url: str
    """Where clients reach the member; empty when they can't."""
    incarnation: str
    """Different at each start, also for the same ``id``."""
    weight: float
    """Its share of the shards, relative to the other members."""
    joined_at_ms: int
    """Unix time by the member's own clock. For display only."""
    sessions: int = 0
    """Number of open sessions."""
    state: str = "active"
    """``active``, ``draining``, or ``deaf`` while its transport fails."""
    report: Report = Report()
    """For display only."""

    @property
    def standing(self) -> tuple[object, ...]:
        """The fields that plans depend on. When they change, the cluster changes."""
        return self.id, self.incarnation, self.url, self.weight, self.state


@dataclass(frozen=True, slots=True)
class Document:
    """The shared document. Its ``revision`` changes with every write."""

    body: bytes
    revision: int


class Coordination(Protocol):
    """The store through which the members of one cluster coordinate.

    ``pokebridge.testing.coordination.CoordinationContract`` checks this for every adapter:

    - **Members**: a member is listed while its lease lasts. After that it is no longer listed, at
      the latest one further lease length later. The store's clock, or the reader's monotonic
      clock, times the leases. The clocks of two machines are never compared.
    - **Document**: of several writers that saw the same revision, exactly one succeeds. Every later
      ``read`` returns what was written, or something newer.
    - **Leader**: as long as clocks run at about the same rate, at most one holder at a time
      believes, by its own clock, that its lease lasts. This is not a fence. A leader acts through
      ``write``, which refuses an outdated revision.
    - **Errors**: while the store is unavailable, every call raises
      :class:`~pokebridge.errors.CoordinationError` in bounded time. Once the store is available,
      calls succeed again without further action.
    """

    is_shared: bool
    """Whether instances in other processes meet here."""
    is_static: bool
    """Whether the members, the owners and the mode are settings, which nobody can change here."""

    async def renew(self, member: Member, lease_s: float) -> None:
        """Store ``member``'s record, with a lease of ``lease_s`` seconds from now."""

    async def leave(self, member_id: str, incarnation: str) -> None:
        """End the lease at once. Does nothing when another incarnation has taken over."""

    async def members(self) -> list[Member]:
        """Return the members whose lease lasts, ordered by id."""

    async def read(self) -> Document | None:
        """Return the shared document; ``None`` when there is none yet."""

    async def write(self, body: bytes, revision: int | None) -> bool:
        """Replace the document if its revision is ``revision`` (``None``: if there is none yet)."""

    async def lead(self, holder: str, lease_s: float) -> bool:
        """Lead, or go on leading, for ``lease_s`` seconds. False when another holder leads."""

    async def resign(self, holder: str) -> None:
        """Stop leading, if ``holder`` leads."""

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return when the document or a member's standing may have changed, or after ``timeout_s``.

        The wait covers all changes since the previous wait on this object returned, or since it was
        created, so none is missed between two waits. A renewal that changes no standing does not
        end a wait, since all members renew all the time. Nor does the end of a lease have to.
        """

    async def close(self) -> None:
        """Close all connections. Leases expire by themselves. Idempotent."""
