"""What a store does while its server is away, and after: one suite over all real servers.

A subclass has the fixtures ``own_server`` (a server to kill), ``url`` (of a store on a shared
server), ``connect_to`` (an async function that returns a new store at a URL for a cluster, closed
afterwards) and ``lose_data`` (an async function that empties ``own_server``, as a disaster would).
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Protocol, Self

import pytest

from pokebridge.cluster.membership import Membership, Planner, View
from pokebridge.coordination import store_connection
from pokebridge.coordination.base import Coordination, Member
from pokebridge.errors import CoordinationError
from pokebridge.testing.coordination import every_call, member
from tests.support import CutProxy, Daemon, wait_until

LoseData = Callable[[Daemon], Awaitable[None]]

SHARD_COUNT = 12
LEASE_S = 0.6


class ConnectTo(Protocol):
    """``Adapter.connect``, as a fixture."""

    async def __call__(self, url: str, cluster: str = "default") -> Coordination:
        """Connect; closed after the test."""


class Adapter(Protocol):
    """The class of a store's adapter."""

    @classmethod
    async def connect(cls, url: str, *, cluster: str) -> Coordination:
        """Connect."""


async def connections(adapter: type[Adapter]) -> AsyncIterator[ConnectTo]:
    """The fixture ``connect_to``."""
    async with AsyncExitStack() as stack:

        async def connect_to(url: str, cluster: str = "default") -> Coordination:
            end = await adapter.connect(url, cluster=cluster)
            stack.push_async_callback(end.close)
            return end

        yield connect_to


async def answers(end: Coordination) -> bool:
    """Whether the store can be had through ``end``."""
    try:
        await end.members()
    except CoordinationError:
        return False
    return True


async def refusals(end: Coordination) -> list[str]:
    """What each kind of call says, all at once; fails when one succeeds or does not return."""
    async with asyncio.timeout(store_connection.CALL_TIMEOUT_S + 10):
        results = await asyncio.gather(*every_call(end), return_exceptions=True)
    assert all(isinstance(result, CoordinationError) for result in results), results
    return [str(result) for result in results]


