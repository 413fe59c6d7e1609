"""From URLs to adapters."""

import re
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from pokebridge.coordination.base import Coordination
from pokebridge.coordination.memory import MemoryCoordination
from pokebridge.coordination.static import StaticCoordination
from pokebridge.errors import ConfigError, MissingExtraError
from pokebridge.mailbox.memory import MemoryMailbox
from pokebridge.mailbox.sqlite import SqliteMailbox
from pokebridge.model import Mode
from pokebridge.server import adapters
from pokebridge.server.adapters import (
    claim_file,
    open_coordination,
    open_mailbox,
    open_sweeper,
    open_transport,
)
from pokebridge.transport.base import Signal, Transport
from pokebridge.transport.memory import MemoryTransport
from tests.support import Daemon


async def test_memory_chooses_what_lives_in_this_process() -> None:
    """memory:// is a transport and a mailbox."""
    transport = await open_transport("memory://", instance="a", cluster="c")
    mailbox = await open_mailbox("memory://")
    assert isinstance(transport, MemoryTransport)
    assert isinstance(mailbox, MemoryMailbox)
    await transport.close()
    await mailbox.close()


async def test_sqlite_chooses_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slashes for a relative path, four for an absolute one."""
    monkeypatch.chdir(tmp_path)
    for url, path in (
        ("sqlite:///here.db", tmp_path / "here.db"),
        (f"sqlite:///{tmp_path}/there.db", tmp_path / "there.db"),
    ):
        mailbox = await open_mailbox(url)
        assert isinstance(mailbox, SqliteMailbox)
        assert path.exists()
        await mailbox.close()


@pytest.mark.parametrize("url", ["kafka://user:hunter2host", "hunter2", "MEMORY://", ""])
async def test_an_unknown_scheme_is_answered_with_those_there_are(url: str) -> None:
    """One line for the user, without the URL, which may hold a password."""
    with pytest.raises(ConfigError, match="transport: must be memory://") as transport:
        await open_transport(url, instance="a", cluster="c")
    with pytest.raises(ConfigError, match="mailbox: must be sqlite:///FILE or postgresql://"):
        await open_mailbox(url)
    assert "hunter2" not in str(transport.value)


@pytest.mark.parametrize(
    "url", ["sqlite://pokebridge.db", "sqlite:///", "sqlite:///:memory:", "memory://x"]
)
async def test_a_url_of_the_wrong_form_is_refused(url: str) -> None:
    """The scheme is known and the rest is not what it needs."""
    with pytest.raises(ConfigError, match="mailbox: must be"):
        await open_mailbox(url)


async def test_a_transport_url_of_the_wrong_form_is_refused() -> None:
    """memory:// has no host."""
    with pytest.raises(ConfigError, match="transport: must be memory://"):
        await open_transport("memory://host", instance="a", cluster="c")


async def test_the_path_of_a_pubsub_url_is_the_topic() -> None:
    """Project and topic reach the adapter, which refuses them here; the topic has a default."""
    for url, said in (
        ("pubsub://pro_ject/topic-a", "'pro_ject' is not a valid project"),
        ("pubsub://project-a/google", "'google' is not a valid topic"),
        ("pubsub://pro_ject", "pubsub://pro_ject/push-notifications"),
    ):
        with pytest.raises(ConfigError, match=said):
            await open_transport(url, instance="a-1", cluster="default")


async def test_the_carrier_reaches_pubsub() -> None:
    """A topic's name that is too long with a shard behind it is refused where that matters."""
    url = f"pubsub://project-a/{'t' * 254}"
    with pytest.raises(ConfigError, match="t-2' is not a valid topic"):
        await open_transport(url, instance="a", cluster="default", carrier="topic", shard_count=3)
    with pytest.raises(ConfigError, match="'' is not a valid"):
        await open_transport(url, instance="", cluster="default", carrier="topic", shard_count=3)


