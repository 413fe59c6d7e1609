"""The contract of every coordination store, as a pytest suite to subclass.

Give a fixture ``connect`` that yields an async function, each call of which stands for another
process on the same, empty store; what it returns is closed by the fixture.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from pokebridge.coordination.base import Coordination, Document, Member
from pokebridge.errors import CoordinationError

Connect = Callable[[], Awaitable[Coordination]]

# Long enough for a busy machine to renew in time, short enough to wait for.
LEASE_S = 1.0
TIMEOUT_S = 15.0


def member(name: str, incarnation: str = "1", sessions: int = 0) -> Member:
    """A member's record."""
    return Member(
        id=name,
        url=f"ws://{name}.example",
        incarnation=incarnation,
        weight=1.0,
        joined_at_ms=1_700_000_000_000,
        sessions=sessions,
    )


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = TIMEOUT_S) -> None:
    """Return once ``condition`` holds; fail after ``timeout_s`` seconds."""
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110 - another process makes it true
            await asyncio.sleep(0.05)


class CoordinationContract:
    """What every store promises (``pokebridge.coordination.base``)."""

    async def test_members_see_each_other_as_they_are(self, connect: Connect) -> None:
        """A member's whole record is what the others list, by id, and a renewal updates it."""
        one, two = await connect(), await connect()
        assert await one.members() == []
        await two.renew(member("b"), 30)
        await one.renew(member("a"), 30)
        assert await two.members() == [member("a"), member("b")]
        await one.renew(member("a", sessions=7), 30)
        assert await two.members() == [member("a", sessions=7), member("b")]

    async def test_a_silent_member_is_gone_after_its_lease(self, connect: Connect) -> None:
        """Who stops renewing is listed for its lease, and no longer than twice that."""
        one, two = await connect(), await connect()
        await one.renew(member("a"), LEASE_S)
        await two.renew(member("b"), 60)
        started_s = time.monotonic()
        assert member("a") in await two.members()

        async def gone() -> bool:
            return await two.members() == [member("b")]

        await until(gone)
        assert LEASE_S * 0.8 <= time.monotonic() - started_s <= 2 * LEASE_S + 2

    async def test_a_member_that_renews_stays(self, connect: Connect) -> None:
        """Renewals in time keep a member listed for several leases, without a break."""
        one, two = await connect(), await connect()
        until_s = time.monotonic() + 3 * LEASE_S
        await one.renew(member("a"), LEASE_S)
        while time.monotonic() < until_s:
            await one.renew(member("a"), LEASE_S)
            assert await two.members() == [member("a")]
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

    async def test_the_document_changes_by_compare_and_swap(self, connect: Connect) -> None:
        """A write needs the revision that is in force; what was written is what is read."""
        one, two = await connect(), await connect()
        assert await one.read() is None
        assert not await one.write(b"x", 17)
        assert await one.write(b'{"first":1}', None)
        assert not await two.write(b"other", None)
        first = await two.read()
        assert first is not None
        assert first.body == b'{"first":1}'
        assert await two.write(b"\x00\xff" * 50_000, first.revision)
        assert not await one.write(b"late", first.revision)
        second = await one.read()
        assert second == Document(b"\x00\xff" * 50_000, second.revision if second else 0)
        assert second.revision != first.revision

    async def test_of_many_writers_one_wins(self, connect: Connect) -> None:
        """Concurrent increments from several processes are never lost and never doubled."""
        ends = [await connect() for _ in range(4)]
        assert await ends[0].write(b"0", None)

        async def increment(end: Coordination) -> None:
            done = 0
            while done < 10:
                document = await end.read()
                assert document is not None
                if await end.write(b"%d" % (int(document.body) + 1), document.revision):
                    done += 1

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for end in ends:
                group.create_task(increment(end))
        document = await ends[0].read()
        assert document is not None
        assert document.body == b"40"

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
        assert await one.lead("a", LEASE_S)
        started_s = time.monotonic()

        async def follows() -> bool:
            return await two.lead("b", LEASE_S)

        await until(follows)
        assert time.monotonic() - started_s >= LEASE_S * 0.8
        assert not await one.lead("a", LEASE_S)

    async def test_a_change_is_noticed(self, connect: Connect) -> None:
        """Waiting ends soon after a write by another process, and by itself after the timeout."""
        one, two = await connect(), await connect()
        started_s = time.monotonic()
        await one.wait_for_change(0.2)
        assert time.monotonic() - started_s < 5
        waiter = asyncio.create_task(one.wait_for_change(2.0))
        await asyncio.sleep(0)
        await two.write(b"x", None)
        async with asyncio.timeout(10):
            await waiter
        document = await one.read()
        assert document is not None
        assert document.body == b"x"

    async def test_a_closed_store_refuses(self, connect: Connect) -> None:
        """After close() every call raises CoordinationError; closing again is fine."""
        one = await connect()
        await one.close()
        await one.close()
        with pytest.raises(CoordinationError):
            await one.members()
        with pytest.raises(CoordinationError):
            await one.write(b"x", None)
