"""A host, or an address of a name, that is mute is no outage: real engines behind it.

The adapters bound their calls themselves, so nothing here watches a clock.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from pokebridge.coordination.base import Coordination
from pokebridge.coordination.nats import NatsCoordination
from pokebridge.coordination.postgres import PostgresCoordination
from pokebridge.coordination.redis import RedisCoordination
from pokebridge.errors import ConfigError, CoordinationError, TransportError
from pokebridge.ingress.nats import NatsSource
from pokebridge.mailbox.postgres import PostgresMailbox
from pokebridge.testing.mailbox_kit import message
from pokebridge.testing.transport import RecordingReceiver, subscribe_live
from pokebridge.transport import reconnecting_link
from pokebridge.transport.base import Signal, Transport
from pokebridge.transport.nats import NatsTransport
from pokebridge.transport.redis import RedisTransport
from tests.support import CutProxy, Daemon, wait_until
from tests.support.engines import ask, has_role, run_valkey
from tests.support.mute import LIVE, MUTE, Names, mute_listener
from tests.support.silence import Silence

Use = Callable[[str], Awaitable[None]]
Mute = Callable[..., AbstractContextManager[str]]


@pytest.fixture(params=[False, True], ids=["does not accept", "accepts"])
def mute(request: pytest.FixtureRequest) -> Mute:
    """Starts a mute listener, of either kind."""
    return partial(mute_listener, accepts=request.param)


async def use_mailbox(url: str) -> None:
    """Open a mailbox and append to it."""
    mailbox = await PostgresMailbox.open(url)
    try:
        assert (await mailbox.append(message())).version > 0
    finally:
        await mailbox.close()


async def use_transport(transport: Transport) -> None:
    """Publish on it."""
    try:
        await transport.publish([Signal(b"{}", None)])
    finally:
        await transport.close()


async def use_store(store: Coordination) -> None:
    """Ask it."""
    try:
        assert await store.members() == []
    finally:
        await store.close()


async def use_postgres_store(url: str) -> None:
    """Coordination through PostgreSQL."""
    await use_store(await PostgresCoordination.connect(url, cluster="mute"))


async def use_nats(url: str) -> None:
    """The transport over NATS."""
    await use_transport(await NatsTransport.connect(url))


async def use_nats_store(url: str) -> None:
    """Coordination through NATS."""
    await use_store(await NatsCoordination.connect(url, cluster="mute"))


async def use_redis(url: str) -> None:
    """The transport over Redis."""
    await use_transport(await RedisTransport.connect(url))


async def use_redis_store(url: str) -> None:
    """Coordination through Redis."""
    await use_store(await RedisCoordination.connect(url, cluster="mute"))


async def use_nats_queue(url: str) -> None:
    """Ingress from NATS. It reaches the server, which does not have the stream."""
    source = NatsSource(f"{url}/NOWHERE", cluster="mute")
    try:
        with pytest.raises(TransportError, match="NOWHERE does not exist"):
            await source.fetch(1)
    finally:
        await source.close()


ENGINES = [
    ("postgres_database", use_mailbox),
    ("postgres_database", use_postgres_store),
    ("nats_server", use_nats),
    ("nats_server", use_nats_store),
    ("nats_server", use_nats_queue),
    ("valkey_server", use_redis),
    ("valkey_server", use_redis_store),
]


def url_of(request: pytest.FixtureRequest, fixture: str) -> str:
    """The URL of the engine that ``fixture`` runs."""
    server: Any = request.getfixturevalue(fixture)
    return server if isinstance(server, str) else str(server.url)


@pytest.mark.parametrize(("server", "use"), ENGINES)
async def test_the_second_address_of_a_name_is_used(
    request: pytest.FixtureRequest,
    names: Names,
    server: str,
    use: Use,
    mute: Mute,
    silence: Silence,
) -> None:
    """The first address of the engine's name is mute."""
    url = url_of(request, server)
    names("engine.test", [MUTE, LIVE])
    with mute(port=urlsplit(url).port):
        used = silence(f"the first address of a name is mute: {use.__name__}")
        await use(url.replace(LIVE, "engine.test"))
        used()


@pytest.mark.parametrize(("server", "use"), ENGINES)
async def test_the_second_host_is_used(
    request: pytest.FixtureRequest, server: str, use: Use, mute: Mute, silence: Silence
) -> None:
    """The first host in the URL is mute."""
    url = url_of(request, server)
    with mute() as first:
        used = silence(f"the first of two hosts is mute: {use.__name__}")
        await use(url.replace(LIVE, f"{first},{LIVE}"))
        used()


@pytest.mark.parametrize("use", [use_mailbox, use_postgres_store])
@pytest.mark.parametrize("given", ["url", "url without a user", "environment"])
async def test_the_second_host_of_a_list_is_used(
    postgres_database: str,
    postgres_server: Daemon,
    monkeypatch: pytest.MonkeyPatch,
    use: Use,
    given: str,
) -> None:
    """The list is in the URL's options, or in libpq's variables."""
    url = postgres_database.replace(f"{LIVE}:{postgres_server.port}", "")
    with mute_listener(accepts=True) as mute:
        host, _, port = mute.partition(":")
        hosts, ports = f"{host},{LIVE}", f"{port},{postgres_server.port}"
        if given == "url":
            await use(f"{url}?host={hosts}&port={ports}")
        elif given == "url without a user":
            url = url.replace("postgres@", "")
            await use(f"{url}?user=postgres&host={hosts}&port={ports}")
        else:
            monkeypatch.setenv("PGHOST", hosts)
            monkeypatch.setenv("PGPORT", ports)
            await use(url)


