"""The engines that the tests start are real, answer, and come back after they were killed."""

import asyncio
import uuid

import asyncpg
import nats
import pytest
import redis.asyncio
from google.pubsub_v1.services.publisher import PublisherAsyncClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcAsyncIOTransport
from grpc.aio import insecure_channel

from tests.support import Daemon, engines


async def _nats_answers(url: str) -> None:
    client = await nats.connect(url)
    subscription = await client.subscribe("greeting")
    await client.publish("greeting", b"hello")
    message = await subscription.next_msg(timeout=5)
    await client.close()
    assert message.data == b"hello"


async def _valkey_answers(url: str) -> None:
    async with redis.asyncio.from_url(url) as client:
        assert await client.ping()


async def _postgres_answers(url: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        assert await connection.fetchval("SELECT 6 * 7") == 42
    finally:
        await connection.close()


async def _pubsub_answers(address: str) -> None:
    transport = PublisherGrpcAsyncIOTransport(channel=insecure_channel(address))
    async with PublisherAsyncClient(transport=transport) as client:
        name = f"projects/test-{uuid.uuid4().hex}/topics/greeting"
        assert (await client.create_topic(name=name)).name == name


ANSWERS = {
    "nats": _nats_answers,
    "valkey": _valkey_answers,
    "postgres": _postgres_answers,
}


@pytest.mark.parametrize("engine", ANSWERS)
async def test_a_shared_engine_answers(engine: str, request: pytest.FixtureRequest) -> None:
    """A driver can talk to the session's server."""
    server: Daemon = request.getfixturevalue(f"{engine}_server")
    await ANSWERS[engine](server.url)


async def test_the_emulator_answers(pubsub_emulator: str) -> None:
    """Google's client can create a topic in the session's emulator."""
    await _pubsub_answers(pubsub_emulator)


@pytest.mark.parametrize("engine", ANSWERS)
async def test_an_engine_of_ones_own_comes_back_on_its_port(
    engine: str, request: pytest.FixtureRequest
) -> None:
    """After a kill nothing answers. After a restart the same URL answers again."""
    server: Daemon = request.getfixturevalue(f"own_{engine}_server")
    first_pid = server.pid
    await asyncio.to_thread(server.kill)
    with pytest.raises(OSError, match=r"refused|Connect call failed"):
        await asyncio.open_connection("127.0.0.1", server.port)
    await asyncio.to_thread(server.restart)
    await ANSWERS[engine](server.url)
    assert server.pid != first_pid


async def test_an_emulator_of_ones_own_comes_back_on_its_port(own_pubsub_emulator: Daemon) -> None:
    """The emulator stops when told to, and answers again at the same address."""
    await asyncio.to_thread(own_pubsub_emulator.restart)
    await _pubsub_answers(own_pubsub_emulator.address)


async def test_every_database_is_new(postgres_database: str, postgres_server: Daemon) -> None:
    """A test's database is empty and not the server's own."""
    assert postgres_database != postgres_server.url
    connection = await asyncpg.connect(postgres_database)
    tables = await connection.fetchval(
        "SELECT count(*) FROM information_schema.tables WHERE table_schema = 'public'"
    )
    await connection.close()
    assert tables == 0


def test_postgres_runs_from_a_copy_where_its_user_can_not_reach_it(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL also runs from a checkout in a private home directory."""
    hidden = tmp_path_factory.mktemp("private")  # mode 0700, as pytest makes it
    link = hidden / engines.POSTGRES.name
    link.symlink_to(engines.POSTGRES)
    (hidden / f"{link.name}.libs").symlink_to(engines.POSTGRES.with_suffix(".libs"))
    monkeypatch.setattr(engines, "POSTGRES", link)
    with engines.run_postgres() as server:
        assert server.is_running()
