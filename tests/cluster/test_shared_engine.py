"""Two clusters on one engine, as processes: what happens in one is nothing to the other."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import websockets

from pokebridge.telemetry import Metric
from pokebridge.testing.pubsub import PubSubServer
from tests.cluster.clusters import metrics
from tests.cluster.traffic import frames, next_frame, session
from tests.support import Daemon, Instance, Serve

BOB = "urn:user:bob"


@pytest.fixture(params=["nats", "valkey", "pubsub"])
async def red_and_blue(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Instance, Instance]]:
    """An instance of each cluster; on Valkey in different databases."""
    async with PubSubServer() as pubsub:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", pubsub.address)
        serve: Serve = request.getfixturevalue("serve")
        if request.param == "pubsub":
            urls = ["pubsub://test/pokes"] * 2
        else:
            engine: Daemon = request.getfixturevalue(f"{request.param}_server")
            urls = [f"{engine.url.removesuffix('/0')}{end}" for end in ("/0", "/1")]
            if request.param == "nats":
                urls = [engine.url] * 2
        red, blue = await asyncio.gather(
            *(
                asyncio.to_thread(
                    serve, cluster=name, instance=f"{name}-1", transport=url, mailbox="memory://"
                )
                for name, url in zip(("red", "blue"), urls, strict=True)
            )
        )
        yield red, blue


async def test_clusters_on_one_engine_do_not_hear_each_other(
    red_and_blue: tuple[Instance, Instance],
) -> None:
    """A disconnect and a poke in red close and wake nobody in blue, and blue counts none of it."""
    red, blue = red_and_blue
    async with (
        session(red, BOB) as in_red,
        session(blue, BOB) as in_blue,
        red.async_http("urn:admin", "admin poke") as to_red,
        blue.async_http("urn:admin", "poke admin") as to_blue,
    ):
        await to_red.post("/v1/pokes", json={"recipient": BOB})
        assert await next_frame(in_red) == {"type": "poke"}
        assert (await to_red.delete(f"/v1/sessions/{BOB}")).status_code == 204
        with pytest.raises(websockets.ConnectionClosed):
            await in_red.recv()
        assert in_red.close_code == 4401
        assert await frames(in_blue) == []
        assert await metrics(blue, Metric.POKES, Metric.POKES_NOISE) == [0, 0]
        await to_blue.post("/v1/pokes", json={"recipient": BOB})
        assert await next_frame(in_blue) == {"type": "poke"}
        status = (await to_red.get("/v1/cluster")).json()
        assert [each["id"] for each in status["instances"]] == ["red-1"]
