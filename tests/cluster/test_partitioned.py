"""Three real instances that divide the shards among themselves: the second phase."""

import asyncio
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import websockets
from nats.aio.client import Client as NatsClient
from websockets.asyncio.client import ClientConnection as Socket

from pokebridge.sharding import shard_of
from pokebridge.telemetry import Metric
from tests.cluster.clusters import metrics, run_command
from tests.cluster.traffic import frames, next_frame
from tests.support import Daemon, Instance, Serve, wait_until
from tests.support.engines import run_nats, run_pubsub_emulator, run_pubsub_server
from tests.support.missing import missing
from tests.support.serving import JWT_SECRET, owners_in

NAMES = ("one", "two", "three")
SHARDS = 12
TIMEOUT_S = 200.0


@dataclass
class Cluster:
    """Partitioned instances, and who owns what."""

    instances: Mapping[str, Instance]
    before: Mapping[str, int] = field(default_factory=dict)
    """How many pokes had reached each before the test."""

    async def view(self) -> Any:
        """The cluster as the first instance sees it."""
        first = next(iter(self.instances.values()))
        async with first.async_http("urn:admin", "admin") as http:
            return (await http.get("/v1/cluster")).json()

    async def settled(self, mode: str = "partitioned") -> None:
        """Return when all instances hold what an even map gives them."""

        async def is_settled() -> bool:
            view = await self.view()
            members = view["instances"]
            return (
                view["mode"] == mode
                and len(members) == len(self.instances)
                and all(each["settled"] and each["epoch"] == view["epoch"] for each in members)
                and all(len(each["shards"]) == SHARDS // len(members) for each in members)
            )

        await wait_until(is_settled, 90, f"all being {mode}")

    async def owners(self) -> dict[int, str]:
        """Shard → the name of its owner."""
        view = await self.view()
        return owners_in(view)

    async def poke(self, recipients: Sequence[str]) -> None:
        """Have the first instance publish a poke for each."""
        first = next(iter(self.instances.values()))
        async with first.async_http("urn:backend", "poke") as http:
            answer = await http.post("/v1/pokes", json={"recipients": list(recipients)})
            assert answer.status_code == 202

    async def received(self) -> dict[str, int]:
        """How many pokes have reached each instance since the test began."""
        return {
            name: int((await metrics(each, Metric.POKES))[0]) - self.before.get(name, 0)
            for name, each in self.instances.items()
        }


@pytest.fixture(scope="module")
def clusters(
    valkey_server: Daemon, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[str, Cluster]]:
    """Three partitioned instances on each engine; all of them meet in Redis.

    They are shared: each test counts from where it begins, and leaves them as they were.
    """
    with ExitStack() as opened, ThreadPoolExecutor(12) as threads:
        started = {
            engine: {
                name: threads.submit(
                    _start, name, transport, valkey_server.url, engine, directory, opened
                )
                for name in NAMES
            }
            for engine, transport, directory in _engines(opened, valkey_server, tmp_path_factory)
        }
        yield {
            engine: Cluster({name: instance.result() for name, instance in instances.items()})
            for engine, instances in started.items()
        }


def _engines(
    opened: ExitStack, valkey: Daemon, directories: pytest.TempPathFactory
) -> Iterator[tuple[str, str, Path]]:
    """Each engine's name, its transport's URL, and a directory for its instances."""
    nats = opened.enter_context(run_nats(directories.mktemp("nats-server")))
    yield "nats", nats.url, directories.mktemp("nats")
    yield "valkey", valkey.url, directories.mktemp("valkey")
    pubsub = opened.enter_context(run_pubsub_server(directories.mktemp("server")))
    # It honours filters, which Google's emulator does not.
    yield "pubsub", f"pubsub://{pubsub.address}/pokes", directories.mktemp("pubsub")
    with suppress(pytest.skip.Exception):
        emulator = opened.enter_context(run_pubsub_emulator(directories.mktemp("emulator-server")))
        yield "emulator", f"pubsub://{emulator.address}/pokes", directories.mktemp("emulator")


def _start(
    name: str, transport: str, store_url: str, engine: str, directory: Path, opened: ExitStack
) -> Instance:
    env = dict(os.environ)
    if transport.startswith("pubsub://"):
        env["PUBSUB_EMULATOR_HOST"] = transport.split("/")[2]
        transport = "pubsub://test-partitioned/pokes"
    settings = {
        "jwt_secret": JWT_SECRET,
        "transport": transport,
        "mailbox": "sqlite:///shared.db",
        "coordination": store_url,
        "cluster": f"partitioned-{engine}",
        "instance": name,
        "mode": "partitioned",
        "shard_count": SHARDS,
        "lease_s": 4,
        # Google's emulator keeps filters and ignores them.
        "carrier": "topic" if engine == "emulator" else "filter",
    }
    env |= {f"POKEBRIDGE_{key.upper()}": str(value) for key, value in settings.items()}
    instance = Instance(name, ["--dev"], env, directory)
    opened.callback(instance.kill)
    instance.start()
    return instance


@pytest.fixture(params=["nats", "valkey", "pubsub", "emulator"])
async def cluster(request: pytest.FixtureRequest, clusters: Mapping[str, Cluster]) -> Cluster:
    """The three on one engine, settled."""
    if request.param not in clusters:
        missing("Google's Pub/Sub emulator (gcloud's pubsub-emulator)")
    cluster = clusters[request.param]
    await cluster.settled()
    return Cluster(cluster.instances, before=await cluster.received())


@asynccontextmanager
async def session(
    instance: Instance, recipient: str, *, moved: bool = False
) -> AsyncIterator[Socket]:
    """A bare session at the instance, or wherever it sends the client, that is ready."""
    headers = instance.headers(recipient)
    url = instance.ws_url + ("?moved=1" if moved else "")
    async with AsyncExitStack() as opened:
        socket = await opened.enter_async_context(
            websockets.connect(url, additional_headers=headers)
        )
        first = json.loads(await socket.recv())
        if first["type"] == "move":
            with pytest.raises(websockets.ConnectionClosed) as closed:
                await socket.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 4307
            url = f"{first['url']}?moved=1"
            socket = await opened.enter_async_context(
                websockets.connect(url, additional_headers=headers)
            )
            first = json.loads(await socket.recv())
        assert first["type"] == "ready"
        yield socket


def somebody_in_each_shard() -> list[str]:
    """A recipient of each shard."""
    by_shard: dict[int, str] = {}
    number = 0
    while len(by_shard) < SHARDS:
        recipient = f"urn:user:{number}"
        by_shard.setdefault(shard_of(recipient, SHARDS), recipient)
        number += 1
    return list(by_shard.values())


async def test_a_poke_goes_where_its_clients_are(cluster: Cluster) -> None:
    """Pokes go to the owner of their shard alone, once; a client elsewhere costs one more.

    With nobody connected each instance receives its own shards' pokes and no others.
    """
    async with asyncio.timeout(TIMEOUT_S):
        await _reach_the_owners_alone(cluster)
        await _follow_the_clients_to_their_owner(cluster)
        await _find_a_client_in_the_wrong_place(cluster)


async def _reach_the_owners_alone(cluster: Cluster) -> None:
    recipients = [f"urn:user:{number}" for number in range(200)]
    owners = await cluster.owners()
    expected = Counter(owners[shard_of(recipient, SHARDS)] for recipient in recipients)
    await cluster.poke(recipients)

    async def have_arrived() -> bool:
        return await cluster.received() == expected

    await wait_until(have_arrived, 60, f"{expected} pokes at the instances")


async def _follow_the_clients_to_their_owner(cluster: Cluster) -> None:
    """Whoever connects anywhere is moved once; ``connect-info`` would have said where to."""
    recipients = somebody_in_each_shard()
    owners, before = await cluster.owners(), sum((await cluster.received()).values())
    async with AsyncExitStack() as opened:
        sockets = []
        for number, recipient in enumerate(recipients):
            asked = cluster.instances[NAMES[number % len(NAMES)]]
            async with asked.async_http(recipient) as http:
                info = (await http.get("/v1/connect-info")).json()
            owner = owners[shard_of(recipient, SHARDS)]
            assert (info["instance"], info["url"]) == (owner, cluster.instances[owner].ws_url)
            sockets.append(await opened.enter_async_context(session(asked, recipient)))
        await cluster.poke(recipients)
        for socket in sockets:
            assert await next_frame(socket) == {"type": "poke"}
        deliveries = sum((await cluster.received()).values()) - before
        assert deliveries <= 1.05 * len(recipients)


async def _find_a_client_in_the_wrong_place(cluster: Cluster) -> None:
    """Who was moved already is kept where it is, and hears its poke there."""
    recipients = somebody_in_each_shard()[:4]
    owners, before = await cluster.owners(), sum((await cluster.received()).values())
    async with AsyncExitStack() as opened:
        sockets = []
        for recipient in recipients:
            owner = owners[shard_of(recipient, SHARDS)]
            elsewhere = next(each for name, each in cluster.instances.items() if name != owner)
            moved = session(elsewhere, recipient, moved=True)
            sockets.append(await opened.enter_async_context(moved))
        await cluster.poke(recipients)
        for socket in sockets:
            assert await next_frame(socket) == {"type": "poke"}
        deliveries = sum((await cluster.received()).values()) - before
        assert deliveries <= 2 * len(recipients)


async def test_an_operator_migrates_and_drains_by_command(
    nats_server: Daemon, serve: Serve
) -> None:
    """``cluster mode`` tells of each instance and returns when all are there; nobody is silent.

    Meanwhile a publisher that tags nothing is heard in both modes. ``cluster drain`` gives the
    shards up, and leads the sessions to the new owners.
    """
    cluster = Cluster(
        {
            name: serve(
                transport=nats_server.url,
                coordination=nats_server.url,
                mailbox="memory://",
                cluster="operated",
                instance=name,
                mode="partitioned",
                shard_count=SHARDS,
                lease_s=1,
            )
            for name in NAMES[:2]
        }
    )
    recipients = somebody_in_each_shard()
    async with asyncio.timeout(TIMEOUT_S), AsyncExitStack() as opened:
        await cluster.settled()
        one = cluster.instances["one"]
        sockets = {
            recipient: await opened.enter_async_context(session(one, recipient))
            for recipient in recipients
        }
        await _poke_untagged(nats_server, sockets)
        await _migrate(cluster, "fanout")
        await _poke_untagged(nats_server, sockets)
        await _migrate(cluster, "partitioned", "--force")
        await _poke_untagged(nats_server, sockets)
        await _bench(one)
        await _drain_two(cluster, sockets)


async def _bench(one: Instance) -> None:
    """Put load on the cluster through ``one``: its clients follow their shards' owners."""
    done = await asyncio.to_thread(
        run_command,
        one,
        *["bench", "--clients", "20", "--ramp-s", "0", "--duration-s", "1", "--json"],
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["connected"], report["failures"], report["lost"]) == (20, {}, 0)


async def _poke_untagged(nats_server: Daemon, sockets: Mapping[str, Socket]) -> None:
    nats = NatsClient()
    await nats.connect(nats_server.url)
    for recipient in sockets:
        body = json.dumps({"recipient": recipient, "version": 7}).encode()
        await nats.publish("push-notifications~operated", body)
    await nats.close()
    for socket in sockets.values():
        assert await next_frame(socket) == {"type": "poke", "version": 7}


async def _migrate(cluster: Cluster, mode: str, *flags: str) -> None:
    one = cluster.instances["one"]
    done = await asyncio.to_thread(run_command, one, "cluster", "mode", mode, "--json", *flags)
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stderr.splitlines()} == set(cluster.instances)
    assert json.loads(done.stdout)["mode"] == mode
    shown = await asyncio.to_thread(run_command, one, "cluster", "status")
    assert f"cluster operated: {mode}, epoch" in shown.stdout
    assert "mailbox: 0 messages" in shown.stdout
    assert all(
        each.ws_url.removesuffix("/v1/connect") in shown.stdout
        for each in cluster.instances.values()
    )
    assert all(name in shown.stdout for name in cluster.instances)


async def _drain_two(cluster: Cluster, sockets: Mapping[str, Socket]) -> None:
    one, two = cluster.instances["one"], cluster.instances["two"]
    before = await cluster.owners()
    done = await asyncio.to_thread(run_command, one, "cluster", "drain", "two")
    assert done.returncode == 0, done.stderr
    assert "two is drained, and safe to stop" in done.stderr
    assert set((await cluster.owners()).values()) == {"one"}
    for recipient, socket in sockets.items():
        if before[shard_of(recipient, SHARDS)] == "two":
            assert await next_frame(socket) == {"type": "move", "url": one.ws_url}
        else:
            assert await frames(socket) == []
    async with two.async_http() as http:
        answer = await http.get("/readyz")
    assert (answer.status_code, "draining" in answer.text) == (503, True)
