"""The session's state machine, on a clock that the test holds."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pokebridge.framing import Opcode
from pokebridge.session import ListenedRecipient, Session, State, Timing
from pokebridge.wire import PING_CONTROL_FRAME, address_poke, poke_frame

TIMING = Timing()


def make(*, expires_at: float = 1000.0, opened: bool = True) -> Session:
    """A session that began at 0 and, unless told otherwise, is open."""
    session = Session("urn:user:bob", "default", "s1", expires_at=expires_at, now=0, timing=TIMING)
    if opened:
        session.open(instance="i", now=0, first_ping_s=TIMING.ping_interval_s)
    return session


def text(frame: bytes) -> Any:
    """The JSON of a short text frame."""
    assert frame[0] == 0x80 | Opcode.TEXT
    return json.loads(frame[2:])


def close_code(frame: bytes) -> int:
    """The code of a close frame."""
    assert frame[0] == 0x80 | Opcode.CLOSE
    return int.from_bytes(frame[2:4], "big")


def test_ready_is_first_and_tells_when_the_token_runs_out() -> None:
    """Opening yields ``ready`` with the session, the instance and the token's time left."""
    session = make(opened=False, expires_at=900.5)
    ready = text(session.open(instance="i-1", now=1, first_ping_s=25))
    assert ready == {"type": "ready", "session": "s1", "instance": "i-1", "expires_in": 899}
    assert session.state is State.OPEN


def test_a_poke_before_ready_is_absorbed() -> None:
    """The pull that ``ready`` causes sees what came before it, so no second one is asked for."""
    session = make(opened=False)
    assert not session.poke(3)
    session.open(instance="i", now=0, first_ping_s=25)
    assert session.drain(1) == b""


def test_a_poke_is_written_while_the_peer_reads() -> None:
    """An open session whose peer keeps up sends every poke at once."""
    session = make()
    assert session.poke(1)
    assert session.poke(2)


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ([1, 2, 3], {"type": "poke", "version": 3}),
        ([3, 1], {"type": "poke", "version": 3}),
        ([5, None], {"type": "poke"}),
        ([None, 5], {"type": "poke"}),
        ([7] * 20_000, {"type": "poke", "version": 7}),
    ],
)
def test_a_slow_reader_owes_one_poke(versions: list[int | None], expected: Any) -> None:
    """While blocked all pokes merge into one slot: the newest, or unversioned if any was."""
    session = make()
    session.block(1)
    assert not any(session.poke(version) for version in versions)
    assert text(session.drain(2)) == expected
    assert session.drain(3) == b""


def test_a_silent_session_is_pinged_and_lives_by_its_pongs() -> None:
    """Ping at the interval; a pong sets the next one; no close while pongs come."""
    session = make(expires_at=10_000)
    for round_number in range(1, 4):
        now = session.due_at
        assert now == TIMING.ping_interval_s * round_number + (round_number - 1)
        assert session.tick(now) == PING_CONTROL_FRAME
        session.pong(now + 1)
    assert session.state is State.OPEN


def test_no_pong_closes() -> None:
    """A ping unanswered for the pong timeout closes, and soon after drops, the session."""
    session = make()
    assert session.tick(25) == PING_CONTROL_FRAME
    assert session.tick(44.9) == b""
    assert close_code(session.tick(45)) == 1011
    assert session.tick(45 + TIMING.close_timeout_s) == b""
    assert session.state is State.CLOSED


def test_a_peer_that_reads_nothing_is_dropped() -> None:
    """Blocked for the pong timeout, the session is over, without another byte written."""
    session = make()
    session.block(3)
    assert session.due_at == 3 + TIMING.pong_timeout_s
    assert session.tick(session.due_at) == b""
    assert session.state is State.CLOSED


def test_slow_is_not_dead() -> None:
    """A peer that drains in time, again and again, is never closed for being slow."""
    session = make(expires_at=10_000)
    for start in range(0, 1000, 20):
        session.block(start)
        assert session.tick(start + 19) == b""
        session.drain(start + 19)
    assert session.state is State.OPEN


def test_blocking_does_not_move_a_pong_deadline() -> None:
    """A ping that is out stays due when the peer stops reading meanwhile."""
    session = make()
    session.tick(25)
    session.block(44)
    assert session.due_at == 45


def test_an_expired_token_closes_4401() -> None:
    """At the token's end the session closes with 4401, whatever else is due."""
    session = make(expires_at=10)
    assert session.due_at == 10
    assert close_code(session.tick(10)) == 4401


