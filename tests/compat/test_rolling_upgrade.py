"""A rolling upgrade from release 0.1.0 and back, with clients of both releases connected.

The release is kept as it was published: the wheel, and the JavaScript client as ``npm pack`` made
it. It runs with the dependencies of the checkout, so each of those that 0.1.0 imports has to stay
installed for development.
"""

import asyncio
import json
import os
import subprocess
import sys
import tarfile
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import Daemon, Instance, free_port, wait_until
from tests.support.missing import require
from tests.support.serving import JWT_SECRET, owners_in

HERE = Path(__file__).parent
WHEEL = HERE / "pokebridge-0.1.0-py3-none-any.whl"
JS_PACKAGE = HERE / "pokebridge-client-0.1.0.tgz"
NAMES = ("a", "b")
SHARDS = 8
RECIPIENTS = [f"urn:user:{number}" for number in range(4)]
DEVICES = ("python-old", "python-new", "js-old", "js-new")
DOC = "urn:doc:7"
LISTENING = ("python-new", "js-new")
"""The devices whose first client listens to DOC, too."""
HEARD = [
    *((device, recipient) for device in DEVICES for recipient in RECIPIENTS),
    *((device, DOC) for device in LISTENING),
]
"""Every device, with each recipient whose messages it pulls."""
# Reconnects soon and never pulls without a poke, so each message that arrives was poked.
POLICY = {"base_s": 0.05, "cap_s": 1.0, "poll_after_s": 600}
SEND_EVERY_S = 0.05
TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Release:
    """0.1.0, unpacked."""

    python_path: Path
    """What ``PYTHONPATH`` has to be for ``import pokebridge`` to find the release."""
    js_module: Path


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """Release 0.1.0, installed beside the checkout and not over it."""
    directory = tmp_path_factory.mktemp("release")
    target = directory / "python"
    uv = Path(sys.executable).with_name("uv")
    install = [str(uv), "pip", "install", "--quiet", "--offline", "--no-deps", str(WHEEL)]
    subprocess.run([*install, "--python", sys.executable, "--target", str(target)], check=True)
    with tarfile.open(JS_PACKAGE) as package:
        package.extractall(directory, filter="data")
    return Release(target, directory / "package" / "dist" / "index.js")


def environ(python_path: Path | None) -> dict[str, str]:
    """The environment of the release in ``python_path``, or of the checkout."""
    env = dict(os.environ)
    env.pop("PYTHONPATH", None)
    return env | ({"PYTHONPATH": str(python_path)} if python_path else {})


@dataclass
class Cluster:
    """Two places for an instance, each with a port of its own; either release can run there."""

    release: Release
    settings: Mapping[str, object]
    directory: Path
    ports: Mapping[str, int] = field(default_factory=lambda: {name: free_port() for name in NAMES})
    running: dict[str, Instance] = field(default_factory=dict)

    async def run(self, name: str, *, old: bool) -> None:
        """Replace what runs at ``name``, if anything does, as a rolling upgrade would."""
        if name in self.running:
            assert await asyncio.to_thread(self.running[name].terminate) == 0
        settings = {"instance": name, **self.settings}
        env = environ(self.release.python_path if old else None)
        env |= {f"POKEBRIDGE_{key.upper()}": str(value) for key, value in settings.items()}
        self.running[name] = Instance(name, ["--dev"], env, self.directory, self.ports[name])
        await asyncio.to_thread(self.running[name].start)

    async def kill(self) -> None:
        """Leave nothing behind."""
        for instance in self.running.values():
            await asyncio.to_thread(instance.kill)

    async def views(self) -> list[Any]:
        """The cluster as each instance sees it."""
        views = []
        for instance in self.running.values():
            async with instance.async_http("urn:admin", "admin") as http:
                views.append((await http.get("/v1/cluster")).json())
        return views

    async def agree(self, mode: str, *, own_sockets: int | None = None) -> None:
        """Wait until both read the same map, hold what it gives them, and know all sessions.

        At an instance of 0.1.0 what is listened to has a socket of its own. ``None``: it depends on
        where these clients are how many there are.
        """
        views: list[Any] = []
        more = range(len(LISTENING) + 1) if own_sockets is None else [own_sockets]

        async def do_agree() -> bool:
            views[:] = await self.views()
            return all(self._is_whole(view, mode, more) for view in views) and same(views)

        def same(views: list[Any]) -> bool:
            return len({json.dumps([view["epoch"], owners_in(view)]) for view in views}) == 1

        try:
            await wait_until(do_agree, TIMEOUT_S)
        except TimeoutError:
            raise AssertionError(f"not both {mode}: {json.dumps(views, indent=1)}") from None

    @staticmethod
    def _is_whole(view: Any, mode: str, more: Collection[int]) -> bool:
        members = view["instances"]
        sessions = sum(each["sessions"] for each in members)
        return (
            view["mode"] == mode
            and sorted(each["id"] for each in members) == list(NAMES)
            and all(each["state"] == "active" and each["settled"] for each in members)
            and all(each["epoch"] == view["epoch"] for each in members)
            and (mode == "fanout" or sorted(owners_in(view)) == list(range(SHARDS)))
            and sessions - len(RECIPIENTS) * len(DEVICES) in more
        )


