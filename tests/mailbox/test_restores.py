"""A mailbox goes back in time under connected clients: nothing sent after that is ever skipped.

The clients are of this release and of 0.1.0, each in a process of its own. They are stopped
(SIGSTOP) for as long as the versions pass their cursors, as a client on a slow line might be.
"""

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import zipfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import asyncpg
import httpx
import pytest

from pokebridge.mailbox.postgres import PostgresMailbox
from pokebridge.testing.mailbox_kit import message
from tests.compat.test_rolling_upgrade import POLICY, WHEEL, environ
from tests.mailbox.test_failover import cut_off
from tests.support import Daemon, Instance, Serve, wait_until
from tests.support.engines import POSTGRES, promote, run_standby
from tests.support.silence import Silence

LISTEN = Path(__file__).parents[1] / "compat" / "listen.py"
BOB = "urn:user:bob"
DEVICES = ("of-this-release", "of-0.1.0")
TIMEOUT_S = 30.0


class Clients:
    """One client of each release, and what each has pulled."""

    def __init__(self) -> None:
        self.got: dict[str, list[str]] = {device: [] for device in DEVICES}
        self.processes: list[Process] = []

    async def have(self, bodies: list[str]) -> None:
        """Wait until both have pulled ``bodies``."""

        def missing() -> dict[str, set[str]]:
            return {it: left for it in DEVICES if (left := set(bodies).difference(self.got[it]))}

        try:
            await wait_until(lambda: not missing(), TIMEOUT_S)
        except TimeoutError:
            raise AssertionError(f"skipped: {missing()}") from None

    def signal(self, number: signal.Signals) -> None:
        """Stop both, or let them go on."""
        for process in self.processes:
            process.send_signal(number)

    async def read(self, device: str, lines: asyncio.StreamReader) -> None:
        """Keep what the client of ``device`` prints."""
        async for text in lines:
            line = json.loads(text)
            if "body" in line:
                self.got[device].append(line["body"])


@asynccontextmanager
async def connected(instance: Instance, directory: Path) -> AsyncIterator[Clients]:
    """Both clients, connected to ``instance``."""
    old = directory / "0.1.0"
    await asyncio.to_thread(zipfile.ZipFile(WHEEL).extractall, old)
    clients = Clients()
    async with instance.async_http(BOB) as http:
        for device in DEVICES:  # registered, so that the first device's ack deletes no message
            (await http.get("/v1/messages", params={"device": device})).raise_for_status()
    async with AsyncExitStack() as stack:
        group = await stack.enter_async_context(asyncio.TaskGroup())
        for device, python_path in zip(DEVICES, (None, old), strict=True):
            client = {
                "url": instance.url,
                "token": instance.token(BOB),
                "device": device,
                "policy": POLICY,
            }
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                str(LISTEN),
                json.dumps([client]),
                stdout=PIPE,
                stderr=DEVNULL,
                env=environ(python_path),
            )
            clients.processes.append(process)
            assert process.stdout is not None
            group.create_task(clients.read(device, process.stdout))
        try:
            yield clients
        finally:
            for process in clients.processes:
                process.kill()
                await process.wait()


async def send(instance: Instance, name: str, count: int) -> list[str]:
    """Send bob ``count`` messages, again and again until each is taken. Returns their bodies."""
    bodies = [f"{name}-{number}" for number in range(count)]
    async with instance.async_http("urn:backend", "send") as http:
        for body in bodies:
            message = {"recipient": BOB, "body": body, "id": body}

            async def is_taken(message: dict[str, str] = message) -> bool:
                try:
                    return (await http.post("/v1/messages", json=message)).is_success
                except httpx.TransportError:
                    return False

            await wait_until(is_taken, TIMEOUT_S)
    return bodies


async def all_arrive_afterwards(instance: Instance, clients: Clients, old_head: int) -> None:
    """Many messages, that pass the cursors of stopped clients, reach these; later ones as well."""
    clients.signal(signal.SIGSTOP)
    many = await send(instance, "many", old_head + 5)
    clients.signal(signal.SIGCONT)
    await clients.have(many)
    few = await send(instance, "few", 5)
    await clients.have(few)