class Cluster:
    """Three memberships over stores of their own, with short leases."""

    def __init__(self, connect_to: ConnectTo, url: str) -> None:
        self._connect_to = connect_to
        self._url = url
        self.views: dict[str, View] = {}
        self.members: dict[str, Membership] = {}

    async def __aenter__(self) -> Self:
        """Everyone joins, and the map settles."""
        for name in "abc":
            await self._join(name)
        await wait_until(lambda: self.agree("abc"), what="one map of a, b and c")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Everyone leaves."""
        for membership in self.members.values():
            await membership.close()

    async def _join(self, name: str) -> None:
        record = Member(name, f"ws://{name}.example", "1", weight=1.0, joined_at_ms=0)
        self.members[name] = Membership(
            await self._connect_to(self._url),
            lambda: record,
            holder=name,
            shard_count=SHARD_COUNT,
            mode="partitioned",
            on_view=lambda view: self.views.__setitem__(name, view),
            lease_s=LEASE_S,
            planner=Planner(settle_s=LEASE_S / 2),
        )
        await self.members[name].start()

    async def silence(self, name: str) -> None:
        """Kill a member: it renews nothing more and does not say so."""
        dead = self.members.pop(name)
        assert dead._task is not None
        dead._task.cancel()
        await asyncio.gather(dead._task, return_exceptions=True)

    def agree(self, owners: str) -> bool:
        """Whether all see one map that gives every shard to one of ``owners``, all of them."""
        maps = {self.views[name].shard_map for name in owners if name in self.views}
        return len(maps) == 1 and set(maps.pop().owners) == set(owners)


class StoreSuite:
    """What every store does beyond its contract."""

    async def test_clusters_share_a_store_without_meeting(
        self, connect_to: ConnectTo, url: str
    ) -> None:
        """Members, document, leader and changes of one cluster are unknown to another's."""
        one, other = await connect_to(url, "one"), await connect_to(url, "other")
        waiter = asyncio.create_task(other.wait_for_change(0.7))
        await one.renew(member("a"), 60)
        assert await one.write(b"one's", None)
        assert await one.lead("a", 60)
        assert await other.members() == []
        assert await other.read() is None
        await asyncio.sleep(0)
        assert not waiter.done()
        assert await other.lead("b", 60)
        assert await other.write(b"other's", None)
        await other.renew(member("a", "of another"), 60)
        await other.leave("a", "of another")
        assert await one.members() == [member("a")]
        document = await one.read()
        assert document is not None
        assert document.body == b"one's"
        await waiter

    async def test_a_killed_server_is_told_at_once_and_then_forgotten(
        self, own_server: Daemon, connect_to: ConnectTo
    ) -> None:
        """While it is away every call fails, a wait under way too; back, all of it works again."""
        end = await connect_to(own_server.url)
        await end.renew(member("a"), 60)
        waiter = asyncio.create_task(end.wait_for_change(60))
        await wait_until(lambda: answers(end))
        await asyncio.to_thread(own_server.kill)
        async with asyncio.timeout(store_connection.CALL_TIMEOUT_S + 10):
            await asyncio.gather(waiter, return_exceptions=True)
        await refusals(end)
        with pytest.raises(CoordinationError):
            await connect_to(own_server.url)
        await asyncio.to_thread(own_server.start)
        await wait_until(lambda: answers(end))
        await end.renew(member("b"), 60)
        assert member("b") in await end.members()
        assert await end.lead("b", 60)

    async def test_a_silent_server_is_given_up_in_time(
        self, own_server: Daemon, connect_to: ConnectTo, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On a network that drops everything each call ends at its time limit."""
        async with CutProxy("127.0.0.1", own_server.port) as proxy:
            url = own_server.url.replace(own_server.address, proxy.address)
            end = await connect_to(url)
            await end.renew(member("a"), 60)
            proxy.cut()
            with monkeypatch.context() as patch:
                patch.setattr(store_connection, "CALL_TIMEOUT_S", 0.5)
                assert all("no answer" in said for said in await refusals(end))
                with pytest.raises(CoordinationError, match="no answer"):
                    await connect_to(url)
            proxy.heal()
            await wait_until(lambda: answers(end))
            assert await end.members() == [member("a")]

    async def test_what_the_store_lost_is_an_empty_cluster_that_fills_again(
        self, own_server: Daemon, connect_to: ConnectTo, lose_data: LoseData
    ) -> None:
        """After a loss everything works, and no revision comes again that somebody remembers."""
        end = await connect_to(own_server.url)
        await end.renew(member("a"), 60)
        assert await end.write(b"before", None)
        assert await end.lead("a", 60)
        before = await end.read()
        assert before is not None
        await lose_data(own_server)
        await wait_until(lambda: answers(end))
        assert await end.members() == []
        assert await end.read() is None
        assert not await end.write(b"stale", before.revision)
        await end.renew(member("a"), 60)
        assert await end.write(b"after", None)
        assert not await end.write(b"stale", before.revision)
        assert await end.members() == [member("a")]
        assert await end.lead("b", 60)

    async def test_members_agree_and_one_that_falls_silent_is_replaced(
        self, connect_to: ConnectTo, url: str
    ) -> None:
        """Three share one map; a dead one's shards become another's, and no other shard moves."""
        async with Cluster(connect_to, url) as cluster:
            before = cluster.views["a"].shard_map
            await cluster.silence("c")
            await wait_until(lambda: cluster.agree("ab"), what="one map of a and b")
            after = cluster.views["a"].shard_map
            moved = {s for s in range(SHARD_COUNT) if before.owners[s] != after.owners[s]}
            assert moved == before.owned_by("c")

    async def test_members_keep_their_map_through_an_outage_and_a_loss(
        self, own_server: Daemon, connect_to: ConnectTo, lose_data: LoseData
    ) -> None:
        """Without the store the last map stays; a store that lost it gets it back."""
        async with Cluster(connect_to, own_server.url) as cluster:
            before = cluster.views["a"].shard_map
            await asyncio.to_thread(own_server.kill)
            everyone = cluster.members.values()
            await wait_until(lambda: all(each.trouble for each in everyone))
            assert all(view.shard_map == before for view in cluster.views.values())
            await asyncio.to_thread(own_server.start)
            await wait_until(lambda: not any(each.trouble for each in everyone))
            await wait_until(lambda: cluster.agree("abc"), what="one map after the outage")
            epoch = cluster.views["a"].shard_map.epoch
            await lose_data(own_server)
            await wait_until(
                lambda: cluster.views["a"].shard_map.epoch > epoch and cluster.agree("abc"),
                what="one map after the loss",
            )
