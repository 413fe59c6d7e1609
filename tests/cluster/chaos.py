"""Five instances, a crowd of clients, and one misfortune after the other.

``python -m tests.cluster.chaos`` plays it at full size, on NATS and then on Valkey.
``test_chaos.py`` plays a small one.
"""

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any, Literal

import asyncpg
import httpx
import jwt
import uvloop

from tests.cluster.crowd import Act, Crowd
from tests.support import CutProxy, Daemon, Instance, environment, free_port, wait_until
from tests.support.engines import (
    ask,
    has_role,
    promote,
    run_postgres,
    run_standby,
    run_valkey,
    running_nats_cluster,
)
from tests.support.missing import require
from tests.support.serving import JWT_SECRET

NAMES = ("one", "two", "three", "four", "five")
SETTLED_WITHIN_S = 60.0
# The longest wait for a message: from docs/simulation.md and the contract's delays.
OTHERS_LIMIT_S = 1.0
STRUCK_LIMIT_S = 2.0
# A worker commits a message while its hub stands still. The hub can't poke, and the next sweep of
# the outbox does.
SWEPT_LIMIT_S = 2.0
BROKER_LIMIT_S = 5.0
# The time from the last commit on the old primary until all clients pull from the new one.
FAILOVER_LIMIT_S = 10.0

_BALANCER = """
global
  maxconn 8000
defaults
  mode http
  timeout connect 1s
  timeout client 1h
  timeout server 700ms
  timeout tunnel 1h
  retries 4
  option redispatch 1
  retry-on conn-failure empty-response response-timeout
frontend clients
  bind 127.0.0.1:{port}
  default_backend instances
backend instances
  balance roundrobin
  option httpchk GET /readyz
  timeout check 500ms
  http-request disable-l7-retry unless METH_GET
  default-server check inter 200ms fall 2 rise 1 on-marked-down shutdown-sessions
{servers}
"""


@dataclass(frozen=True)
class Size:
    """How much of everything; times in seconds."""

    clients: int
    rate_per_s: float
    lease_s: float
    stopped_s: float
    store_cut_s: float
    verify_every_s: float
    route_cut_s: float
    lag_s: float
    deaf_s: float
    workers: int = 1
    """Of each instance."""


SMALL = Size(
    clients=100,
    rate_per_s=20,
    lease_s=2,
    stopped_s=4,
    store_cut_s=4,
    verify_every_s=5,
    route_cut_s=8,
    lag_s=4,
    deaf_s=15,
)
FULL = Size(
    clients=2000,
    rate_per_s=40,
    lease_s=5,
    stopped_s=20,
    store_cut_s=30,
    verify_every_s=30,
    route_cut_s=45,
    lag_s=20,
    deaf_s=60,
)


Kind = Literal["nats", "redis"]
"""What carries the signals, by the scheme of its URL."""


@dataclass(frozen=True)
class Engines:
    """What the instances share: what carries the signals, and PostgreSQL with a standby."""

    kind: Kind
    servers: Sequence[Daemon]
    """Three NATS servers, or a Valkey server and what becomes its replica."""
    entries: Sequence[Daemon]
    """Those of them that instances connect to."""
    routes: Sequence[CutProxy]
    """Between the NATS servers."""
    postgres: Daemon
    standby: Daemon
    """Follows ``postgres`` asynchronously."""


@asynccontextmanager
async def engines(directory: Path, kind: Kind = "nats") -> AsyncIterator[Engines]:
    """Start all engines."""
    routes: Sequence[CutProxy] = ()
    async with AsyncExitStack() as opened:
        if kind == "nats":
            servers, routes = await opened.enter_async_context(running_nats_cluster(directory, 3))
            entries = servers
        else:
            servers = [await _valkey(opened, directory, name) for name in ("primary", "replica")]
            entries = servers[:1]
        postgres = opened.enter_context(run_postgres())
        standby = opened.enter_context(run_standby(postgres))
        yield Engines(kind, servers, entries, routes, postgres, standby)


