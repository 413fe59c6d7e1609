"""The documented way to another number of shards: old and new instances together miss nothing."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import valkey

from pokebridge.testing.pubsub import PubSubServer
from tests.cluster.traffic import session
from tests.support import Instance, Serve, free_port
from tests.support.engines import run_valkey
from tests.support.silence import Silence

PEOPLE = [f"urn:user:{n}" for n in range(12)]
TIMEOUT_S = 200.0


@pytest.fixture(params=["nats", "valkey", "valkey cluster", "filter", "topic"])
async def engine(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> AsyncIterator[dict[str, Any]]:
    """The settings of a transport, for which the documented way exists."""
    async with AsyncExitStack() as stack:
        kind = request.param
        if kind in {"filter", "topic"}:
            pubsub = await stack.enter_async_context(PubSubServer())
            monkeypatch.setenv("PUBSUB_EMULATOR_HOST", pubsub.address)
            yield {"transport": "pubsub://test", "carrier": kind}
        elif kind == "valkey cluster":
            flags = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
            server = stack.enter_context(run_valkey(tmp_path, *flags))
            with valkey.Valkey(port=server.port) as client:
                admin: Any = client
                admin.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            yield {"transport": server.url}
        else:
            yield {"transport": request.getfixturevalue(f"{kind}_server").url}


@pytest.fixture
def serve_on(engine: dict[str, Any], request: pytest.FixtureRequest) -> Serve:
    """``serve``, which copies the environment, so only once the engine is in it."""
    serve: Serve = request.getfixturevalue("serve")
    return serve


async def test_instances_of_two_numbers_of_shards_hear_each_other(
    engine: dict[str, Any], serve_on: Serve, silence: Silence
) -> None:
    """In fan-out, whichever of them a client is at, and whichever publishes."""
    common: dict[str, Any] = {"mailbox": "memory://", "heard_shards": 40, **engine}
    numbers: list[dict[str, Any]] = [
        {"instance": "old", "cluster": "shop", "shard_count": 20},
        {"instance": "new", "cluster": "shop2", "signal_cluster": "shop", "shard_count": 40},
    ]
    async with asyncio.timeout(TIMEOUT_S), AsyncExitStack() as stack:
        instances: list[Instance] = await asyncio.gather(
            *(asyncio.to_thread(serve_on, **common, **each) for each in numbers)
        )
        sockets = [
            await stack.enter_async_context(session(instance, recipient))
            for instance in instances
            for recipient in PEOPLE
        ]
        for instance in instances:
            heard = silence("old and new instances while the number of shards is changed")
            async with instance.async_http("urn:backend", "poke") as http:
                answer = await http.post("/v1/pokes", json={"recipients": PEOPLE})
                assert answer.status_code == 202
            for socket in sockets:
                assert json.loads(await socket.recv())["type"] == "poke"
            heard()