def test_a_session_that_has_lasted_its_time_closes_1012() -> None:
    """It ends before the platform would cut it, whatever pongs and tokens arrive."""
    session = Session("b", "d", "s", expires_at=1000, now=0, timing=TIMING, ends_at=60)
    session.open(instance="i", now=0, first_ping_s=TIMING.ping_interval_s)
    session.renew(expires_at=5000, now=10)
    assert session.tick(25) == PING_CONTROL_FRAME
    session.pong(26)
    assert session.tick(session.due_at) == PING_CONTROL_FRAME
    session.pong(52)
    assert session.due_at == 60
    assert close_code(session.tick(60)) == 1012


def test_a_renewed_token_moves_the_end() -> None:
    """After ``auth`` the session lives to the new token's end and says so."""
    session = make(expires_at=10)
    assert text(session.renew(expires_at=910, now=5)) == {"type": "auth", "expires_in": 905}
    assert session.tick(10) == b""
    assert session.state is State.OPEN


def test_never_ready_closes_1013() -> None:
    """A subscription that can't be proven live sends the client elsewhere in bounded time."""
    session = make(opened=False)
    assert close_code(session.tick(TIMING.ready_timeout_s)) == 1013


def test_close_is_said_once() -> None:
    """A second close, and a poke after it, write nothing."""
    session = make()
    assert close_code(session.close(1012, "bye", 1)) == 1012
    assert session.close(4409, "again", 2) == b""
    assert not session.poke(1)


def test_a_closed_session_writes_nothing() -> None:
    """Once the socket is closed, no deadline writes anything."""
    session = make()
    session.state = State.CLOSED
    assert session.tick(10_000) == b""


def test_too_many_frames_are_noticed() -> None:
    """A client may send a bounded number of frames between two pings."""
    session = make()
    assert all(session.hear() for _ in range(TIMING.max_messages_per_ping))
    assert not session.hear()
    session.tick(25)
    assert session.hear()


class SlowReader(RuleBasedStateMachine):
    """Whatever the order of pokes, blocks and drains: what the client heard is never too little."""

    def __init__(self) -> None:
        super().__init__()
        self.session = make(expires_at=1e9)
        self.newest = 0
        self.told = 0
        self.blocked = False
        self.now = 0.0

    @rule(step=st.integers(1, 3))
    def poke(self, step: int) -> None:
        """A commit, and its poke."""
        self.newest += step
        if self.session.poke(self.newest):
            self.told = self.newest

    @rule()
    def poke_unversioned(self) -> None:
        """A poke that names no version stands for the newest."""
        if self.session.poke(None):
            self.told = self.newest

    @precondition(lambda self: not self.blocked)
    @rule()
    def block(self) -> None:
        """The peer stops reading."""
        self.session.block(self.now)
        self.blocked = True

    @precondition(lambda self: self.blocked)
    @rule(after_s=st.floats(0.1, 19))
    def drain(self, after_s: float) -> None:
        """The peer reads everything."""
        self.now += after_s
        self.blocked = False
        frame = self.session.drain(self.now)
        if frame:
            self.told = text(frame).get("version", self.newest)

    @invariant()
    def told_unless_blocked(self) -> None:
        """A peer that reads knows of the newest version."""
        if not self.blocked:
            assert self.told == self.newest


TestSlowReader = SlowReader.TestCase


RECIPIENTS = ["urn:doc:1", "urn:doc:2", "urn:doc:3"]