async def _valkey(opened: AsyncExitStack, directory: Path, name: str) -> Daemon:
    (directory / name).mkdir()
    return await asyncio.to_thread(opened.enter_context, run_valkey(directory / name))


@dataclass
class Outcome:
    """How long somebody had to wait for a message during an act, at most; in seconds."""

    act: str
    others_s: float
    struck_s: float
    limit_others_s: float
    limit_struck_s: float

    @property
    def kept(self) -> bool:
        """Whether the limits were."""
        return self.others_s <= self.limit_others_s and self.struck_s <= self.limit_struck_s

    def __str__(self) -> str:
        struck = f", the struck {self.struck_s:.2f} s" if self.struck_s else ""
        return f"{self.act}: longest silence {self.others_s:.2f} s{struck}"


@dataclass
class Stage:
    """What the acts are played on."""

    size: Size
    engines: Engines
    lines: Mapping[str, CutProxy]
    """The line of each instance to its NATS or Valkey server."""
    store: CutProxy
    instances: dict[str, Instance]
    http: httpx.AsyncClient
    """An administrator's, through the balancer."""
    crowd: Crowd
    tell: Callable[[str], None]
    outcomes: list[Outcome] = field(default_factory=list)

    async def view(self) -> Any:
        """What an instance, any of them, tells of the cluster."""
        return (await self.http.get("/v1/cluster")).json()

    async def settled(self, mode: str, count: int = len(NAMES)) -> None:
        """Wait until ``count`` instances are where the shard map wants them, evenly."""

        async def is_settled() -> bool:
            try:
                view = await self.view()
            except (httpx.HTTPError, ValueError):
                return False
            active = [each for each in view["instances"] if each["state"] == "active"]
            fair = view["shard_count"] // count
            return (
                view["mode"] == mode
                and len(active) == count
                and all(each["settled"] and each["epoch"] == view["epoch"] for each in active)
                and all(fair <= len(each["shards"]) <= fair + 1 for each in active)
            )

        await wait_until(is_settled, SETTLED_WITHIN_S, f"{count} instances being {mode}")

    @asynccontextmanager
    async def act(
        self,
        name: str,
        struck: str = "",
        others_s: float = OTHERS_LIMIT_S,
        struck_s: float = STRUCK_LIMIT_S,
    ) -> AsyncIterator[Act]:
        """Measure the silences of what is done meanwhile, after all of it was pulled."""
        act = Act(name, monotonic(), self.crowd.on(struck) if struck else frozenset())
        yield act
        ended_s = monotonic()
        await wait_until(
            lambda: all(
                message.pulled_s < inf
                for message in self.crowd.sent.values()
                if message.asked_s < ended_s
            ),
            40,
            f"everything being pulled after {name}",
        )
        outcome = Outcome(
            name,
            self.crowd.longest_silence_s(act, ended_s, struck=False),
            self.crowd.longest_silence_s(act, ended_s, struck=True) if struck else 0.0,
            others_s,
            struck_s,
        )
        self.outcomes.append(outcome)
        self.tell(str(outcome))


def token_for(recipient: str, scope: str) -> str:
    """A token that every instance accepts."""
    claims = {"sub": recipient, "scope": scope, "exp": int(time.time()) + 3600}
    return jwt.encode(claims, JWT_SECRET, algorithm="HS256")


