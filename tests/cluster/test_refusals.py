"""Redis refuses in mid-life, since it loads its data or is out of memory: nothing moves."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.traffic import session
from tests.support import Daemon, Instance, Serve, wait_until
from tests.support.engines import ask, run_valkey

BOB = "urn:user:bob"


@asynccontextmanager
async def loading(server: Daemon) -> AsyncIterator[None]:
    """The server loads its data, slowly, until the end of the block."""
    await ask(server, "DEBUG", "POPULATE", 20_000, "key", 100)
    await ask(server, "CONFIG", "SET", "key-load-delay", 1000)
    await ask(server, "CONFIG", "SET", "loading-process-events-interval-bytes", 1024)
    reload = asyncio.create_task(ask(server, "DEBUG", "RELOAD"))
    yield
    await ask(server, "CONFIG", "SET", "key-load-delay", 0)
    await reload


@asynccontextmanager
async def out_of_memory(server: Daemon) -> AsyncIterator[None]:
    """The server takes nothing that needs memory until the end of the block."""
    await ask(server, "CONFIG", "SET", "maxmemory", 1)
    yield
    await ask(server, "CONFIG", "SET", "maxmemory", 0)


async def cluster_of(instance: Instance) -> Any:
    """What the instance says of its cluster."""
    async with instance.async_http("urn:admin", "admin") as http:
        return (await http.get("/v1/cluster")).json()


@pytest.mark.long
async def test_a_store_that_refuses_is_waited_out(serve: Serve, tmp_path: Path) -> None:
    """Both instances say why, bob is poked meanwhile, and no shard has moved afterwards."""
    with run_valkey(tmp_path, "--enable-debug-command", "yes") as server:

        async def start(name: str) -> Instance:
            return await asyncio.to_thread(
                serve,
                instance=name,
                transport=server.url,
                coordination=server.url,
                mailbox="sqlite:///shared.db",
                mode="partitioned",
                lease_s=2,
                verify_every_s=600,
            )

        instances = [await start(name) for name in ("one", "two")]

        async def is_settled() -> bool:
            views = [await cluster_of(each) for each in instances]
            members = [each for view in views for each in view["instances"]]
            is_shared = all(each["settled"] and each["shards"] for each in members)
            return len(members) == 4 and is_shared

        def owners(view: Any) -> list[Any]:
            return [(each["id"], each["shards"]) for each in view["instances"]]

        await wait_until(is_settled, 60)
        before = await cluster_of(instances[0])
        async with session(instances[1], BOB) as bob:
            for refusing, reason in ((loading, "coordination_lost"), (out_of_memory, "maxmemory")):
                logged = [len(each.log()) for each in instances]

                def all_said(what: str, logged: list[int] = logged) -> bool:
                    pairs = zip(instances, logged, strict=True)
                    return all(what in each.log()[since:] for each, since in pairs)

                async with refusing(server):
                    await wait_until(partial(all_said, reason), 60)
                    async with instances[0].async_http("urn:backend", "send") as http:
                        message = {"recipient": BOB, "body": reason}
                        (await http.post("/v1/messages", json=message)).raise_for_status()
                    async with asyncio.timeout(30):
                        assert json.loads(await bob.recv())["type"] == "poke"
                await wait_until(partial(all_said, "cluster_seen"), 60)
        await wait_until(is_settled, 60)
        assert owners(await cluster_of(instances[0])) == owners(before)