def run_postgres_tool(name: str, *arguments: str) -> None:
    """Run one of PostgreSQL's programs."""
    command = [str(POSTGRES / "pginstall/bin" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("is_slow", [False, True])
async def test_a_restored_dump(
    serve: Serve,
    nats_server: Daemon,
    postgres_database: str,
    tmp_path: Path,
    silence: Silence,
    is_slow: bool,  # noqa: FBT001
) -> None:
    """pg_restore puts back the dump of version 10 while the instance runs, at version 20."""
    instance = await asyncio.to_thread(serve, transport=nats_server.url, mailbox=postgres_database)
    dump = str(tmp_path / "dump")
    async with connected(instance, tmp_path) as clients:
        await clients.have(await send(instance, "before", 10))
        saving = ("--format=custom", "--schema=pokebridge", "--file", dump, postgres_database)
        await asyncio.to_thread(run_postgres_tool, "pg_dump", *saving)
        await clients.have(await send(instance, "lost", 10))
        restoring = ("--clean", "--if-exists", "--single-transaction", "--dbname")
        await asyncio.to_thread(
            run_postgres_tool, "pg_restore", *restoring, postgres_database, dump
        )
        if is_slow:
            await all_arrive_afterwards(instance, clients, 20)
        else:
            heard = silence("a PostgreSQL mailbox goes back in time by a restored dump")
            await clients.have(await send(instance, "few", 5))
            heard()


@pytest.mark.parametrize("emptying", ["TRUNCATE", "DELETE FROM"])
async def test_restored_data_alone(postgres_database: str, tmp_path: Path, emptying: str) -> None:
    """The data of a dump goes into tables that are there: each message counts once in a share."""
    mailbox = await PostgresMailbox.open(postgres_database)
    by_hand = await asyncpg.connect(postgres_database)
    shares = "SELECT * FROM pokebridge.shares ORDER BY sender"
    dump = str(tmp_path / "dump")
    for sender in ("urn:alice", "urn:alice", "urn:eve"):
        await mailbox.append(message(sender=sender))
    before = await by_hand.fetch(shares)
    saving = ("--format=custom", "--schema=pokebridge", "--file", dump, postgres_database)
    await asyncio.to_thread(run_postgres_tool, "pg_dump", *saving)
    await mailbox.append(message(sender="urn:eve"))
    tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'pokebridge'"
    for (table,) in await by_hand.fetch(tables):
        await by_hand.execute(f"{emptying} pokebridge.{table}")
    restoring = ("--data-only", "--single-transaction", "--dbname", postgres_database, dump)
    await asyncio.to_thread(run_postgres_tool, "pg_restore", *restoring)
    assert await by_hand.fetch(shares) == before
    await by_hand.close()
    await mailbox.close()


async def test_a_failover_that_loses_commits(
    serve: Serve,
    nats_server: Daemon,
    own_postgres_server: Daemon,
    tmp_path: Path,
    silence: Silence,
) -> None:
    """The primary dies, and the standby that is promoted lacks the last five messages."""
    with run_standby(own_postgres_server) as standby:
        hosts = f"{own_postgres_server.address},{standby.address}"
        url = f"postgresql://postgres@{hosts}/postgres"
        instance = await asyncio.to_thread(serve, transport=nats_server.url, mailbox=url)
        async with connected(instance, tmp_path) as clients:
            await clients.have(await send(instance, "before", 5))
            on_standby = await asyncpg.connect(standby.url)
            await cut_off(on_standby, own_postgres_server)
            await clients.have(await send(instance, "lost", 5))
            heard = silence("PostgreSQL's primary dies, and a standby that lags is promoted")
            await asyncio.to_thread(own_postgres_server.kill)
            await promote(on_standby)
            await on_standby.close()
            await clients.have(await send(instance, "few", 4))
            heard()
            await all_arrive_afterwards(instance, clients, 10)


async def test_a_restored_sqlite_file(serve: Serve, tmp_path: Path) -> None:
    """The file of version 10 is put back while the instance is down, at version 20."""
    (tmp_path / "box").mkdir()
    path = tmp_path / "box" / "mailbox.db"
    instance = await asyncio.to_thread(serve, mailbox=f"sqlite:///{path}")
    async with connected(instance, tmp_path) as clients:
        await clients.have(await send(instance, "before", 10))
        await asyncio.to_thread(instance.terminate)
        await asyncio.to_thread(shutil.copytree, path.parent, tmp_path / "saved")
        await asyncio.to_thread(instance.start)
        await clients.have(await send(instance, "lost", 10))
        clients.signal(signal.SIGSTOP)
        await asyncio.to_thread(instance.kill)
        await asyncio.to_thread(shutil.rmtree, path.parent)
        await asyncio.to_thread(shutil.copytree, tmp_path / "saved", path.parent)
        await asyncio.to_thread(instance.start)
        await all_arrive_afterwards(instance, clients, 20)


async def test_a_deleted_sqlite_file(serve: Serve, tmp_path: Path) -> None:
    """Once the file is gone nothing is answered 202, and the instance is not ready; a start helps.

    The log says it in one line.
    """
    path = tmp_path / "mailbox.db"
    instance = await asyncio.to_thread(serve, mailbox=f"sqlite:///{path}")
    async with connected(instance, tmp_path) as clients:
        await clients.have(await send(instance, "before", 5))
        clients.signal(signal.SIGSTOP)
        path.unlink()
        async with (
            instance.async_http("urn:backend", "send") as sender,
            instance.async_http(BOB) as reader,
        ):
            for number in range(5):
                message = {"recipient": BOB, "body": f"refused-{number}"}
                answer = await sender.post("/v1/messages", json=message)
                assert answer.status_code == httpx.codes.SERVICE_UNAVAILABLE
            assert (await reader.get("/v1/messages")).status_code == answer.status_code
            assert (await reader.get("/readyz")).status_code == answer.status_code
        assert instance.log().count("mailbox_file_gone") == 1
        await asyncio.to_thread(instance.restart)
        await all_arrive_afterwards(instance, clients, 5)