@asynccontextmanager
async def stage(
    directory: Path, engines: Engines, size: Size, tell: Callable[[str], None]
) -> AsyncIterator[Stage]:
    """Five partitioned instances behind a balancer, and their crowd, settled."""
    async with AsyncExitStack() as opened:
        postgres, standby = engines.postgres, engines.standby
        store = await opened.enter_async_context(CutProxy("127.0.0.1", postgres.port))
        lines = {}
        for name, server in zip(NAMES, cycle(engines.entries), strict=False):
            line = CutProxy("127.0.0.1", server.port)
            lines[name] = await opened.enter_async_context(line)
        urls = {
            "coordination": f"postgresql://postgres@{store.address},{standby.address}/postgres",
            "mailbox": f"postgresql://postgres@{postgres.address},{standby.address}/postgres",
        }
        instances = {
            name: _instance(
                name, urls | {"transport": f"{engines.kind}://{line.address}"}, size, directory
            )
            for name, line in lines.items()
        }
        for instance in instances.values():
            opened.push_async_callback(asyncio.to_thread, instance.kill)
        with ThreadPoolExecutor() as threads:
            loop = asyncio.get_running_loop()
            starts = [loop.run_in_executor(threads, each.start) for each in instances.values()]
            await asyncio.gather(*starts)
        balancer = _balancer(instances.values(), directory)
        opened.push_async_callback(asyncio.to_thread, balancer.kill)
        await asyncio.to_thread(balancer.start)
        crowd = Crowd(balancer.url, token_for, size.clients, size.rate_per_s)
        headers = {"Authorization": f"Bearer {token_for('urn:admin', 'admin')}"}
        http = await opened.enter_async_context(
            httpx.AsyncClient(base_url=balancer.url, headers=headers, timeout=10)
        )
        played = Stage(size, engines, lines, store, instances, http, crowd, tell)
        await played.settled("partitioned")
        await opened.enter_async_context(crowd)
        tell(f"{size.clients} clients on {len(NAMES)} instances")
        yield played


def _instance(name: str, engine_urls: Mapping[str, str], size: Size, directory: Path) -> Instance:
    settings = {
        **engine_urls,
        "jwt_secret": JWT_SECRET,
        "mode": "partitioned",
        "instance": name,
        "lease_s": size.lease_s,
        "drain_s": 2,
        "verify_every_s": size.verify_every_s,
        "workers": size.workers,
    }
    env = os.environ | {f"POKEBRIDGE_{key.upper()}": str(value) for key, value in settings.items()}
    return Instance(name, ["--dev"], env, directory)


def _balancer(instances: Any, directory: Path) -> Daemon:
    port = free_port()
    servers = "\n".join(f"  server {each.name} 127.0.0.1:{each.port}" for each in instances)
    config = directory / "balancer.cfg"
    config.write_text(_BALANCER.format(port=port, servers=servers))
    return Daemon(
        "haproxy",
        [require("haproxy"), "-db", "-f", str(config)],
        port=port,
        url=f"http://127.0.0.1:{port}",
        directory=directory,
    )


# --- the acts -------------------------------------------------------------------------------------


async def kill_one(stage: Stage) -> None:
    """One instance dies with everything in it, and comes back later."""
    async with stage.act("an instance is killed", "one"):
        await asyncio.to_thread(stage.instances["one"].kill)
        await stage.settled("partitioned", 4)
    async with stage.act("it comes back", "one"):
        await asyncio.to_thread(stage.instances["one"].start)
        await stage.settled("partitioned")


async def kill_worker(stage: Stage) -> None:
    """A worker of an instance dies: its clients come back, and nothing moves."""
    victim = stage.instances["five"]
    async with stage.act("a worker is killed", "five"):
        pids = await asyncio.to_thread(victim.worker_pids)
        os.kill(pids[0], signal.SIGKILL)
        await wait_until(lambda: len({*victim.worker_pids()} - {pids[0]}) == len(pids))
        await stage.settled("partitioned")