async def test_a_list_of_hosts_needs_as_many_ports(postgres_database: str) -> None:
    """Or one for all: otherwise the URL is refused."""
    url = postgres_database.replace(urlsplit(postgres_database).netloc, "")
    with pytest.raises(ConfigError, match="the URL is invalid"):
        await PostgresMailbox.open(f"{url}?host=a,b,c&port=1,2")


async def test_many_mute_hosts_cost_no_more_than_a_few(nats_server: Daemon) -> None:
    """All of them are dialled within the time that a dial has."""
    with ExitStack() as stack:
        mute = [stack.enter_context(mute_listener(accepts=True)) for _ in range(12)]
        url = nats_server.url.replace(LIVE, ",".join([*mute, LIVE]))
        for _ in range(3):  # they are tried in any order
            await use_nats(url)


async def test_a_mailbox_goes_on_when_its_first_host_falls_mute(
    postgres_database: str, postgres_server: Daemon, silence: Silence
) -> None:
    """The calls that it has interrupted succeed at the second host, and so do the next."""
    async with CutProxy(LIVE, postgres_server.port) as first:
        url = postgres_database.replace(LIVE, f"{first.address},{LIVE}")
        mailbox = await PostgresMailbox.open(url)
        await mailbox.append(message())
        first.cut()
        answered = silence("the first of PostgreSQL's two hosts falls mute in use")
        assert (await mailbox.append(message())).version == 2
        answered()
        assert (await mailbox.append(message())).version == 3
        await mailbox.close()


@pytest.mark.parametrize(
    ("server", "connect"),
    [("nats_server", NatsTransport.connect), ("valkey_server", RedisTransport.connect)],
)
async def test_a_transport_goes_on_when_its_host_falls_mute(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    server: str,
    connect: Callable[[str], Awaitable[Transport]],
) -> None:
    """The silence is a gap, and then the other host is used."""
    monkeypatch.setattr(reconnecting_link, "HEARTBEAT_S", 0.5)
    engine: Daemon = request.getfixturevalue(server)
    async with CutProxy(LIVE, engine.port) as one, CutProxy(LIVE, engine.port) as other:
        url = engine.url.replace(engine.address, f"{one.address},{other.address}")
        transport = await connect(url)
        _, receiver = await subscribe_live(transport, 7)
        for host in (one, other):  # whichever it uses
            host.cut()
            await wait_until(partial(_hears, transport, receiver))
            host.heal()
        assert receiver.gaps
        await transport.close()


async def _hears(transport: Transport, receiver: RecordingReceiver) -> bool:
    before = len(receiver.payloads)
    with suppress(TransportError):
        await transport.publish([Signal(b'{"recipient":"a"}', 7)])
        await asyncio.sleep(0.2)
    return len(receiver.payloads) > before


@pytest.mark.parametrize(
    ("server", "connect"),
    [
        ("nats_server", NatsCoordination.connect),
        ("valkey_server", RedisCoordination.connect),
        ("postgres_server", PostgresCoordination.connect),
    ],
)
async def test_a_store_goes_on_when_its_host_falls_mute(
    request: pytest.FixtureRequest, server: str, connect: Callable[..., Awaitable[Coordination]]
) -> None:
    """The call that it has interrupted fails in its time, and the next is answered by the other."""
    engine: Daemon = request.getfixturevalue(server)
    async with CutProxy(LIVE, engine.port) as one, CutProxy(LIVE, engine.port) as other:
        url = engine.url.replace(engine.address, f"{one.address},{other.address}")
        store = await connect(url, cluster="mid-life")
        for host in (one, other):
            host.cut()
            with suppress(CoordinationError):
                await store.members()
            assert await store.members() == []
            host.heal()
        await store.close()


async def test_the_primary_among_several_hosts_is_used(tmp_path: Path) -> None:
    """Of two Valkey servers in the URL it is used before and after a failover."""
    with ExitStack() as running:
        directories = [tmp_path / "primary", tmp_path / "replica"]
        for directory in directories:
            directory.mkdir()
        servers = [
            await asyncio.to_thread(running.enter_context, run_valkey(directory))
            for directory in directories
        ]
        primary, replica = servers
        await ask(replica, "REPLICAOF", "127.0.0.1", primary.port)
        await wait_until(partial(has_role, replica, b"connected"))
        url = f"redis://{replica.address},{primary.address}"
        transport = await RedisTransport.connect(url)
        store = await RedisCoordination.connect(url, cluster="failover")
        _, receiver = await subscribe_live(transport, 7)
        await ask(primary, "FAILOVER")
        await wait_until(partial(has_role, replica, b"master"))
        await receiver.wait_for(lambda heard: bool(heard.gaps))
        direct = await RedisTransport.connect(replica.url)
        await direct.publish([Signal(b'{"recipient":"b"}', 7)])
        await receiver.wait_for(lambda heard: b'{"recipient":"b"}' in heard.bodies)

        async def leads() -> bool:
            with suppress(CoordinationError):
                return await store.lead("me", 5)
            return False

        await wait_until(leads)
        for each in (direct, transport, store):
            await each.close()
