"""The events that instances must notice by themselves, and the oracle that checks whether they do.

The broker shows the oracle every signal that it delivers. So the oracle knows which beacons an
instance has not heard, and which disconnects.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple, Protocol

from pokebridge.errors import SignalError
from pokebridge.wire import Beacon, Disconnect, decode_signal
from simulation.network import Peer, Trouble
from simulation.scene import Scene

HOLE_BOUND_S: Final = 18.0
"""How long after a later beacon a missing one is a gap: 1 s to arrive late, at most one gap in
10 s, and two steps, each of which may wait for a publish."""
DISCONNECT_BOUND_S: Final = 15.0
"""After a gap an instance asks for disconnects at once and 10 s later. An answer takes 1 s."""
REVOCATION_BOUND_S: Final = 10.0
"""Revocations are read from the mailbox every 7.5 s at the latest."""


class Witness(Protocol):
    """What is to be known of an instance."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def gaps(self) -> int:
        """How many gaps it has noticed."""

    @property
    def serves(self) -> bool:
        """Whether it takes clients, and is not to stop."""

    @property
    def hears_since(self) -> float:
        """Since when it hears the broker and has no other trouble; infinity while it does not."""

    @property
    def trouble(self) -> Trouble:
        """Trouble of the process, or of its way to the mailbox."""


class Connected(Protocol):
    """What is to be known of a client with a session."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def recipient(self) -> str:
        """Whose client it is."""

    @property
    def instance(self) -> Any:
        """The instance that its socket is connected to."""

    @property
    def session(self) -> object:
        """Another object for each session of it; ``None`` while it has none."""

    @property
    def trouble(self) -> Trouble:
        """The trouble of the client itself."""


class _Hole(NamedTuple):
    """Beacons of ``sender`` that ``peer`` has not heard, and what it had noticed by then."""

    peer: Witness
    sender: str
    numbers: set[int]
    missing: range
    gaps: int
    since_s: float


class _Session(NamedTuple):
    """A session that is to end."""

    client: Connected
    session: object
    at_s: float
    revoked: bool
    restores: int
    """How often the mailbox had gone back in time."""


class WitnessOracle:
    """Checks that missing beacons are a gap, and that disconnects reach every session.

    Args:
        scene: the surroundings.
        fail: called with an invariant that did not hold, and with the details.
    """

    def __init__(self, scene: Scene, fail: Callable[[str, str], None]) -> None:
        self._scene = scene
        self._fail = fail
        # The numbers of the beacons that each instance has heard, by sender and incarnation.
        self._numbers: dict[tuple[Peer, str, str], set[int]] = {}
        # Which instances know of a disconnect of a recipient, and since when.
        self._knowing: dict[str, dict[Witness, float]] = {}
        self.restores = 0
        """How often the mailbox went back in time."""

    @property
    def _now(self) -> float:
        return self._scene.scheduler.now

    def heard(self, peer: Any, body: bytes) -> None:
        """The broker has delivered a signal to the process ``peer``."""
        try:
            content = decode_signal(body)
        except SignalError:
            return
        if isinstance(content, Beacon) and content.sender != peer.name:
            self._note_beacon(peer, content)
        elif isinstance(content, Disconnect):
            self._knowing.setdefault(content.recipient, {})[peer] = self._now

    # --- beacons ----------------------------------------------------------------------------------

    def _note_beacon(self, peer: Any, beacon: Beacon) -> None:
        numbers = self._numbers.setdefault((peer, beacon.sender, beacon.incarnation), set())
        newest = max(numbers, default=beacon.number)
        numbers.add(beacon.number)
        if missing := range(newest + 1, beacon.number):
            look = self._scene.outside.deliver
            hole = _Hole(peer, beacon.sender, numbers, missing, peer.gaps, self._now)
            look(HOLE_BOUND_S, self._look_for_gap, hole)

    def _look_for_gap(self, hole: _Hole) -> None:
        peer = hole.peer
        has_stood_still = not peer.serves or peer.trouble.over_at >= hole.since_s
        still_missing = [each for each in hole.missing if each not in hole.numbers]
        if still_missing and peer.gaps == hole.gaps and not has_stood_still:
            self._fail(
                "a hole is a gap",
                f"{peer.name} has noticed none since {hole.since_s:.3f}, when the beacons"
                f" {still_missing} of {hole.sender} were missing",
            )

    # --- disconnects ------------------------------------------------------------------------------

    def disconnected(
        self, through: Witness, sessions: Iterable[tuple[Connected, object]], *, revoked: bool
    ) -> None:
        """``through`` has confirmed to an administrator that it ends ``sessions``.

        They are the clients that were ready when it was asked, and their sessions then.
        """
        for client, its in sessions:
            self._knowing.setdefault(client.recipient, {})[through] = self._now
            session = _Session(client, its, self._now, revoked, self.restores)
            bound_s = REVOCATION_BOUND_S if revoked else DISCONNECT_BOUND_S
            self._scene.outside.deliver(bound_s, self._look_at, session)

    def _look_at(self, session: _Session) -> None:
        client = session.client
        if client.session is not session.session or client.session is None:
            return
        due_at = self._due_at(session)
        if due_at is None:
            return
        if self._now < due_at:
            again_s = min(due_at - self._now, DISCONNECT_BOUND_S)
            self._scene.outside.deliver(again_s, self._look_at, session)
            return
        self._fail(
            "a disconnect reaches every session",
            f"{client.name} on {client.instance.name} still has the session that was to end at"
            f" {session.at_s:.3f}",
        )

    def _due_at(self, session: _Session) -> float | None:
        """When ``session`` must have ended; ``None`` when nobody can know any more."""
        scene, client = self._scene, session.client
        instance: Witness = client.instance
        at_s = max(session.at_s, client.trouble.over_at)
        if session.revoked and session.restores == self.restores:
            written_at = max(at_s, instance.trouble.over_at, scene.post.trouble.over_at)
            return written_at + REVOCATION_BOUND_S
        knowing: Sequence[float] = [
            each.hears_since
            for each, since_s in self._knowing[client.recipient].items()
            if since_s >= session.at_s and each.serves
        ]
        if not knowing:
            return None
        engine_at = max(scene.broker.trouble.over_at, scene.broker.servers.lies.over_at)
        return max(at_s, instance.hears_since, min(knowing), engine_at) + DISCONNECT_BOUND_S