@dataclass
class Traffic:
    """What was sent to each recipient, and what each of the devices has pulled."""

    cluster: Cluster
    sent: dict[str, list[str]] = field(
        default_factory=lambda: {each: [] for each in (*RECIPIENTS, DOC)}
    )
    pulled: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    """By device and recipient."""

    async def send_steadily(self) -> None:
        """Send to each recipient in turn; each message names its recipient and its number."""
        number = 0
        while True:
            for recipient in (*RECIPIENTS, DOC):
                number += 1
                await self._send(recipient, f"{recipient} {number}")
                await asyncio.sleep(SEND_EVERY_S)

    async def _send(self, recipient: str, body: str) -> None:
        """Send by the instances in turn; when one is away, by the next, as a balancer would."""
        message = {"recipient": recipient, "body": body, "id": body.replace(" ", "-")}
        while True:
            for name in NAMES if len(self.sent[recipient]) % 2 else reversed(NAMES):
                instance = self.cluster.running[name]
                async with instance.async_http("urn:backend", "send") as http:
                    with suppress(httpx.TransportError):
                        answer = await http.post("/v1/messages", json=message)
                        if answer.is_success:
                            self.sent[recipient].append(body)
                            return
            await asyncio.sleep(SEND_EVERY_S)

    async def everybody_pulls(self, more: int = 3) -> None:
        """Wait until all devices have pulled all messages, ``more`` that are sent now included."""
        expected = {each: len(bodies) + more for each, bodies in self.sent.items()}

        def silent() -> dict[tuple[str, str], int]:
            have = {pair: set(self.pulled.get(pair, [])) for pair in HEARD}
            want = {each: bodies[: expected[each]] for each, bodies in self.sent.items()}
            return {
                pair: missing
                for pair in HEARD
                if (missing := expected[pair[1]] - len(have[pair].intersection(want[pair[1]])))
            }

        try:
            await wait_until(lambda: not silent(), TIMEOUT_S)
        except TimeoutError:
            raise AssertionError(f"missing messages: {silent()}") from None
        await self._everybody_acks(expected)

    async def _everybody_acks(self, upto: Mapping[str, int]) -> None:
        """Wait until these versions are deleted: each device has acked, over socket or HTTP."""

        async def are_deleted() -> bool:
            for recipient, version in upto.items():
                async with self.cluster.running["a"].async_http(recipient) as http:
                    page = (await http.get("/v1/messages", params={"limit": 1})).json()
                if any(message["version"] <= version for message in page["messages"]):
                    return False
            return True

        await wait_until(are_deleted, TIMEOUT_S, "acks of all devices")

    async def introduce_devices(self) -> None:
        """Make all devices known: a message that all known devices have acked is deleted."""
        for device, recipient in HEARD:
            async with self.cluster.running["a"].async_http(recipient) as http:
                answer = await http.get("/v1/messages", params={"device": device})
                answer.raise_for_status()

    @asynccontextmanager
    async def device(
        self, device: str, *command: str, python_path: Path | None
    ) -> AsyncIterator[None]:
        """Run the clients of ``device``: one a recipient, by turns at either instance."""
        turn = DEVICES.index(device)
        instances = [self.cluster.running[name] for name in NAMES]
        clients: list[dict[str, object]] = [
            {
                "url": instances[(turn + number) % 2].url,
                "token": instances[0].token(recipient),
                "device": device,
                "policy": POLICY,
            }
            for number, recipient in enumerate(RECIPIENTS)
        ]
        if device in LISTENING:
            clients[0]["listen"] = {DOC: instances[0].token(DOC)}
        process = await asyncio.create_subprocess_exec(
            *command, json.dumps(clients), stdout=PIPE, stderr=DEVNULL, env=environ(python_path)
        )
        assert process.stdout is not None
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(self._read(process.stdout, python_path))
            try:
                yield
            finally:
                reading.cancel()
                process.kill()
                await process.communicate()

    async def _read(self, lines: asyncio.StreamReader, python_path: Path | None) -> None:
        async for text in lines:
            line = json.loads(text)
            if "package" in line:
                is_old = python_path is not None and Path(line["package"]).is_relative_to(
                    python_path
                )
                assert is_old == (python_path is not None), line
            else:
                recipient = line["body"].split()[0]
                self.pulled.setdefault((line["device"], recipient), []).append(line["body"])
        raise AssertionError("a client's process has ended")


