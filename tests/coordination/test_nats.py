"""Coordination through NATS: the contract, outages, buckets as they may be, permissions."""

import asyncio
import itertools
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import nats
import pytest
from nats.js import JetStreamContext
from nats.js.api import KeyValueConfig, StorageType

from pokebridge.coordination.nats import NatsCoordination, _Bucket
from pokebridge.errors import CoordinationError
from pokebridge.testing.coordination import Connect, CoordinationContract, member
from tests.coordination.stores import ConnectTo, LoseData, StoreSuite, answers, connections
from tests.support import Daemon, free_port, wait_until
from tests.support.engines import run_configured_nats

_clusters = itertools.count()


@pytest.fixture
async def connect_to() -> AsyncIterator[ConnectTo]:
    """``NatsCoordination.connect``, closed afterwards."""
    async for connect in connections(NatsCoordination):
        yield connect


async def drop_buckets(server: Daemon) -> None:
    """Delete all buckets there are."""
    client = await nats.connect(server.url)
    jetstream = client.jetstream()
    for stream in await jetstream.streams_info():
        assert stream.config.name is not None
        await jetstream.delete_stream(stream.config.name)
    await client.close()


class TestContract(CoordinationContract):
    """The shipped suite, each test for a cluster of its own."""

    @pytest.fixture
    def connect(self, nats_server: Daemon, connect_to: ConnectTo) -> Connect:
        """Stores of that cluster."""
        cluster = f"contract-{next(_clusters)}"
        return lambda: connect_to(nats_server.url, cluster)


class TestStore(StoreSuite):
    """The suite of all real servers."""

    @pytest.fixture
    async def url(self, nats_server: Daemon) -> str:
        """The session's server, without any bucket."""
        await drop_buckets(nats_server)
        return nats_server.url

    @pytest.fixture
    def own_server(self, own_nats_server: Daemon) -> Daemon:
        """To kill."""
        return own_nats_server

    @pytest.fixture
    def lose_data(self) -> LoseData:
        """Somebody deletes the bucket."""
        return drop_buckets


@pytest.fixture
async def hands(own_nats_server: Daemon) -> AsyncIterator[JetStreamContext]:
    """An operator's own client, at the test's own server."""
    client = await nats.connect(own_nats_server.url)
    yield client.jetstream()
    await client.close()


async def test_a_bucket_is_made_as_it_should_be(
    own_nats_server: Daemon, connect_to: ConnectTo, hands: JetStreamContext
) -> None:
    """It keeps one value a key, lets entries expire, and holds what any NATS client can read."""
    store = await connect_to(own_nats_server.url)
    await store.renew(member("a"), 60)
    bucket = await hands.key_value("pokebridge-default")
    assert (await bucket.keys()) == ["member.a"]
    config = (await bucket.status()).stream_info.config
    assert (config.max_msgs_per_subject, config.allow_msg_ttl, config.num_replicas) == (1, True, 1)


async def test_nothing_is_left_of_the_long_dead(
    own_nats_server: Daemon, connect_to: ConnectTo, hands: JetStreamContext
) -> None:
    """Entries of members that died or left, and of a leader, go from the bucket by themselves."""
    store = await connect_to(own_nats_server.url)
    await store.renew(member("dead"), 0.1)
    await store.renew(member("left"), 60)
    await store.leave("left", "1")
    await store.lead("dead", 0.1)

    async def is_empty() -> bool:
        return (await hands.stream_info("KV_pokebridge-default")).state.messages == 0

    await wait_until(is_empty)


async def test_a_lease_is_kept_to_more_than_the_second(
    nats_server: Daemon, connect_to: ConnectTo
) -> None:
    """The server's whole seconds of expiry make no lease longer, of a member or a leader."""
    store = await connect_to(nats_server.url, "short-leases")
    await store.renew(member("a"), 0.1)
    assert await store.lead("a", 0.1)
    async with asyncio.timeout(1.9):  # the server's expiry comes after 2 s
        while await store.members() or not await store.lead("b", 60):
            pass


async def test_a_bucket_in_memory_may_be_lost_with_the_server(
    own_nats_server: Daemon, connect_to: ConnectTo, hands: JetStreamContext
) -> None:
    """An operator's bucket is used unchanged. If a restart loses it, a new one is created."""
    config = KeyValueConfig("pokebridge-default", storage=StorageType.MEMORY, direct=True)
    await hands.create_key_value(config)
    store = await connect_to(own_nats_server.url)
    await store.renew(member("a"), 60)
    assert await store.write(b"before", None)
    await asyncio.to_thread(own_nats_server.kill)
    await asyncio.to_thread(own_nats_server.start)
    await wait_until(lambda: answers(store))
    assert await store.members() == []
    assert await store.write(b"after", None)


async def test_a_document_that_was_deleted_by_hand_is_none(
    own_nats_server: Daemon, connect_to: ConnectTo, hands: JetStreamContext
) -> None:
    """A record that an operator deletes with NATS's tool is missing, and is written again."""
    store = await connect_to(own_nats_server.url)
    assert await store.write(b"before", None)
    await store.renew(member("a"), 60)
    bucket = await hands.key_value("pokebridge-default")
    await bucket.delete("document")
    await bucket.purge("member.a")
    assert await store.read() is None
    assert await store.members() == []
    assert await store.write(b"after", None)
    document = await store.read()
    assert document is not None
    assert document.body == b"after"


