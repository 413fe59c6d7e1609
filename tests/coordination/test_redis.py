"""Coordination through Redis: the contract, outages, a Redis Cluster, permissions."""

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from valkey.asyncio import Valkey

from pokebridge.cluster.membership import Membership, Planner, View
from pokebridge.coordination.redis import RedisCoordination
from pokebridge.errors import CoordinationError
from pokebridge.supervisor import task_failures
from pokebridge.testing.coordination import Connect, CoordinationContract, member
from tests.coordination.stores import ConnectTo, LoseData, StoreSuite, connections
from tests.support import Daemon, free_port, wait_until
from tests.support.engines import run_valkey
from tests.support.silence import Silence

PAGE = Path(__file__).parents[2] / "docs/coordination.md"

_databases = itertools.count()


@pytest.fixture
async def connect_to() -> AsyncIterator[ConnectTo]:
    """``RedisCoordination.connect``, closed afterwards."""
    async for connect in connections(RedisCoordination):
        yield connect


@pytest.fixture
async def url(valkey_server: Daemon) -> str:
    """An empty database of the session's server."""
    database = next(_databases) % 16
    async with Valkey(port=valkey_server.port, db=database) as client:
        await client.flushdb()
    return valkey_server.url.removesuffix("/0") + f"/{database}"


class TestContract(CoordinationContract):
    """The shipped suite, each test in a database of its own."""

    @pytest.fixture
    def connect(self, url: str, connect_to: ConnectTo) -> Connect:
        """Stores in that database."""
        return lambda: connect_to(url)


class TestStore(StoreSuite):
    """The suite of all real servers."""

    @pytest.fixture
    def own_server(self, own_valkey_server: Daemon) -> Daemon:
        """To kill; it keeps nothing on disk, so a kill is a loss as well."""
        return own_valkey_server

    @pytest.fixture
    def lose_data(self) -> LoseData:
        """Somebody flushes it."""

        async def lose_data(server: Daemon) -> None:
            async with Valkey(port=server.port) as client:
                await client.flushall()

        return lose_data


async def test_nothing_is_left_of_the_long_dead(connect_to: ConnectTo, url: str) -> None:
    """Dead members are dropped at the next renewal, and with the last lease all of them go."""
    store = await connect_to(url)
    async with Valkey.from_url(url) as client:
        await store.renew(member("dead"), 0.1)
        await store.lead("dead", 0.1)
        await wait_until(lambda: gone(client, "members"))
        await wait_until(lambda: gone(client, "leader"))
        await store.renew(member("dead"), 0.1)
        await store.renew(member("a"), 60)
        await asyncio.sleep(0.1)
        await store.renew(member("a"), 60)
        assert await client.hkeys("pokebridge:{default}:members") == [b"a"]
        assert 0 < await client.pttl("pokebridge:{default}:members") <= 60_000


async def test_a_leader_without_a_lease_is_replaced(connect_to: ConnectTo, url: str) -> None:
    """A leader key without expiry, set by another program, does not block elections for ever."""
    store = await connect_to(url)
    async with Valkey.from_url(url) as client:
        await client.set("pokebridge:{default}:leader", "nobody")
    assert await store.lead("one", 60.0)
    assert not await store.lead("two", 60.0)


async def test_what_another_program_has_written_lasts_no_longer_than_it_must(
    connect_to: ConnectTo, url: str
) -> None:
    """A lease without end is dropped by the next renewal; an invalid revision is an outage."""
    store = await connect_to(url)
    async with Valkey.from_url(url) as client:
        await client.zadd("pokebridge:{default}:leases", {"ghost": 9e15})
        with pytest.raises(CoordinationError, match="lost the records of 1"):
            await store.members()
        await store.renew(member("one"), 60.0)
        assert [each.id for each in await store.members()] == ["one"]
        await client.hset("pokebridge:{default}:document", "revision", "x")
        with pytest.raises(CoordinationError, match="invalid revision"):
            await store.read()


