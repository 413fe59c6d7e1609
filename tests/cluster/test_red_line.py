"""The load as real instances on NATS measure it, and what they make of it."""

import asyncio
import json
import re
from collections import deque
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from time import monotonic
from typing import Any

import httpx
import pytest
from nats.aio.client import Client as NatsClient
from websockets.asyncio.client import connect

from pokebridge.sharding import shard_of
from pokebridge.telemetry import Metric
from tests.cluster.clusters import metrics, run_command
from tests.support import Daemon, Instance, Serve, wait_until
from tests.support.serving import owners_in

NAMES = ("one", "two", "three")
HIGH_PER_S, MIDDLE_PER_S, LOW_PER_S = 120.0, 50.0, 4.0
RED_LINE = 200.0
SHARDS, MISPLACED = 100, 20
# The measures are averages over 10 s, and the rules below ask for 2 s and 3 s more.
FOLLOWS_WITHIN_S = 60.0
WINDOW_S = 10.0


class Load:
    """Publishes tagged signals for strangers at ``per_s``, and knows what it really did."""

    def __init__(self, nats: NatsClient) -> None:
        self.per_s = MIDDLE_PER_S
        self._nats = nats
        self._sent_s: deque[float] = deque()

    @property
    def real_per_s(self) -> float:
        """What was published in the window that the instances average over."""
        since_s = monotonic() - WINDOW_S
        return sum(sent_s > since_s for sent_s in self._sent_s) / WINDOW_S

    async def run(self) -> None:
        """Publish until cancelled."""
        number = 0
        while True:
            number += 1
            recipient = f"urn:user:{number % 500}"
            subject = f"push-notifications.{shard_of(recipient, SHARDS)}"
            await self._nats.publish(subject, json.dumps({"recipient": recipient}).encode())
            self._sent_s.append(monotonic())
            await asyncio.sleep(1 / self.per_s)


@pytest.fixture
def instances(own_nats_server: Daemon, serve: Serve) -> Mapping[str, Instance]:
    """Three instances that migrate by themselves."""

    def start(name: str) -> Instance:
        return serve(
            transport=own_nats_server.url,
            coordination=own_nats_server.url,
            mailbox="memory://",
            instance=name,
            mode="auto",
            lease_s=2,
            red_line_ops_per_s=RED_LINE,
            auto_over_s=2,
            auto_under_s=3,
        )

    with ThreadPoolExecutor() as threads:
        return dict(zip(NAMES, threads.map(start, NAMES), strict=True))


@asynccontextmanager
async def _load(nats_url: str) -> AsyncIterator[Load]:
    nats = NatsClient()
    await nats.connect(nats_url)
    load = Load(nats)
    running = asyncio.create_task(load.run())
    try:
        yield load
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await nats.close()


@pytest.mark.long
async def test_the_load_is_measured_and_acted_on(
    instances: Mapping[str, Instance], own_nats_server: Daemon
) -> None:
    """N and ops/s are true in both modes; auto migrates once over the line, and back once.

    Then an instance dies, and the load is that of two.
    """
    async with (
        asyncio.timeout(280),
        _load(own_nats_server.url) as load,
        instances["one"].async_http("urn:admin", "admin") as http,
    ):
        await wait_until(
            lambda: _is_measured(http, load, 3), FOLLOWS_WITHIN_S, "the true load in fan-out"
        )
        load.per_s = HIGH_PER_S
        await wait_until(lambda: _says(instances, "red_line_crossed"), FOLLOWS_WITHIN_S)
        await wait_until(lambda: _is_in(http, "partitioned"), FOLLOWS_WITHIN_S, "partitioned")
        async with _clients_elsewhere(instances, http, MISPLACED):
            copies = 1 + MISPLACED / SHARDS
            await wait_until(
                lambda: _is_measured(http, load, copies), FOLLOWS_WITHIN_S, "the partitioned load"
            )
            plan = await _plan(instances["one"])
            assert plan["advice"].startswith("stay partitioned")
            predicted_per_s = plan["partitioned"]["global_ops_per_s"]
            assert predicted_per_s == pytest.approx(copies * load.real_per_s, rel=0.1)
        load.per_s = LOW_PER_S
        await wait_until(lambda: _is_in(http, "fanout"), FOLLOWS_WITHIN_S, "fan-out again")
        assert _count(instances, "migration_started") == 2
        await asyncio.to_thread(instances["three"].kill)
        load.per_s = MIDDLE_PER_S
        await wait_until(lambda: _is_measured(http, load, 2), FOLLOWS_WITHIN_S, "the load of two")
        (over,) = await metrics(instances["one"], Metric.OVER_RED_LINE)
        assert bool(over) == (await _traffic(http))["over_red_line"]