async def test_a_record_that_is_none_hides_no_other(
    own_nats_server: Daemon, connect_to: ConnectTo, hands: JetStreamContext
) -> None:
    """Nonsense under a member's key, or the leader's, is passed over."""
    store = await connect_to(own_nats_server.url)
    await store.renew(member("a"), 60)
    bucket = await hands.key_value("pokebridge-default")
    await bucket.put("member.b", b"nonsense")
    await bucket.put("leader", b"nonsense")
    assert await store.members() == [member("a")]
    assert await store.lead("a", 60)


async def test_an_old_server_is_refused(
    nats_server: Daemon, connect_to: ConnectTo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without what it needs of the server a store says so, instead of failing at some call."""
    monkeypatch.setattr("pokebridge.coordination.nats._OLDEST_SERVER", (99, 0))
    with pytest.raises(CoordinationError, match=r"the server is NATS 2\.\d+, older than 2.11"):
        await connect_to(nats_server.url)


async def test_any_of_several_servers_will_do(own_nats_server: Daemon) -> None:
    """A URL may name several servers; one that is dead costs a try."""
    url = f"nats://127.0.0.1:{free_port()},{own_nats_server.address}"
    for _ in range(4):  # they are tried in any order
        store = await NatsCoordination.connect(url, cluster="default")
        await store.close()


async def test_a_mute_server_gives_way_to_another(
    own_nats_server: Daemon, connect_to: ConnectTo
) -> None:
    """A server that accepts connections and never answers costs no call its time."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"nats://127.0.0.1:{mute.getsockname()[1]},{own_nats_server.address}"
        for _ in range(3):  # they are tried in any order
            store = await connect_to(url)
            await store.renew(member("a"), 60)
            await store.close()


ALLOWED = """
jetstream { store_dir: "%s" }
authorization { users: [
  { user: bridge, password: secret, permissions: {
    publish: ["$KV.pokebridge-default.>", "pokebridge.default.changed",
              "$JS.API.STREAM.INFO.KV_pokebridge-default",
              "$JS.API.STREAM.MSG.GET.KV_pokebridge-default",
              "$JS.API.DIRECT.GET.KV_pokebridge-default"%s]
    subscribe: ["_INBOX.>"%s] } }
  { user: operator, password: secret }
] }
"""
CREATE = ', "$JS.API.STREAM.CREATE.KV_pokebridge-default"'
NEWS = ', "pokebridge.default.changed"'


@pytest.fixture
def run_server(tmp_path: Path) -> Iterator[Callable[[str], Daemon]]:
    """Starts a NATS server with a configuration, and kills it afterwards."""
    with ExitStack() as running:
        yield lambda config: running.enter_context(run_configured_nats(tmp_path, config))


async def test_the_documented_permissions_are_enough(
    run_server: Callable[[str], Daemon], tmp_path: Path, connect_to: ConnectTo
) -> None:
    """With them everything works, and without the right to create a bucket once there is one."""
    page = (Path(__file__).parents[2] / "docs/coordination.md").read_text()
    granted = re.findall(r'"([^"]*(?:default|INBOX)[^"]*)"', ALLOWED + CREATE + NEWS)
    assert sorted(granted) == sorted(re.findall(r'"([$_p][^"]*)"', page))
    config = ALLOWED % (tmp_path, CREATE, NEWS)
    server = await asyncio.to_thread(run_server, config)
    for _ in range(2):
        store = await connect_to(f"nats://bridge:secret@{server.address}")
        await store.renew(member("a"), 60)
        assert await store.members() == [member("a")]
        assert await store.lead("a", 60)
        await store.resign("a")
        document = await store.read()
        assert await store.write(b"x", None if document is None else document.revision)
        await store.wait_for_change(0.1)
        await store.leave("a", "1")
        await asyncio.to_thread(server.kill)
        (tmp_path / "nats.conf").write_text(ALLOWED % (tmp_path, "", NEWS))
        await asyncio.to_thread(server.start)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("", "JetStream does not answer"),
        (ALLOWED % ("x", "", NEWS), "permissions violation for publish.*stream.create"),
        (ALLOWED % ("x", CREATE, ""), "permissions violation for subscription.*changed"),
    ],
    ids=["no JetStream", "may not create", "may not hear"],
)
async def test_what_a_server_lacks_is_said_in_a_line(
    run_server: Callable[[str], Daemon],
    connect_to: ConnectTo,
    monkeypatch: pytest.MonkeyPatch,
    config: str,
    said: str,
) -> None:
    """The start fails with one line that names the permission to grant."""
    server = await asyncio.to_thread(run_server, config)

    async def use() -> None:
        store = await connect_to(f"nats://bridge:secret@{server.address}")
        await store.members()

    for module in ("nats", "store_connection"):  # the answer is not waited for
        monkeypatch.setattr(f"pokebridge.coordination.{module}.CALL_TIMEOUT_S", 600.0)
    async with asyncio.timeout(60):
        with pytest.raises(CoordinationError, match=f"(?i){said}") as error:
            await use()
    assert "secret" not in str(error.value)


async def test_leases_from_before_the_clock_was_set_back(
    connect_to: ConnectTo, nats_server: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead member is gone, and a dead leader is followed, as if their leases had ended."""
    store = await connect_to(nats_server.url, f"set-back-{next(_clusters)}")
    await store.renew(member("dead"), 60)
    assert await store.lead("dead", 60)
    now_s = _Bucket._now_s

    async def hours_ago(bucket: _Bucket) -> float:
        return await now_s(bucket) - 3 * 3600

    monkeypatch.setattr(_Bucket, "_now_s", hours_ago)
    assert await store.members() == []
    assert await store.lead("a", 60)