async def gone(client: Valkey, key: str) -> bool:
    """Whether the server has forgotten the cluster's ``key``."""
    return not await client.exists(f"pokebridge:{{default}}:{key}")


REFUSALS = {
    "no permission": (("ACL", "SETUSER", "me", "-eval"), ("ACL", "SETUSER", "me", "+eval")),
    "a replica": (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
    "another password": (
        ("ACL", "SETUSER", "me", "resetpass", ">other"),
        ("ACL", "SETUSER", "me", "resetpass", ">pw"),
    ),
    "another type": (
        ("SET", "pokebridge:{default}:members", "x"),
        ("DEL", "pokebridge:{default}:members"),
    ),
}


@pytest.mark.parametrize(("refuse", "permit"), REFUSALS.values(), ids=REFUSALS)
async def test_a_server_that_refuses_is_asked_again(
    own_valkey_server: Daemon,
    connect_to: ConnectTo,
    refuse: tuple[str, ...],
    permit: tuple[str, ...],
) -> None:
    """However it words it: each call fails in one line, and works again once it is permitted."""
    async with Valkey(port=own_valkey_server.port) as client:
        admin: Any = client
        await admin.execute_command("ACL", "SETUSER", "me", "on", ">pw", "allkeys", "+@all")
        store = await connect_to(f"redis://me:pw@{own_valkey_server.address}")
        await store.renew(member("a"), 60)
        await admin.execute_command(*refuse)
        await admin.execute_command("CLIENT", "KILL", "USER", "me")

        async def fails() -> bool:
            try:
                await store.renew(member("a"), 60)
            except CoordinationError as error:
                return "\n" not in str(error)
            return False

        await wait_until(fails)
        await admin.execute_command(*permit)

        async def works() -> bool:
            return not await fails()

        await wait_until(works)
        assert await store.members() == [member("a")]


LOSSES = {
    "members": ("DEL", "members"),
    "leases": ("DEL", "leases"),
    "leader": ("DEL", "leader"),
    "document": ("DEL", "document"),
    "changes": ("DEL", "changes"),
    "a record": ("HDEL", "members", "b"),
    "a lease": ("ZREM", "leases", "b"),
    "the map": ("HDEL", "document", "body"),
    "the revision": ("HDEL", "document", "revision"),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
async def test_a_lost_key_is_restored(
    connect_to: ConnectTo, url: str, loss: tuple[str, ...], silence: Silence
) -> None:
    """After a server evicts keys the members restore them, and no shard moves."""
    owners: set[Sequence[str | None]] = set()

    def note(view: View) -> None:
        owners.add(view.shard_map.owners)

    async with AsyncExitStack() as stack:
        memberships = []
        for name in "ab":
            store = await connect_to(url)
            membership = Membership(
                store,
                partial(member, name),
                holder=name,
                shard_count=4,
                mode="partitioned",
                on_view=note,
                lease_s=1.5,
                planner=Planner(settle_s=0.5),
            )
            await membership.start()
            stack.push_async_callback(membership.close)
            memberships.append(membership)

        def is_well(membership: Membership) -> bool:
            view = membership.view
            return membership.trouble is None and view.members.keys() == {"a", "b"}

        async with Valkey.from_url(url) as client:
            keys = [f"pokebridge:{{default}}:{key}" for key in ("members", "leases", "document")]
            await wait_until(
                lambda: all(len(set(each.view.shard_map.owners)) == 2 for each in memberships)
            )
            owners.clear()
            command, key, *fields = loss
            restored = silence("a key of the coordination in Redis is lost, with a lease of 1.5 s")
            await client.execute_command(command, f"pokebridge:{{default}}:{key}", *fields)
            epoch = memberships[0].view.shard_map.epoch

            async def is_restored() -> bool:
                body = await client.hget(keys[2], "body")
                return (
                    await client.exists(*keys) == len(keys)
                    and set(await client.hkeys(keys[0])) == {b"a", b"b"}
                    and body is not None
                    and b'"epoch":0' not in body
                    and all(map(is_well, memberships))
                )

            await wait_until(is_restored)
            restored()
            assert memberships[0].view.shard_map.epoch >= epoch
        assert len(owners) <= 1
    assert not task_failures


async def test_a_record_that_is_none_hides_no_other(connect_to: ConnectTo, url: str) -> None:
    """Nonsense in a member's place is passed over."""
    store = await connect_to(url)
    await store.renew(member("a"), 60)
    await store.renew(member("b"), 60)
    async with Valkey.from_url(url) as client:
        await client.hset("pokebridge:{default}:members", "b", "nonsense")
    assert await store.members() == [member("a")]


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[list[Daemon]]:
    """A Redis Cluster of two nodes, with half of the slots each."""
    with ExitStack() as running:

        def start(number: int) -> Daemon:
            directory = tmp_path / f"node-{number}"
            directory.mkdir()
            flags = ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
            return running.enter_context(run_valkey(directory, *flags))

        yield [start(number) for number in range(2)]


async def test_any_node_of_a_redis_cluster_leads_to_the_right_one(
    two_nodes: list[Daemon], connect_to: ConnectTo
) -> None:
    """All keys of a cluster are on one node, and other nodes redirect there."""
    first: Any
    second: Any
    async with Valkey(port=two_nodes[0].port) as first, Valkey(port=two_nodes[1].port) as second:
        await first.execute_command("CLUSTER ADDSLOTSRANGE", 0, 8191)
        await second.execute_command("CLUSTER ADDSLOTSRANGE", 8192, 16383)
        bus = int((await second.config_get("cluster-port"))["cluster-port"])
        await first.execute_command("CLUSTER MEET", "127.0.0.1", two_nodes[1].port, bus)

        async def is_whole() -> bool:
            states = [await node.execute_command("CLUSTER INFO") for node in (first, second)]
            return all(state["cluster_state"] == "ok" for state in states)

        await wait_until(is_whole)
    one, two = [await connect_to(node.url) for node in two_nodes]
    await one.renew(member("a"), 60)
    assert await two.members() == [member("a")]
    assert await two.write(b"x", None)
    assert await one.lead("a", 60)
    async with asyncio.timeout(5):
        await one.wait_for_change(60)


async def test_the_documented_permissions_are_enough(
    own_valkey_server: Daemon, connect_to: ConnectTo
) -> None:
    """The ACL of docs/coordination.md is enough. A missing permission is named in one line."""
    url = f"redis://bridge:secret@{own_valkey_server.address}/0"
    acl = re.search(r"ACL SETUSER bridge (reset on .*?)\n\n", PAGE.read_text(), re.DOTALL)
    assert acl is not None
    admin: Any  # its commands have no annotations
    async with Valkey(port=own_valkey_server.port) as admin:
        await admin.execute_command(
            "ACL SETUSER bridge", *acl[1].replace("SECRET", "secret").split()
        )
        store = await connect_to(url)
        await store.renew(member("a"), 60)
        assert await store.members() == [member("a")]
        assert await store.read() is None
        assert await store.write(b"x", None)
        document = await store.read()
        assert document is not None
        assert await store.write(b"y", document.revision)
        assert await store.lead("a", 60)
        await store.resign("a")
        await store.wait_for_change(0.1)
        await store.leave("a", "1")
        await admin.execute_command("ACL SETUSER bridge -zadd")
        with pytest.raises(CoordinationError, match="zadd") as error:
            await store.renew(member("a"), 60)
        await admin.execute_command("ACL SETUSER bridge resetpass")
        with pytest.raises(CoordinationError, match="invalid username") as refused:
            await connect_to(url)
    assert "secret" not in f"{error.value}{refused.value}"