async def stop_one(stage: Stage) -> None:
    """One instance stands still for longer than its lease, and wakes up believing in it."""
    victim = stage.instances["two"]
    limit_s = stage.size.stopped_s + STRUCK_LIMIT_S  # its sockets stay open, but nothing answers
    others_s = SWEPT_LIMIT_S if stage.size.workers > 1 else OTHERS_LIMIT_S
    async with stage.act("an instance is stopped and woken", "two", others_s, limit_s):
        os.kill(victim.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(stage.size.stopped_s)
        finally:
            os.kill(victim.pid, signal.SIGCONT)
        await stage.settled("partitioned")


async def kill_leader(stage: Stage) -> None:
    """The leader dies: another one must plan where its shards go."""
    leader = await _leader(stage)
    async with stage.act(f"the leader, {leader}, is killed", leader):
        await asyncio.to_thread(stage.instances[leader].kill)
        await stage.settled("partitioned", 4)
    async with stage.act("the old leader comes back", leader):
        await asyncio.to_thread(stage.instances[leader].start)
        await stage.settled("partitioned")


async def _leader(stage: Stage) -> str:
    for name, instance in stage.instances.items():
        async with httpx.AsyncClient(base_url=instance.url, timeout=10) as http:
            if "\npokebridge_cluster_leader 1.0" in (await http.get("/metrics")).text:
                return name
    raise AssertionError("nobody leads")


async def cut_store(stage: Stage) -> None:
    """The coordination store can't be reached: nothing moves, and nobody notices."""
    async with stage.act("the store is cut off"):
        stage.store.cut()
        await asyncio.sleep(stage.size.store_cut_s)
        stage.store.heal()
        await stage.settled("partitioned")


async def restart_broker(stage: Stage) -> None:
    """The broker dies and comes back with nothing it knew."""
    async with stage.act("the broker is restarted", others_s=BROKER_LIMIT_S) as act:
        down_s = monotonic()
        for server in stage.engines.servers:
            await asyncio.to_thread(server.kill)
        for server in stage.engines.servers:
            await asyncio.to_thread(server.start)
        act.excused = (down_s, monotonic())
        await stage.settled("partitioned")


async def drain_one(stage: Stage) -> None:
    """One instance is stopped in good order: its shards and sessions go first."""
    async with stage.act("an instance is drained and stopped", "three", struck_s=OTHERS_LIMIT_S):
        await asyncio.to_thread(stage.instances["three"].terminate, 60)
        await stage.settled("partitioned", 4)
    async with stage.act("it is started again", "three"):
        await asyncio.to_thread(stage.instances["three"].start)
        await stage.settled("partitioned")


async def migrate(stage: Stage) -> None:
    """To fan-out and back, under traffic."""
    for mode in ("fanout", "partitioned"):
        async with stage.act(f"migrating to {mode}"):
            answer = await stage.http.put("/v1/cluster/mode", json={"mode": mode})
            assert answer.status_code == 202, answer.text
            await stage.settled(mode)


async def cut_route(stage: Stage) -> None:
    """Two NATS servers lose each other, and nobody is told: verification finds what is lost."""
    limit_s = stage.size.verify_every_s + BROKER_LIMIT_S
    route = stage.engines.routes[0]
    async with stage.act("the route between two NATS servers is cut", others_s=limit_s):
        route.cut()
        route.reset()
        await asyncio.sleep(stage.size.route_cut_s)
        route.heal()
        await stage.settled("partitioned")


async def lag_route(stage: Stage) -> None:
    """A route between two NATS servers takes half a second, each way, for a while."""
    limit_s = stage.size.verify_every_s + BROKER_LIMIT_S
    route = stage.engines.routes[0]
    async with stage.act("the route between two NATS servers lags", others_s=limit_s):
        route.lag(0.5)
        route.reset()
        await asyncio.sleep(stage.size.lag_s)
        route.lag(0.0)
        await stage.settled("partitioned")


async def demote_primary(stage: Stage) -> None:
    """Valkey fails over; connections to the old primary stay, which delivers to nobody else."""
    primary, replica = stage.engines.servers
    await ask(replica, "REPLICAOF", "127.0.0.1", primary.port)
    await wait_until(partial(has_role, replica, b"connected"), what="the replica following")
    limit_s = stage.size.verify_every_s + BROKER_LIMIT_S
    async with stage.act("Valkey fails over, and connections stay", others_s=limit_s):
        await ask(primary, "FAILOVER")
        await wait_until(partial(has_role, replica, b"master"), what="the replica taking over")
        for line in stage.lines.values():
            line.lead_to(replica.port)
        await stage.settled("partitioned")


async def deafen_one(stage: Stage) -> None:
    """An instance loses its line to the broker for long; its clients and its mailbox are well."""
    limit_s = stage.size.verify_every_s + BROKER_LIMIT_S
    line = stage.lines["four"]
    async with stage.act("an instance is deaf", "four", others_s=BROKER_LIMIT_S, struck_s=limit_s):
        line.cut()
        await asyncio.sleep(stage.size.deaf_s)
        line.heal()
        await stage.settled("partitioned")


async def _lag_s(standby: "asyncpg.Connection[asyncpg.Record]") -> float:
    """How far the standby is behind its primary at most, in seconds."""
    age = "SELECT extract(epoch FROM now() - pg_last_xact_replay_timestamp())"
    return 1 + float(await standby.fetchval(age))


async def fail_over(stage: Stage) -> None:
    """The primary dies, and a standby that lacks its last commits goes on: versions do not."""
    primary, crowd = stage.engines.postgres, stage.crowd
    standby = await asyncpg.connect(stage.engines.standby.url)
    async with stage.act(
        "PostgreSQL fails over and loses commits", others_s=FAILOVER_LIMIT_S
    ) as act:
        lost_since_s = monotonic() - await _lag_s(standby)
        await standby.execute("ALTER SYSTEM SET primary_conninfo = ''")
        await standby.execute("SELECT pg_reload_conf()")
        pulled = len(crowd.pulled)
        await wait_until(lambda: len(crowd.pulled) > pulled + 20, 30, "messages to lose")
        await asyncio.to_thread(primary.kill)
        await promote(standby)
        promoted_s, sent = monotonic(), len(crowd.sent)
        act.excused = (lost_since_s, promoted_s)
        await wait_until(lambda: len(crowd.sent) > sent + 100, 60, "messages after the failover")
        # Acked messages are not deleted yet, so a missing message is lost.
        kept = {row["id"] for row in await standby.fetch("SELECT id FROM pokebridge.messages")}
        lost = crowd.forget_lost(lost_since_s, promoted_s, kept)
        stage.tell(f"{lost} messages lost with the primary before they were pulled")
        await stage.settled("partitioned")
    await standby.close()


Play = Callable[[Stage], Awaitable[None]]
ACTS: Sequence[Play] = (
    kill_one,
    stop_one,
    kill_leader,
    cut_store,
    restart_broker,
    drain_one,
    migrate,
    cut_route,
    lag_route,
    deafen_one,
    fail_over,
)
VALKEY_ACTS: Sequence[Play] = (kill_one, restart_broker, deafen_one, demote_primary, fail_over)


def acts(kind: Kind, size: Size) -> Sequence[Play]:
    """What is played on ``kind``."""
    of_workers = (kill_worker,) if size.workers > 1 else ()
    return (*of_workers, *(ACTS if kind == "nats" else VALKEY_ACTS))


async def play(stage: Stage) -> Sequence[Outcome]:
    """The acts, one after the other; at the end nothing that was answered is missing."""
    for act in acts(stage.engines.kind, stage.size):
        await act(stage)
    await stage.crowd.stop_sending()
    await wait_until(lambda: not stage.crowd.outstanding, 40, "everything being pulled")
    stage.tell(f"{len(stage.crowd.sent)} messages, all pulled; {stage.crowd.refused} refused")
    return stage.outcomes


async def _main(size: Size, kinds: Collection[Kind]) -> int:
    def tell(line: str) -> None:
        print(line, flush=True)  # noqa: T201 - a program's output

    outcomes: list[Outcome] = []
    for kind in kinds:
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            async with (
                engines(directory, kind) as started,
                stage(directory, started, size, tell) as played,
            ):
                outcomes += await play(played)
    missed = [outcome for outcome in outcomes if not outcome.kept]
    for outcome in missed:
        tell(f"over its limit: {outcome}")
    return 1 if missed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=FULL.clients, help="sessions in all")
    parser.add_argument("--on", choices=["nats", "redis"], help="only with this transport")
    parser.add_argument("--workers", type=int, default=1, help="worker processes of each instance")
    asked = parser.parse_args()
    full = replace(FULL, clients=asked.clients, workers=asked.workers)
    on: Sequence[Kind] = [asked.on] if asked.on else ["nats", "redis"]
    environment.clean()
    sys.exit(uvloop.run(_main(full, on)))
