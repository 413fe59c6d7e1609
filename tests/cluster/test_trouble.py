"""What a real instance says when its engine can't be had: at its start, and in ``/readyz``."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import valkey

from pokebridge.testing.pubsub import PubSubServer
from tests.cluster import starts
from tests.support import Daemon, Instance, Serve, free_port, wait_until
from tests.support.engines import BIN

USERS = """authorization { users = [
    { user: bridge, password: %s %s }
    { user: mute, password: pw, permissions: { subscribe: ["other"] } } ] }"""
TAKEN_AWAY = ', permissions: { subscribe: ["other"] }'
MAY_NOT_PUBLISH = ', permissions: { publish: ["other"] }'
ACL = ("on", ">pw", "+@all", "resetchannels")
CHANNELS = ("&push-notifications", "&push-notifications.*", "&push-notifications-all")
TIMEOUT_S = 100.0


class Failure(NamedTuple):
    """A start that can't be: its transport, its exit status, and what the one line has in it."""

    transport: str
    status: int
    said: Sequence[str]


class Nats(Daemon):
    """A server with users, one of whom may not subscribe."""

    def __init__(self, directory: Path) -> None:
        port = free_port()
        self._config = directory / "nats.conf"
        command = [str(BIN / "nats-server"), "--config", str(self._config)]
        super().__init__("nats", command, port=port, url="", directory=directory)

    def configure(self, permissions: str, password: str = "pw") -> None:
        """What the user ``bridge`` may do from the next start or reload on."""
        listen = f"listen: 127.0.0.1:{self.port}\n"
        self._config.write_text(listen + USERS % (password, permissions) + "\n")


@pytest.fixture
def nats_with_users(tmp_path: Path) -> Iterator[Nats]:
    """A server where ``bridge:pw`` may do everything."""
    server = Nats(tmp_path)
    server.configure("")
    server.start()
    yield server
    server.kill()