@asynccontextmanager
async def everybody(cluster: Cluster, client_package: Path, node: str) -> AsyncIterator[Traffic]:
    """All devices of all recipients, and messages that are sent to them all the time."""
    traffic = Traffic(cluster)
    await traffic.introduce_devices()
    old = cluster.release.python_path
    python = (sys.executable, str(HERE / "listen.py"))
    js = (node, str(HERE / "listen.mjs"))
    async with AsyncExitStack() as stack:
        for device in (
            traffic.device("python-old", *python, python_path=old),
            traffic.device("python-new", *python, python_path=None),
            traffic.device("js-old", *js, str(cluster.release.js_module), python_path=None),
            traffic.device("js-new", *js, str(client_package / "dist/index.js"), python_path=None),
        ):
            await stack.enter_async_context(device)
        group = await stack.enter_async_context(asyncio.TaskGroup())
        sending = group.create_task(traffic.send_steadily())
        yield traffic
        sending.cancel()


async def migrate(instance: Instance, mode: str) -> None:
    """Ask ``instance`` to have the cluster migrated."""
    async with instance.async_http("urn:admin", "admin") as http:
        answer = await http.put("/v1/cluster/mode", json={"mode": mode})
    assert answer.status_code == httpx.codes.ACCEPTED, answer.text


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "coordination", ["postgresql", pytest.param("nats", marks=pytest.mark.long)]
)
async def test_there_and_back(
    release: Release,
    client_package: Path,
    nats_server: Daemon,
    postgres_database: str,
    tmp_path: Path,
    coordination: str,
) -> None:
    """Old and new instances are one cluster in both modes, whoever leads; no client is silent.

    A new client that listens to more has a socket for each recipient at an old instance, and one
    for all at a new one.
    """
    settings = {
        "jwt_secret": JWT_SECRET,
        "transport": nats_server.url,
        "mailbox": postgres_database,
        "coordination": postgres_database if coordination == "postgresql" else nats_server.url,
        "cluster": tmp_path.name.replace("_", "-"),
        "mode": "fanout",
        "shard_count": SHARDS,
        "lease_s": 1,
        "drain_s": 0.3,
    }
    cluster = Cluster(release, settings, tmp_path)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(cluster.kill)
        await asyncio.gather(*(cluster.run(name, old=True) for name in NAMES))
        traffic = await stack.enter_async_context(
            everybody(cluster, client_package, require("node"))
        )
        await traffic.everybody_pulls()

        await cluster.run("b", old=False)  # the old one leads
        await cluster.agree("fanout")
        await traffic.everybody_pulls()
        await migrate(cluster.running["b"], "partitioned")
        await cluster.agree("partitioned")
        await traffic.everybody_pulls()

        await cluster.run("a", old=False)
        await cluster.agree("partitioned", own_sockets=0)
        await traffic.everybody_pulls()

        await cluster.run("a", old=True)  # the new one leads
        await cluster.agree("partitioned")
        await traffic.everybody_pulls()
        await migrate(cluster.running["a"], "fanout")
        await cluster.agree("fanout")
        await traffic.everybody_pulls()

        await cluster.run("b", old=True)
        await cluster.agree("fanout", own_sockets=len(LISTENING))
        await traffic.everybody_pulls()