class ManyRecipients(RuleBasedStateMachine):
    """Whatever happens to one recipient: of each that is listened to, the newest version is told.

    ``told`` has, for each recipient that is heard, what its client knows: after ``listening`` it
    pulls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.session = make(expires_at=1e9)
        self.newest = dict.fromkeys(RECIPIENTS, 1)
        self.told: dict[str, int] = {}
        self.blocked = False
        self.now = 0.0

    def heard(self, recipient: str) -> ListenedRecipient | None:
        """What the session listens to."""
        return (self.session.listened or {}).get(recipient)

    def take(self, frame: bytes, recipient: str) -> None:
        """The client reads a frame, which must be about ``recipient``."""
        message = text(frame)
        assert message["recipient"] == recipient
        if message["type"] == "unlistened":
            del self.told[recipient]
        else:
            self.told[recipient] = message.get("version", self.newest[recipient])

    @rule(recipient=st.sampled_from(RECIPIENTS), lives_s=st.floats(1, 60))
    def listen(self, recipient: str, lives_s: float) -> None:
        """A token is accepted: the first, or a newer one."""
        if (heard := self.heard(recipient)) is None:
            expires_at = self.now + lives_s
            ListenedRecipient(self.session, recipient, expires_at=expires_at, now=self.now)
        elif frame := heard.renew(self.now + lives_s, self.now):
            self.take(frame, recipient)

    @rule(recipient=st.sampled_from(RECIPIENTS))
    def become_live(self, recipient: str) -> None:
        """The subscription is proven live. It is said once."""
        heard = self.heard(recipient)
        if heard is not None and (frame := heard.begin(self.now)):
            self.take(frame, recipient)
            assert heard.begin(self.now) == b""

    @rule(recipient=st.sampled_from(RECIPIENTS), names_it=st.booleans())
    def poke(self, recipient: str, names_it: bool) -> None:  # noqa: FBT001 - Hypothesis passes names
        """A commit, and its poke."""
        self.newest[recipient] += 1
        version = self.newest[recipient] if names_it else None
        heard = self.heard(recipient)
        if heard is not None and heard.poke(version):
            self.take(address_poke(poke_frame(version), recipient), recipient)

    @rule(recipient=st.sampled_from(RECIPIENTS), says_so=st.booleans())
    def end(self, recipient: str, says_so: bool) -> None:  # noqa: FBT001 - Hypothesis passes names
        """The client needs it no more, or the server ends it."""
        if (heard := self.heard(recipient)) is not None:
            frame = heard.end(4401, "revoked")
            assert heard.end(4401, "revoked") == b""
            if says_so and recipient in self.told:
                self.take(frame, recipient)
            self.told.pop(recipient, None)

    @rule(after_s=st.floats(0.1, 40))
    def pass_time(self, after_s: float) -> None:
        """Deadlines pass, each at its time."""
        until = self.now + after_s
        while due := [
            each for each in (self.session.listened or {}).values() if each.due_at <= until
        ]:
            first = min(due, key=lambda each: each.due_at)
            self.now = first.due_at
            frame = first.tick(self.now)
            assert text(frame)["code"] in {4401, 1013}
            self.told.pop(first.recipient, None)
        self.now = until

    @rule()
    def block_or_drain(self) -> None:
        """The peer stops reading, or reads everything."""
        if not self.blocked:
            self.session.block(self.now)
        else:
            self.session.drain(self.now)
            frames = self.session.drain_listened()
            assert len(frames) <= len(RECIPIENTS)
            for frame in frames:
                self.take(frame, text(frame)["recipient"])
        self.blocked = not self.blocked

    @invariant()
    def told_unless_blocked(self) -> None:
        """Of each recipient that is heard, a peer that reads knows the newest version."""
        if not self.blocked:
            for recipient, told in self.told.items():
                assert told == self.newest[recipient]

    @invariant()
    def heard_while_said(self) -> None:
        """What the client was told it hears is heard, and the session goes on."""
        assert self.told.keys() <= (self.session.listened or {}).keys()
        assert self.session.state is State.OPEN


TestManyRecipients = ManyRecipients.TestCase


def test_nothing_is_said_of_a_recipient_once_the_session_ends() -> None:
    """While a session closes, events of further recipients write nothing."""
    session = make()
    heard = ListenedRecipient(session, "urn:doc:1", expires_at=50, now=0)
    assert text(heard.begin(1))["type"] == "listening"
    session.close(1012, "bye", 2)
    assert heard.is_closed
    assert not heard.poke(3)
    assert heard.tick(50) == b""
    assert not session.listened


def test_too_many_listens_are_noticed() -> None:
    """Between two pings, twice as many as a session may listen to recipients, and a hundred."""
    timing = Timing(max_listened=10)
    session = Session("b", "d", "s", expires_at=1000, now=0, timing=timing)
    session.open(instance="i", now=0, first_ping_s=25)
    assert all(session.may_listen() for _ in range(120))
    assert not session.may_listen()
    session.tick(25)
    assert session.may_listen()


@given(st.lists(st.floats(0, 100), max_size=40))
def test_time_alone_never_revives_or_floods(steps: list[float]) -> None:
    """Ticking at any times writes at most one frame a tick, and a dead session stays dead."""
    session, now = make(), 0.0
    for step in steps:
        now += step
        before = session.state
        data = session.tick(now)
        assert session.state.value >= before.value
        if before in {State.CLOSING, State.CLOSED}:
            assert data == b""