@pytest.fixture
async def pubsub(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[PubSubServer]:
    """A Pub/Sub server that knows one project."""
    async with PubSubServer(projects={"a-project"}) as server:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", server.address)
        yield server


def assert_is_one_line(failure: Failure, status: int | None, out: str) -> None:
    """It ended as it should, with one clear line and no traceback; no password is in it."""
    assert status == failure.status, out
    (line,) = out.splitlines()
    assert line.startswith("pokebridge: ")
    for said in failure.said:
        assert said in line
    assert "s3cret" not in line


async def assert_fails(failure: Failure) -> None:
    """Start an instance, which ends by itself."""
    settings = {"transport": failure.transport, "mailbox": "memory://"}
    status, out = await asyncio.to_thread(starts.failing_instance, settings)
    assert_is_one_line(failure, status, out)


async def test_a_start_that_can_not_be_is_one_clear_line(
    nats_with_users: Nats, own_valkey_server: Daemon
) -> None:
    """A permission that is missing, a wrong password, a broker that is not there.

    Status 1 is for an engine that can't be had now.
    """
    with valkey.Valkey(port=own_valkey_server.port) as admin:
        admin.execute_command("ACL", "SETUSER", "mute", *ACL, "&other")
    nats, redis = nats_with_users.address, own_valkey_server.address
    nowhere = f"127.0.0.1:{free_port()}"
    failures = [
        Failure(f"nats://mute:pw@{nats}", 1, [nats, "no subscription permission"]),
        Failure(f"nats://bridge:s3cret@{nats}", 1, [nats, "Authorization"]),
        Failure(f"nats://bridge:s3cret@{nowhere}", 1, [nowhere, "refused"]),
        Failure(f"redis://mute:pw@{redis}/0", 1, [redis, "permission"]),
        Failure(f"redis://mute:s3cret@{redis}/0", 1, [redis, "password"]),
        Failure(f"redis://mute:s3cret@{nowhere}/0", 1, [nowhere, "refused"]),
    ]
    async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as group:
        for failure in failures:
            group.create_task(assert_fails(failure))


async def test_a_start_without_pubsub_is_one_clear_line(
    pubsub: PubSubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No such project, a permission that is missing, a service that can't be reached.

    Status 2 is for what somebody has to correct in a setting.
    """
    wrong = [
        Failure("pubsub://no-such-project", 2, ["project no-such-project is unknown"]),
        Failure("pubsub://Not_A_Project", 2, ["'Not_A_Project' is not a valid project"]),
    ]
    async with asyncio.timeout(TIMEOUT_S):
        for failure in wrong:
            await assert_fails(failure)
        # The start waits only half a second for a stream's refusal. Readiness reports later ones.
        for status, method, permission in (
            (2, "CreateTopic", "pubsub.topics.create"),
            (1, "CreateSubscription", "pubsub.subscriptions.create"),
        ):
            pubsub.deny(method)
            await assert_fails(Failure("pubsub://a-project", status, [permission]))
            pubsub.allow(method)
        nowhere = f"127.0.0.1:{free_port()}"
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", nowhere)
        unreachable = Failure("pubsub://a-project", 1, [nowhere, "is unreachable"])
        await assert_fails(unreachable)


@pytest.mark.parametrize("missing", [("nats", "nats"), ("redis", "redis"), ("pubsub", "google")])
def test_a_missing_driver_is_one_clear_line(missing: tuple[str, str], tmp_path: Path) -> None:
    """It names the extra to install."""
    scheme, package = missing
    without = f"import sys; sys.modules[{package!r}] = None; import pokebridge.cli as c; c.main()"
    flags = ("serve", "--dev", "--mailbox", "memory://", "--transport", f"{scheme}://a-host")
    done = subprocess.run(
        [sys.executable, "-c", without, *flags],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    failure = Failure(scheme, 2, [f"pip install 'pokebridge[{scheme}]'"])
    assert_is_one_line(failure, done.returncode, done.stdout)


async def readiness(instance: Instance) -> tuple[int, str]:
    """The status and the text of ``/readyz``."""
    async with instance.async_http() as http:
        answer = await http.get("/readyz")
    return answer.status_code, answer.text


async def assert_red_then_green(
    instance: Instance,
    reason: str,
    break_it: Callable[[], object],
    mend_it: Callable[[], object],
) -> None:
    """Readiness says why while it is broken, and recovers by itself."""

    async def says(status: int, text: str) -> bool:
        found, said = await readiness(instance)
        return found == status and text in said

    assert (await readiness(instance))[0] == 200
    await asyncio.to_thread(break_it)
    await wait_until(lambda: says(503, reason), 40, f"{reason!r} in /readyz")
    await asyncio.to_thread(mend_it)
    await wait_until(lambda: says(200, ""), 40, "readiness")


Fault = tuple[str, Callable[[], object], Callable[[], object]]
"""What readiness says of it, what breaks something, and what mends it."""


def nats_faults(server: Nats) -> list[Fault]:
    """Permissions and the password."""

    def reload(permissions: str = "", password: str = "pw") -> Callable[[], None]:
        def reload() -> None:
            server.configure(permissions, password)
            os.kill(server.pid, signal.SIGHUP)

        return reload

    return [
        ("no subscription permission", reload(TAKEN_AWAY), reload()),
        ("no publish permission", reload(MAY_NOT_PUBLISH), reload()),
        ("Authorization Violation", reload(password="other"), reload()),
    ]


def redis_faults(admin: Any) -> list[Fault]:
    """Permissions, the password, and a server that becomes a replica."""

    def ask(*words: object) -> Callable[[], object]:
        return lambda: admin.execute_command(*words)

    def acl(*rules: str) -> Callable[[], object]:
        return ask("ACL", "SETUSER", "bridge", *rules)

    def change_password() -> None:
        acl("resetpass", ">other")()
        ask("CLIENT", "KILL", "USER", "bridge")()

    return [
        ("permission", acl("resetchannels"), acl(*CHANNELS)),
        ("permission", acl("-publish"), acl("+publish")),
        ("password", change_password, acl("resetpass", ">pw")),
        ("replica", ask("REPLICAOF", "127.0.0.1", free_port()), ask("REPLICAOF", "NO", "ONE")),
    ]


def pubsub_faults(server: PubSubServer) -> list[Fault]:
    """Permissions."""
    loop = asyncio.get_running_loop()

    def in_loop(call: Callable[[], None]) -> Callable[[], object]:
        return lambda: loop.call_soon_threadsafe(call)

    def deny(method: str) -> Callable[[], object]:
        def deny() -> None:
            server.deny(method)
            server.break_streams()

        return in_loop(deny)

    def allow(method: str) -> Callable[[], object]:
        return in_loop(lambda: server.allow(method))

    return [
        ("pubsub.subscriptions.consume", deny("StreamingPull"), allow("StreamingPull")),
        ("pubsub.topics.publish", deny("Publish"), allow("Publish")),
    ]


@pytest.mark.long
async def test_readiness_says_what_is_wrong_later(
    nats_with_users: Nats, own_valkey_server: Daemon, pubsub: PubSubServer, serve: Serve
) -> None:
    """An engine that goes and returns ends no task and does not flood the log."""
    admin: Any = valkey.Valkey(port=own_valkey_server.port)
    admin.execute_command("ACL", "SETUSER", "bridge", *ACL, *CHANNELS)
    faults = {
        f"nats://bridge:pw@{nats_with_users.address}": nats_faults(nats_with_users),
        f"redis://bridge:pw@{own_valkey_server.address}/0": redis_faults(admin),
        "pubsub://a-project": pubsub_faults(pubsub),
    }

    async def act(transport: str) -> None:
        instance = await asyncio.to_thread(serve, transport=transport, mailbox="memory://")
        for fault in faults[transport]:
            await assert_red_then_green(instance, *fault)
        log = instance.log()
        assert "Traceback" not in log
        assert "task_failed" not in log
        assert log.count("transport_reconnect_failed") <= 2 * len(faults[transport]), log

    async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as group:
        for transport in faults:
            group.create_task(act(transport))
    admin.close()
