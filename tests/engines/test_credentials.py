"""Passwords in files, changed while they are in use: on real engines, which end the connections."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import asyncpg
import pytest

from pokebridge.coordination.base import Coordination
from pokebridge.coordination.nats import NatsCoordination
from pokebridge.coordination.postgres import PostgresCoordination
from pokebridge.coordination.redis import RedisCoordination
from pokebridge.errors import ConfigError, CoordinationError
from pokebridge.ingress.nats import NatsSource
from pokebridge.mailbox.postgres import PostgresMailbox
from pokebridge.testing.mailbox_kit import message
from pokebridge.testing.transport import subscribe_live
from pokebridge.transport.nats import NatsTransport
from tests.support import Daemon, wait_until
from tests.support.engines import run_configured_nats
from tests.support.silence import Silence
from tests.transport.outages import assert_hears

USER = "jetstream: {{}}\nauthorization {{ user: me, password: {} }}"
TOKEN = "jetstream: {{}}\nauthorization {{ token: {} }}"


class Secret:
    """A file with a password, and how a server is told another one."""

    def __init__(self, path: Path, change: Callable[[str], Awaitable[None]]) -> None:
        self.path = path
        self._change = change

    async def set(self, password: str) -> None:
        """Change it in the file and at the server, which ends the connections."""
        await asyncio.to_thread(self.path.write_text, f"{password}\n")
        await self._change(password)


async def answers(store: Coordination) -> bool:
    """Whether the store can be asked."""
    try:
        await store.members()
    except CoordinationError:
        return False
    return True


# --- NATS -----------------------------------------------------------------------------------


@pytest.fixture(params=[USER, TOKEN], ids=["password", "token"])
def nats(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Secret]]:
    """The URL of a server that wants a password, and that password."""
    with run_configured_nats(tmp_path, request.param.format("first")) as server:

        async def change(password: str) -> None:
            path = tmp_path / "nats.conf"
            await asyncio.to_thread(path.write_text, request.param.format(password))
            os.kill(server.pid, signal.SIGHUP)

        path = tmp_path / "password"
        path.write_text("first")
        user = "me@" if request.param is USER else ""
        yield f"nats://{user}{server.address}?password_file={path}", Secret(path, change)


async def test_nats(nats: tuple[str, Secret], silence: Silence) -> None:
    """The transport is a gap, the store is asked again, and both go on."""
    url, secret = nats
    transport = await NatsTransport.connect(url)
    store = await NatsCoordination.connect(url, cluster="c")
    _, receiver = await subscribe_live(transport, 7)
    await secret.set("second")
    heard_again = silence("a password is changed, and its connections are ended: NATS")
    await receiver.wait_for(lambda heard: bool(heard.gaps))
    await assert_hears(transport, receiver, 7)
    heard_again()
    await wait_until(partial(answers, store))
    await store.close()
    await transport.close()


async def test_a_store_survives_that_its_file_is_away(nats: tuple[str, Secret]) -> None:
    """A file that is replaced may be missing for a moment: an outage, and no wrong setting."""
    url, secret = nats
    store = await NatsCoordination.connect(url, cluster="c")
    await asyncio.to_thread(secret.path.unlink)
    await secret._change("second")

    async def is_away() -> bool:
        return not await answers(store)

    await wait_until(is_away)
    await secret.set("third")
    await wait_until(partial(answers, store))
    await store.close()


@pytest.mark.parametrize(
    "start",
    [
        lambda url: NatsTransport.connect(f"nats://{url}"),
        lambda url: NatsCoordination.connect(f"nats://{url}", cluster="c"),
        lambda url: PostgresCoordination.connect(f"postgresql://{url}", cluster="c"),
        lambda url: PostgresMailbox.open(f"postgresql://{url}"),
        lambda url: RedisCoordination.connect(f"redis://{url}", cluster="c"),
    ],
)
async def test_a_missing_file_fails_the_start(start: Callable[[str], Awaitable[object]]) -> None:
    """One line names the option and the file."""
    with pytest.raises(ConfigError, match=r"password_file.*/nowhere"):
        await start("me@127.0.0.1:1?password_file=/nowhere")


def test_a_missing_file_fails_the_start_of_an_ingress() -> None:
    """The same, before it connects."""
    with pytest.raises(ConfigError, match=r"password_file.*/nowhere"):
        NatsSource("nats://me@127.0.0.1:1/S?password_file=/nowhere", cluster="c")


# --- PostgreSQL -----------------------------------------------------------------------------


@pytest.fixture
async def postgres_secret(own_postgres_server: Daemon, tmp_path: Path) -> Secret:
    """The password of the role ``bridge``."""
    directory = own_postgres_server._directory
    rules = "host all bridge 127.0.0.1/32 scram-sha-256\nhost all postgres 127.0.0.1/32 trust\n"
    await asyncio.to_thread((directory / "data" / "pg_hba.conf").write_text, rules)
    by_hand = await asyncpg.connect(own_postgres_server.url)
    await by_hand.execute("SELECT pg_reload_conf()")
    await by_hand.execute("CREATE ROLE bridge LOGIN PASSWORD 'first'")
    await by_hand.execute("GRANT CREATE ON DATABASE postgres TO bridge")
    await by_hand.execute("GRANT ALL ON SCHEMA public TO bridge")
    await by_hand.close()

    async def change(password: str) -> None:
        by_hand = await asyncpg.connect(own_postgres_server.url)
        await by_hand.execute(f"ALTER ROLE bridge PASSWORD '{password}'")
        ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'bridge'"
        await by_hand.execute(ended)
        await by_hand.close()

    path = tmp_path / "password"
    await asyncio.to_thread(path.write_text, "first")
    return Secret(path, change)


async def test_postgres(
    own_postgres_server: Daemon, postgres_secret: Secret, silence: Silence
) -> None:
    """No call of the mailbox fails, and at most one of the store."""
    address = own_postgres_server.address
    url = f"postgresql://bridge@{address}/postgres?password_file={postgres_secret.path}"
    mailbox = await PostgresMailbox.open(url)
    store = await PostgresCoordination.connect(url, cluster="c")
    assert (await mailbox.append(message())).version == 1
    await postgres_secret.set("second")
    answered = silence("a password is changed, and its connections are ended: PostgreSQL")
    assert (await mailbox.append(message())).version == 2
    answered()
    await wait_until(partial(answers, store))
    await store.close()
    await mailbox.close()


async def test_postgres_s_own_password_file(
    own_postgres_server: Daemon, postgres_secret: Secret, tmp_path: Path
) -> None:
    """Libpq's ``passfile`` is read again at each connection, too."""

    async def write(password: str) -> Path:
        path = tmp_path / "pgpass"
        await asyncio.to_thread(path.write_text, f"127.0.0.1:*:*:bridge:{password}\n")
        await asyncio.to_thread(path.chmod, 0o600)
        return path

    path = await write("first")
    address = own_postgres_server.address
    mailbox = await PostgresMailbox.open(f"postgresql://bridge@{address}/postgres?passfile={path}")
    await write("second")
    await postgres_secret.set("second")
    assert (await mailbox.append(message())).version == 1
    await mailbox.close()