async def test_only_some_transports_leave_orphans() -> None:
    """For the others a janitor connects to nothing; an unknown one is refused."""
    for url in ("memory://", "nats://127.0.0.1:1", "rediss://127.0.0.1:1"):
        assert await open_sweeper(url, instance="a", cluster="c") is None
    with pytest.raises(ConfigError, match="transport: must be"):
        await open_sweeper("kafka://", instance="a", cluster="c")


def test_an_adapter_tells_what_it_can_do_before_it_is_opened() -> None:
    """memory:// stays within a process; static:// knows its members; a file can be shared."""
    for name in ("memory", "nats", "redis"):
        shared = name != "memory"
        assert adapters.transport_class(f"{name}://").is_shared == shared
        assert adapters.coordination_class(f"{name}://").is_shared == shared
        assert not adapters.coordination_class(f"{name}://").is_static
    assert adapters.transport_class("pubsub://p").is_shared
    assert adapters.coordination_class("postgres://").is_shared
    assert adapters.coordination_class("static://").is_static
    assert not adapters.mailbox_class("memory://").is_shared
    assert adapters.mailbox_class("sqlite:///f").is_shared
    with pytest.raises(ConfigError, match="mailbox: must be"):
        adapters.mailbox_class("nats://")


async def test_a_missing_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing driver names the package to install. Other import errors stay as they are."""
    missing = "no_such_driver"

    def load(_: adapters._Choice) -> adapters._Loaded[Transport]:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    table = {"far": adapters._Adapter(load, "far://HOST", "faraway")}
    monkeypatch.setattr(adapters, "_TRANSPORTS", table)
    command = f"{sys.executable} -m pip install 'pokebridge[faraway]'"
    with pytest.raises(MissingExtraError, match=re.escape(command)):
        await open_transport("far://host", instance="a", cluster="c")
    missing = "pokebridge.transport.far"
    with pytest.raises(ModuleNotFoundError):
        await open_transport("far://host", instance="a", cluster="c")


async def test_a_running_engine_is_reached_by_its_url(
    nats_server: Daemon, valkey_server: Daemon
) -> None:
    """Each engine's scheme opens its transport, which publishes."""
    for url in (nats_server.url, valkey_server.url):
        transport = await open_transport(url, instance="a", cluster="c")
        await transport.publish([Signal(b"{}", 1)])
        await transport.close()


async def store_at(url: str, mode: Mode = "fanout") -> Coordination:
    """The coordination for one instance of a cluster with six shards."""
    return await open_coordination(url, instance="a-0", cluster="c", shard_count=6, mode=mode)


async def test_a_coordination_is_chosen_by_its_url() -> None:
    """In-process and static need no store; static computes the map of the settings."""
    memory = await store_at("memory://")
    assert isinstance(memory, MemoryCoordination)
    static = await store_at("static://?ordinal=0&replicas=2", "partitioned")
    assert isinstance(static, StaticCoordination)
    document = await static.read()
    assert document is not None
    assert b'"partitioned","owners":["a-0","a-1","a-0","a-1","a-0","a-1"]' in document.body
    with pytest.raises(ConfigError, match="coordination: must be memory:// or static://"):
        await store_at("zookeeper://hunter2")


async def test_running_engines_coordinate_by_their_urls(
    nats_server: Daemon, valkey_server: Daemon, postgres_database: str
) -> None:
    """Each engine's scheme opens its store, which answers."""
    for url in (nats_server.url, valkey_server.url, postgres_database):
        store = await store_at(url)
        assert await store.read() is None
        await store.close()


async def test_a_second_instance_on_one_file_is_told(tmp_path: Path) -> None:
    """With memory:// it pokes only its own clients, so the start says that the file is shared."""
    url = f"sqlite:///{tmp_path / 'a.db'}"
    with capture_logs() as logged:
        async with AsyncExitStack() as first:
            await claim_file(url, first)
            await claim_file(f"sqlite:///{tmp_path / 'b.db'}", first)
            await claim_file("memory://", first)
            assert logged == []
            async with AsyncExitStack() as second:
                await claim_file(url, second)
            assert [entry["event"] for entry in logged] == ["mailbox_file_shared"]
        async with AsyncExitStack() as third:
            await claim_file(url, third)
    assert len(logged) == 1
