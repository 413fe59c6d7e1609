"""The contract of every coordination store, as a pytest suite to subclass.

Define a fixture ``connect`` that yields an async function. Each call of it stands for another
process and returns a new adapter to the same store, which is empty at first. The fixture closes the
adapters.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from pokebridge.coordination.base import Coordination, Document, Member, Report
from pokebridge.errors import CoordinationError

Connect = Callable[[], Awaitable[Coordination]]

__all__ = ["CoordinationContract"]

# Long enough for a busy machine to renew in time, short enough to wait for.
LEASE_S = 0.6
TIMEOUT_S = 15.0


def member(name: str, incarnation: str = "1", **more: Any) -> Member:
    """A member's record."""
    return Member(
        id=name,
        url=f"ws://{name}.example",
        incarnation=incarnation,
        weight=more.pop("weight", 1.0),
        joined_at_ms=1_700_000_000_000,
        **more,
    )


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = TIMEOUT_S) -> None:
    """Return once ``condition`` holds; fail after ``timeout_s`` seconds."""
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110 - another process makes it true
            await asyncio.sleep(0.05)


class CoordinationContract:
    """What every store promises (``pokebridge.coordination.base``)."""

    # --- members ----------------------------------------------------------------------------------

    async def test_members_see_each_other_as_they_are(self, connect: Connect) -> None:
        """Others list the whole record of a member, and a renewal updates it."""
        one, two = await connect(), await connect()
        assert await one.members() == []
        report = Report(epoch=7, settled=False, interest=(1, 99), noise_ratio=0.25, gaps=3)
        full = member("b", "é/1", weight=2.5, sessions=7, state="draining", report=report)
        await two.renew(full, 30)
        await one.renew(member("a"), 30)
        assert await two.members() == await one.members() == [member("a"), full]
        await one.renew(member("a", sessions=7), 30)
        assert await two.members() == [member("a", sessions=7), full]

    async def test_many_members_are_listed_by_id(self, connect: Connect) -> None:
        """A hundred members are all listed, in the order of their ids."""
        one, two = await connect(), await connect()
        everyone = [member(f"m-{number:03}") for number in range(100)]
        for each in reversed(everyone):
            await one.renew(each, 30)
        assert await two.members() == everyone

    async def test_a_silent_member_is_gone_after_its_lease(self, connect: Connect) -> None:
        """A member that stops renewing is listed for its lease, and then no longer."""
        one, two = await connect(), await connect()
        await one.renew(member("a"), LEASE_S)
        await two.renew(member("b"), 60)
        started_s = time.monotonic()
        assert member("a") in await two.members()

        async def gone() -> bool:
            return await two.members() == [member("b")]

        await until(gone)
        assert time.monotonic() - started_s >= LEASE_S * 0.8
        assert await (await connect()).members() == [member("b")], "to a newcomer it is gone too"
        await one.renew(member("a"), 60)
        assert await two.members() == [member("a"), member("b")], "and it may come back"

    async def test_the_last_renewal_decides_how_long_a_lease_lasts(self, connect: Connect) -> None:
        """A shorter renewal shortens a lease, and a longer one lengthens it."""
        one, two = await connect(), await connect()
        await one.renew(member("shorter"), 60)
        await one.renew(member("longer"), LEASE_S)
        await one.renew(member("shorter"), LEASE_S)
        await one.renew(member("longer"), 60)

        async def gone() -> bool:
            return await two.members() == [member("longer")]

        await until(gone)

    async def test_a_member_that_renews_stays(self, connect: Connect) -> None:
        """Renewals in time keep a member listed and a leader leading, without a break."""
        one, two = await connect(), await connect()
        until_s = time.monotonic() + 3 * LEASE_S
        checks = 0
        while time.monotonic() < until_s or not checks:
            renewed_s = time.monotonic()
            await one.renew(member("a"), LEASE_S)
            leads = await one.lead("a", LEASE_S)
            listed, other_leads = await two.members(), await two.lead("b", LEASE_S)
            if time.monotonic() - renewed_s < LEASE_S:  # else the machine stalled for that long
                assert (listed, leads, other_leads) == ([member("a")], True, False)
                checks += 1
            else:
                await two.resign("b")
            await asyncio.sleep(LEASE_S / 5)

    async def test_leaving_is_at_once_and_by_incarnation(self, connect: Connect) -> None:
        """A member that leaves is gone; a restarted one is not removed by its former self."""
        one, two = await connect(), await connect()
        await one.renew(member("a", "1"), 60)
        await one.leave("a", "1")
        assert await two.members() == []
        await two.renew(member("a", "2"), 60)
        await one.leave("a", "1")
        assert await one.members() == [member("a", "2")]
        await one.leave("nobody", "1")

    # --- the document -----------------------------------------------------------------------------

    async def test_the_document_changes_by_compare_and_swap(self, connect: Connect) -> None:
        """A write needs the current revision, and a read returns what was written."""
        one, two = await connect(), await connect()
        assert await one.read() is None
        assert not await one.write(b"x", 17)
        assert await one.write(b"", None), "nothing is a document too"
        assert not await two.write(b"other", None)
        first = await two.read()
        assert first is not None
        assert first.body == b""
        assert await two.write(b"\x00\xff" * 50_000, first.revision)
        assert not await one.write(b"late", first.revision)
        second = await one.read()
        assert second == Document(b"\x00\xff" * 50_000, second.revision if second else 0)
        assert second.revision != first.revision

    async def test_of_many_first_writers_one_wins(self, connect: Connect) -> None:
        """Of several processes that found no document, one creates it."""
        ends = [await connect() for _ in range(4)]
        results = await asyncio.gather(
            *(end.write(b"%d" % number, None) for number, end in enumerate(ends))
        )
        assert sum(results) == 1
        document = await ends[0].read()
        assert document is not None
        assert document.body == b"%d" % results.index(True)

    async def test_of_many_writers_one_wins(self, connect: Connect) -> None:
        """Concurrent increments from several processes are never lost and never doubled."""
        ends = [await connect() for _ in range(4)]
        assert await ends[0].write(b"0", None)
        replaced: list[int] = []

        async def increment(end: Coordination) -> None:
            done = 0
            while done < 10:
                document = await end.read()
                assert document is not None
                if await end.write(b"%d" % (int(document.body) + 1), document.revision):
                    replaced.append(document.revision)
                    done += 1

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for end in ends:
                group.create_task(increment(end))
        document = await ends[0].read()
        assert document is not None
        assert document.body == b"40"
        assert len({*replaced, document.revision}) == 41, "each revision is replaced once"

    # --- the leader -------------------------------------------------------------------------------

    async def test_of_many_candidates_one_leads(self, connect: Connect) -> None:
        """One candidate leads and may stay; another follows when it resigns."""
        ends = [await connect() for _ in range(4)]
        results = await asyncio.gather(*(end.lead(f"h{n}", 30) for n, end in enumerate(ends)))
        assert sum(results) == 1
        leader = results.index(True)
        assert await ends[leader].lead(f"h{leader}", 30)
        other = (leader + 1) % 4
        await ends[other].resign(f"h{other}")
        assert not await ends[other].lead(f"h{other}", 30)
        await ends[leader].resign(f"h{leader}")
        assert await ends[other].lead(f"h{other}", 30)

    async def test_a_dead_leader_is_followed(self, connect: Connect) -> None:
        """A leader that stops renewing is replaced after its lease, and not before."""
        one, two = await connect(), await connect()
        started_s = time.monotonic()
        assert await one.lead("a", LEASE_S)

        async def follows() -> bool:
            return await two.lead("b", 60)

        await until(follows)
        assert time.monotonic() - started_s >= LEASE_S
        assert not await one.lead("a", LEASE_S)

    async def test_a_leader_that_slept_is_refused_by_the_revision(self, connect: Connect) -> None:
        """A leader that slept does not overwrite the document of its successor."""
        one, two = await connect(), await connect()
        assert await one.lead("a", LEASE_S)
        assert await one.write(b"a's", None)
        planned_from = await one.read()
        assert planned_from is not None

        async def follows() -> bool:
            return await two.lead("b", LEASE_S)

        await until(follows)
        assert await two.write(b"b's", planned_from.revision)
        assert not await one.write(b"a's, late", planned_from.revision)
        document = await one.read()
        assert document is not None
        assert document.body == b"b's"

    # --- changes ----------------------------------------------------------------------------------

    @pytest.mark.parametrize("what", ["write", "join", "standing", "leave"])
    async def test_a_change_is_noticed(self, connect: Connect, what: str) -> None:
        """Waiting ends soon after another process writes, joins, changes its standing or leaves."""
        one, two = await connect(), await connect()
        if what != "join":
            await two.renew(member("b"), 60)
        await one.wait_for_change(0.1)  # whatever was before

        async def change() -> None:
            if what == "write":
                await two.write(b"x", None)
            elif what == "leave":
                await two.leave("b", "1")
            else:
                await two.renew(member("b", state="draining"), 60)

        waiter = asyncio.create_task(one.wait_for_change(60))
        await asyncio.sleep(0)
        await change()
        async with asyncio.timeout(10):
            await waiter

    async def test_a_change_between_two_waits_is_noticed(self, connect: Connect) -> None:
        """A change that was made while nobody waited ends the next wait at once."""
        one, two = await connect(), await connect()
        await one.wait_for_change(0.01)
        await two.write(b"x", None)
        async with asyncio.timeout(10):
            await one.wait_for_change(60)
        document = await one.read()
        assert document is not None
        assert document.body == b"x"

    async def test_renewals_as_such_wake_nobody(self, connect: Connect) -> None:
        """Renewals of members and leader, and numbers for display, end no wait."""
        one, two = await connect(), await connect()
        await two.renew(member("b"), 60)
        await one.wait_for_change(0.1)
        waiter = asyncio.create_task(one.wait_for_change(60))
        for number in range(5):
            await two.renew(member("b", sessions=number, report=Report(epoch=number)), 60)
            await two.lead("b", 60)
        woken, _ = await asyncio.wait({waiter}, timeout=1.0)
        assert not woken
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)
        await one.wait_for_change(0.1)  # a wait ends with its time

    async def test_a_wait_may_be_cancelled(self, connect: Connect) -> None:
        """Giving up a wait leaves the store usable."""
        one = await connect()
        for pause_s in (0, 0.01, 0.1):
            waiter = asyncio.create_task(one.wait_for_change(60))
            await asyncio.sleep(pause_s)
            waiter.cancel()
            await asyncio.gather(waiter, return_exceptions=True)
            assert waiter.cancelled()
        await one.renew(member("a"), 60)
        assert await one.members() == [member("a")]

    # --- calls ------------------------------------------------------------------------------------

    async def test_calls_of_one_process_may_overlap(self, connect: Connect) -> None:
        """Many calls at once through one adapter all succeed, also during a wait."""
        one = await connect()
        waiter = asyncio.create_task(one.wait_for_change(60))
        await asyncio.gather(
            *(one.renew(member(f"m-{number}"), 60) for number in range(10)),
            *(one.read() for _ in range(5)),
            *(one.lead("a", 60) for _ in range(5)),
        )
        assert len(await one.members()) == 10
        async with asyncio.timeout(10):
            await waiter

    async def test_a_closed_store_refuses(self, connect: Connect) -> None:
        """After close() every call raises CoordinationError; closing again is fine."""
        one = await connect()
        await one.close()
        await one.close()
        for call in every_call(one):
            with pytest.raises(CoordinationError):
                await call


def every_call(store: Coordination) -> list[Coroutine[Any, Any, object]]:
    """One call of each kind, to be awaited."""
    return [
        store.renew(member("a"), 60),
        store.leave("a", "1"),
        store.members(),
        store.read(),
        store.write(b"x", None),
        store.lead("a", 60),
        store.resign("a"),
        store.wait_for_change(0.1),
    ]
