"""Two instances that divide the shards: clients are led to the owner of theirs, and to its heir.

All they are given is the address of the other one. Their pulls go there, wherever their socket is.
"""

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytest_asyncio

from pokebridge.sharding import shard_of
from tests.js.driving import (
    TIMEOUT_S,
    Client,
    NodeRuntime,
    PageRuntime,
    pulls,
    send,
    wait_sessions,
)
from tests.support import Daemon, Instance, Serve, wait_until
from tests.support.serving import owners_in

SHARDS = 4

pytestmark = pytest.mark.asyncio(loop_scope="session")


class Scene(NamedTuple):
    """Two instances, and a client in a browser and one in Node, by recipient."""

    asked: Instance
    owner: Instance
    clients: Mapping[str, Client]

    async def for_each(self, step: Callable[[str, Client], Awaitable[object]]) -> None:
        """Do something with each client, side by side."""
        await asyncio.gather(*(step(sub, client) for sub, client in self.clients.items()))

    async def send(self, *bodies: str) -> None:
        """Send each client the last of ``bodies``, and wait until it has shown exactly all."""

        async def get(sub: str, client: Client) -> None:
            await send(self.asked, sub, bodies[-1])
            await client.wait_shown(*bodies)

        await self.for_each(get)

    async def wait_sessions(self, *, asked: int, owner: int) -> None:
        """Wait until the sockets are there."""
        await wait_sessions(self.asked, asked)
        await wait_sessions(self.owner, owner)


async def settled(asked: Instance, instances: int) -> dict[int, str]:
    """Shard → its owner, once so many instances hold what the map gives them."""
    view: dict[str, Any] = {}

    async def is_settled() -> bool:
        async with asked.async_http("urn:admin", "admin") as http:
            view.update((await http.get("/v1/cluster")).json())
        members = view["instances"]
        return len(members) == instances and all(
            each["settled"] and each["shards"] for each in members
        )

    await wait_until(is_settled, TIMEOUT_S, f"{instances} owners")
    return owners_in(view)


@pytest_asyncio.fixture(loop_scope="session")
async def scene(
    page: PageRuntime, node: NodeRuntime, serve: Serve, nats_server: Daemon, tmp_path: Path
) -> Scene:
    """Nobody is connected yet. The clients' shards belong to ``owner``."""
    settings: dict[str, Any] = {
        "transport": nats_server.url,
        "coordination": nats_server.url,
        "mailbox": f"sqlite:///{tmp_path / 'mailbox.db'}",
        "cluster": tmp_path.name.replace("_", "-"),
        "mode": "partitioned",
        "assignment": "ring",  # who comes back gets the same shards
        "shard_count": SHARDS,
        "lease_s": 1,
        "drain_s": 0.5,
    }
    asked, owner = await asyncio.gather(
        *(asyncio.to_thread(serve, instance=name, **settings) for name in ("asked", "owner"))
    )
    owners = await settled(asked, 2)
    subs = (f"urn:user:{number}" for number in itertools.count())
    its_own = (sub for sub in subs if owners[shard_of(sub, SHARDS)] == "owner")
    return Scene(asked, owner, {next(its_own): Client(page), next(its_own): Client(node)})


async def test_moved_killed_returned_drained(scene: Scene) -> None:
    """A client moves between instances, gets each message once, and makes no needless pull."""
    asked, owner = scene.asked, scene.owner
    await scene.for_each(lambda sub, client: client.start(asked.url, sub))
    await scene.wait_sessions(asked=0, owner=2)
    await scene.send("moved")

    await asyncio.to_thread(owner.kill)
    await scene.send("moved", "killed")
    await wait_sessions(asked, 2)

    await settled(asked, 1)  # its death is noticed
    await asyncio.to_thread(owner.start)
    await scene.wait_sessions(asked=0, owner=2)
    await scene.send("moved", "killed", "returned")

    async with asked.async_http("urn:admin", "admin") as http:
        answer = await http.post("/v1/cluster/drain", json={"instance": "owner"})
        assert answer.status_code == 202
    await scene.send("moved", "killed", "returned", "drained")
    await scene.wait_sessions(asked=2, owner=0)
    await scene.send("moved", "killed", "returned", "drained", "after")

    await scene.for_each(check)
    assert await pulls(asked) == sum(
        [await client.count("pull") for client in scene.clients.values()]
    )


async def check(_: str, client: Client) -> None:
    """No circle, no needless pull."""
    await client.idle()
    steps = await client.steps()
    texts = [json.loads(step["text"]) for step in steps if step["type"] == "text"]
    served_by = [text["instance"] for text in texts if text["type"] == "ready"]
    assert served_by == ["owner", "asked", "owner", "asked"]
    closes = [step["code"] for step in steps if step["type"] == "closed"]
    assert closes in (
        [
            4307,
            1006,
            4307,
            1006,
            4307,
            4307,
        ],  # once more to the owner, whose death is not known yet
        [4307, 1006, 4307, 4307],  # it is known already
    )
    connects = [step["moved"] for step in steps if step["type"] == "connect"]
    assert connects[:2] == [False, True]
    assert len(connects) == 1 + len(closes)
    readies, messages = 4, 5
    assert await client.count("pull") <= readies + messages