async def test_all_who_tell_of_the_load_agree(own_nats_server: Daemon, serve: Serve) -> None:
    """Over the line the log, the metrics, the API, ``cluster status`` and ``plan`` say the same.

    The console shows what the API says (tests/console).
    """
    instances = {
        name: serve(
            transport=own_nats_server.url,
            coordination=own_nats_server.url,
            mailbox="memory://",
            instance=name,
            red_line_ops_per_s=MIDDLE_PER_S,
        )
        for name in NAMES[:2]
    }
    one = instances["one"]
    async with (
        asyncio.timeout(150),
        _load(own_nats_server.url) as load,
        one.async_http("urn:admin", "admin") as http,
    ):
        await wait_until(lambda: _says(instances, "red_line_crossed"), FOLLOWS_WITHIN_S)
        await wait_until(lambda: _is_measured(http, load, 2), FOLLOWS_WITHIN_S)
        # They are queried one after the other. On a busy machine the load changes in between.
        await wait_until(lambda: _all_agree(one, http), FOLLOWS_WITHIN_S, "all telling the same")


async def _all_agree(instance: Instance, http: httpx.AsyncClient) -> bool:
    traffic = await _traffic(http)
    is_over, counted_per_s = await metrics(instance, Metric.OVER_RED_LINE, Metric.GLOBAL_OPS)
    plan = await _plan(instance)
    status = (await asyncio.to_thread(run_command, instance, "cluster", "status")).stdout
    (shown_per_s,) = re.findall(rf"([\d,]+) of {MIDDLE_PER_S:.0f} ops/s", status)
    assert traffic["over_red_line"]
    assert is_over == 1
    assert (plan["fanout"]["over_red_line"], plan["verdict"]) == (True, "critical")
    told_per_s = (
        counted_per_s,
        plan["fanout"]["global_ops_per_s"],
        float(shown_per_s.replace(",", "")),
    )
    return all(
        each_per_s == pytest.approx(traffic["global_ops_per_s"], rel=0.05)
        for each_per_s in told_per_s
    )


async def _plan(instance: Instance) -> Any:
    words = ("plan", "--from", instance.url, "--engine", "nats", "--json")
    done = await asyncio.to_thread(run_command, instance, *words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@asynccontextmanager
async def _clients_elsewhere(
    instances: Mapping[str, Instance], http: httpx.AsyncClient, count: int
) -> AsyncIterator[None]:
    """Sessions of ``count`` shards on an instance that does not own them."""
    view = (await http.get("/v1/cluster")).json()
    owners = owners_in(view)
    by_shard = {shard_of(f"urn:user:{number}", SHARDS): number for number in range(2000)}
    async with AsyncExitStack() as opened:
        for shard, number in sorted(by_shard.items())[:count]:
            elsewhere = instances["one" if owners[shard] != "one" else "two"]
            headers = elsewhere.headers(f"urn:user:{number}")
            socket = await opened.enter_async_context(
                connect(f"{elsewhere.ws_url}?moved=1", additional_headers=headers)
            )
            assert json.loads(await socket.recv())["type"] == "ready"
        yield


async def _traffic(http: httpx.AsyncClient) -> Any:
    return (await http.get("/v1/cluster")).json()["traffic"]


async def _is_measured(http: httpx.AsyncClient, load: Load, copies: float) -> bool:
    """Whether the figures say what is published, and that ``copies`` instances receive each."""
    traffic = await _traffic(http)
    real_per_s = load.real_per_s
    counted_per_s, ops_per_s = traffic["messages_per_s"], traffic["global_ops_per_s"]
    is_true = abs(counted_per_s - real_per_s) <= 0.05 * real_per_s + 1  # a probe or two
    return bool(is_true and abs(ops_per_s - copies * real_per_s) <= 0.05 * copies * real_per_s + 3)


async def _is_in(http: httpx.AsyncClient, mode: str) -> bool:
    view = (await http.get("/v1/cluster")).json()
    return bool(view["mode"] == mode and all(each["settled"] for each in view["instances"]))


def _says(instances: Mapping[str, Instance], event: str) -> bool:
    return _count(instances, event) > 0


def _count(instances: Mapping[str, Instance], event: str) -> int:
    """How often the event stands in the logs of all."""
    return sum(len(re.findall(event, instance.log())) for instance in instances.values())
