"""A host, or an address of a name, that is mute is no outage: real engines behind it.

The adapters bound their calls themselves, so nothing here watches a clock.
"""

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import pytest

from pokebridge.coordination.base import Coordination
from pokebridge.coordination.nats import NatsCoordination
from pokebridge.coordination.postgres import PostgresCoordination
from pokebridge.coordination.redis import RedisCoordination
from pokebridge.mailbox.postgres import PostgresMailbox
from pokebridge.testing.mailbox_kit import message
from pokebridge.transport.base import Signal, Transport
from pokebridge.transport.nats import NatsTransport
from pokebridge.transport.redis import RedisTransport
from tests.support import CutProxy, Daemon
from tests.support.mute import LIVE, MUTE, Names, mute_listener

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


SEVERAL_HOSTS = [
    ("postgres_database", use_mailbox),
    ("postgres_database", use_postgres_store),
    ("nats_server", use_nats),
    ("nats_server", use_nats_store),
]
ONE_HOST = [("valkey_server", use_redis), ("valkey_server", use_redis_store)]


def url_of(request: pytest.FixtureRequest, fixture: str) -> str:
    """The URL of the engine that ``fixture`` runs."""
    server: Any = request.getfixturevalue(fixture)
    return server if isinstance(server, str) else str(server.url)


@pytest.mark.parametrize(("server", "use"), [*SEVERAL_HOSTS, *ONE_HOST])
async def test_the_second_address_of_a_name_is_used(
    request: pytest.FixtureRequest, names: Names, server: str, use: Use, mute: Mute
) -> None:
    """The first address of the engine's name is mute."""
    url = url_of(request, server)
    names("engine.test", [MUTE, LIVE])
    with mute(port=urlsplit(url).port):
        await use(url.replace(LIVE, "engine.test"))


@pytest.mark.parametrize(("server", "use"), SEVERAL_HOSTS)
async def test_the_second_host_is_used(
    request: pytest.FixtureRequest, server: str, use: Use, mute: Mute
) -> None:
    """The first host in the URL is mute."""
    url = url_of(request, server)
    with mute() as first:
        await use(url.replace(LIVE, f"{first},{LIVE}"))


async def test_a_mailbox_goes_on_when_its_first_host_falls_mute(
    postgres_database: str, postgres_server: Daemon
) -> None:
    """The calls that it has interrupted succeed at the second host, and so do the next."""
    async with CutProxy(LIVE, postgres_server.port) as first:
        url = postgres_database.replace(LIVE, f"{first.address},{LIVE}")
        mailbox = await PostgresMailbox.open(url)
        await mailbox.append(message())
        first.cut()
        assert (await mailbox.append(message())).version == 2
        assert (await mailbox.append(message())).version == 3
        await mailbox.close()
