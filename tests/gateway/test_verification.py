"""Verification: whoever is behind the mailbox is poked in time, whatever the transport lost."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pokebridge.errors import MailboxError
from pokebridge.gateway.verification import DOUBT_EVERY_S, GRACE_S, STEP_S, Verification

EVERY_S = 60.0


@dataclass
class Session:
    """What the verification knows of a socket, and the pokes that it was given."""

    recipient: str
    told: int = 0
    is_open: bool = True
    is_closed: bool = False
    pokes: list[int | None] = field(default_factory=list)

    def notify(self, version: int | None, frame: bytes) -> bool:
        """Note the poke."""
        assert frame
        self.pokes.append(version)
        self.told = version or 0
        return True


class Mailbox:
    """The heads, and whether it answers."""

    def __init__(self, **heads: int) -> None:
        self.newest = heads
        self.is_away = False
        self.asked: list[int] = []

    async def heads(self, recipients: Sequence[str]) -> Mapping[str, int]:
        """Look each up."""
        if self.is_away:
            raise MailboxError("away")
        self.asked.append(len(recipients))
        return {each: self.newest.get(each, 0) for each in recipients}


async def run(verification: Verification, until_s: float, *, in_doubt: bool = False) -> None:
    """Let a second pass after the other."""
    for second in range(int(until_s) + 1):
        await verification.step(float(second), in_doubt=in_doubt)


async def test_a_lost_poke_is_made_up_for() -> None:
    """A session that was told less than the head is poked with it, and counted as lost."""
    mailbox, session = Mailbox(bob=8), Session("bob", told=7)
    verification = Verification(mailbox.heads, EVERY_S)
    verification.add(session)
    await run(verification, EVERY_S + GRACE_S + 1)
    assert session.pokes == [8]
    assert verification.lost == 1


@pytest.mark.parametrize("every_s", [1.0, 5.0, EVERY_S])
async def test_the_bound_holds_at_its_worst(every_s: float) -> None:
    """Told too little just after its turn, a session is poked within ``every_s`` and the grace."""
    mailbox, session = Mailbox(bob=7), Session("bob", told=7)
    verification = Verification(mailbox.heads, every_s)
    verification.add(session)
    now = 0.0
    while not mailbox.asked:
        await verification.step(now, in_doubt=False)
        now += 1.02  # a step takes a moment too
    mailbox.newest["bob"], told_s = 8, now - 1.02
    while not session.pokes:
        await verification.step(now, in_doubt=False)
        now += 1.02
    assert now - 1.02 - told_s <= every_s + GRACE_S + 1


async def test_sessions_that_are_gone_delay_nobody() -> None:
    """After most sessions have closed, as after a drain, those that are left have their turn."""
    mailbox, session = Mailbox(bob=8), Session("bob", told=7)
    gone = [Session("eve", told=1) for _ in range(1000)]
    verification = Verification(mailbox.heads, EVERY_S)
    for each in [*gone, session]:
        verification.add(each)
    for each in gone:
        each.is_closed = True
    await run(verification, EVERY_S + GRACE_S + 1)
    assert session.pokes == [8]


async def test_a_poke_that_is_only_late_is_not_lost() -> None:
    """A session that is told within the grace gets no second poke and is not counted."""
    mailbox, session = Mailbox(bob=8), Session("bob", told=7)
    verification = Verification(mailbox.heads, every_s=1.0)
    verification.add(session)
    for now in (0.0, 1.0):
        await verification.step(now, in_doubt=False)
    session.told = 8
    await run(verification, EVERY_S)
    assert session.pokes == []
    assert verification.lost == 0


async def test_a_poke_that_is_merged_for_a_while_is_not_lost() -> None:
    """Verification skips a session while the pokes to its audience are still going out."""
    mailbox, session, busy = Mailbox(bob=8), Session("bob", told=7), {"bob"}
    verification = Verification(mailbox.heads, EVERY_S, busy.__contains__)
    verification.add(session)
    await run(verification, EVERY_S + GRACE_S + 1)
    assert session.pokes == []
    assert verification.lost == 0
    busy.clear()
    for second in range(int(EVERY_S), int(2 * EVERY_S + 2 * GRACE_S)):
        await verification.step(float(second), in_doubt=False)
    assert session.pokes == [8]
    assert verification.lost == 1


async def test_an_unknown_state_is_no_loss() -> None:
    """A session that was never poked with a version gets the head once, and is not counted."""
    mailbox, session = Mailbox(bob=8), Session("bob")
    verification = Verification(mailbox.heads, EVERY_S)
    verification.add(session)
    await run(verification, 3 * EVERY_S)
    assert session.pokes == [8]
    assert verification.lost == 0


async def test_a_version_that_nobody_has_committed_blinds_it_no_longer_than_once() -> None:
    """Anybody may publish a poke with a version above the head: it is not believed."""
    mailbox, session = Mailbox(bob=8), Session("bob", told=2**53 - 1)
    verification = Verification(mailbox.heads, EVERY_S)
    verification.add(session)
    await run(verification, EVERY_S)
    assert session.pokes == [None]
    mailbox.newest["bob"] = 9
    await run(verification, EVERY_S)
    assert session.pokes == [None, 9]
    assert verification.lost == 0


async def test_an_empty_mailbox_pokes_nobody() -> None:
    """Who never had a message is left asleep."""
    session = Session("bob")
    verification = Verification(Mailbox().heads, EVERY_S)
    verification.add(session)
    await run(verification, 2 * EVERY_S)
    assert session.pokes == []


@given(st.integers(1, 2500))
async def test_everyone_has_a_turn_within_the_interval(count: int) -> None:
    """However many there are, each is looked up once an interval, a slice of them a second."""
    round_s = EVERY_S - 2 * STEP_S
    mailbox = Mailbox()
    verification = Verification(mailbox.heads, EVERY_S)
    for n in range(count):
        verification.add(Session(f"r{n}"))
    await run(verification, round_s)
    assert count - 1 <= sum(mailbox.asked) <= count + 1
    assert max(mailbox.asked) <= -(-count // round_s) + 1


async def test_doubt_quickens_it() -> None:
    """While the transport is in doubt everyone has a turn every few seconds."""
    session = Session("bob", told=7)
    verification = Verification(Mailbox(bob=8).heads, EVERY_S)
    verification.add(session)
    await run(verification, DOUBT_EVERY_S + GRACE_S + 1, in_doubt=True)
    assert session.pokes == [8]


async def test_a_mailbox_that_is_away_costs_nobody_a_turn() -> None:
    """Sessions whose look-up failed are first in line when the mailbox is back."""
    mailbox, session = Mailbox(bob=8), Session("bob", told=7)
    verification = Verification(mailbox.heads, EVERY_S)
    verification.add(session)
    mailbox.is_away = True
    await run(verification, 2 * EVERY_S)
    assert verification.is_blind
    mailbox.is_away = False
    for now in (2 * EVERY_S + 1, 2 * EVERY_S + 2 + GRACE_S):
        await verification.step(now, in_doubt=False)
    assert not verification.is_blind
    assert session.pokes == [8]


@pytest.mark.parametrize("error", [asyncio.CancelledError, RuntimeError])
async def test_an_unforeseen_error_costs_nobody_the_verification(
    error: type[BaseException],
) -> None:
    """A defect, or a driver that cancels what it waits for: the session is verified afterwards."""
    mailbox, session = Mailbox(bob=8), Session("bob", told=7)
    failures = [error()]

    async def heads(recipients: Sequence[str]) -> Mapping[str, int]:
        if failures:
            raise failures.pop()
        return await mailbox.heads(recipients)

    verification = Verification(heads, EVERY_S)
    verification.add(session)
    with pytest.raises(error):
        await run(verification, EVERY_S)
    await run(verification, EVERY_S + GRACE_S + 1)
    assert session.pokes == [8]


async def test_sessions_that_are_gone_are_forgotten() -> None:
    """A closed session is dropped at its turn; one that is not open yet waits for the next."""
    mailbox = Mailbox(bob=8, eve=8)
    gone, waiting = Session("bob", is_closed=True, is_open=False), Session("eve", is_open=False)
    verification = Verification(mailbox.heads, EVERY_S)
    verification.add(gone)
    verification.add(waiting)
    await run(verification, EVERY_S)
    waiting.is_open = True
    await run(verification, 2 * EVERY_S)
    assert (gone.pokes, waiting.pokes) == ([], [8])
