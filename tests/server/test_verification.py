"""A real instance finds what no transport brought: its mailbox is asked, not the engine."""

import asyncio
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pokebridge.client import PokeClient, ReceivedMessage
from pokebridge.telemetry import Metric
from pokebridge.testing.mailbox_kit import BOB, message
from tests.support import Daemon, Instance, Serve, wait_until
from tests.support.engines import run_configured_nats
from tests.support.silence import Silence
from tests.support.unpoked import commit_unpoked


def _has_all(received: Sequence[str], count: int) -> bool:
    return len(received) == count


async def test_a_lost_poke_is_made_up_for(serve: Serve, tmp_path: Path, silence: Silence) -> None:
    """A connected client pulls what it was never poked for, and the loss is counted."""
    path = tmp_path / "mailbox.db"
    instance = serve(mailbox=f"sqlite:///{path}", verify_every_s=1)
    received: list[str] = []

    async def take(messages: Sequence[ReceivedMessage]) -> None:
        received.extend(each.id for each in messages)

    async with PokeClient(instance.url, instance.token(BOB), take) as client:
        await client.wait_ready()
        # Only the third one proves that the instance knows what Bob was poked for last.
        for n in range(3):
            heard = silence("a poke is lost without a trace, with `verify_every_s` 1")
            await commit_unpoked(path, message(id=f"lost {n}"))
            await wait_until(partial(_has_all, received, n + 1))
            heard()
    assert received == ["lost 0", "lost 1", "lost 2"]
    assert await _count(instance, Metric.POKES_LOST) in {1, 2}


async def _count(instance: Instance, metric: Metric) -> int:
    async with instance.async_http() as http:
        found = re.search(rf"^{metric} (\d+)", (await http.get("/metrics")).text, re.MULTILINE)
    assert found is not None
    return int(found[1])


async def test_a_poke_that_can_not_be_published_is_made_up_for(
    serve: Serve, tmp_path: Path, silence: Silence
) -> None:
    """The message is taken and pulled in time. A poke alone is refused, and says what to change."""
    long, other = "r" * 236 + '"' * 20, "urn:user:other"
    with run_configured_nats(tmp_path, "max_payload: 280") as nats:
        mailbox = f"sqlite:///{tmp_path}/mailbox.db"
        instance = await asyncio.to_thread(
            serve, transport=nats.url, mailbox=mailbox, verify_every_s=1
        )
        received: list[str] = []

        async def take(messages: Sequence[ReceivedMessage]) -> None:
            received.extend(each.id for each in messages)

        async with (
            instance.async_http("urn:backend", "send poke") as http,
            PokeClient(instance.url, instance.token(long), take) as one,
            PokeClient(instance.url, instance.token(other), take) as another,
        ):
            await one.wait_ready()
            await another.wait_ready()
            heard = silence("a poke exceeds `max_payload` of NATS, with `verify_every_s` 1")
            for recipient in (long, other):
                given = {"recipient": recipient, "body": 1, "id": recipient[:8]}
                assert (await http.post("/v1/messages", json=given)).status_code == 202
            await wait_until(lambda: set(received) == {long[:8], other[:8]})
            heard()
            refused = await http.post("/v1/pokes", json={"recipients": [other, long]})
            assert refused.status_code == 422
            assert long in refused.json()["detail"]
            assert "max_payload" in refused.json()["detail"]
            assert (await http.post("/v1/pokes", json={"recipient": other})).status_code == 202
        assert await _count(instance, Metric.POKES_UNPUBLISHABLE) == 1


async def test_a_message_is_pulled_while_the_engine_is_away(
    serve: Serve, own_nats_server: Daemon, tmp_path: Path, silence: Silence
) -> None:
    """Nothing can be published, but a connected client still pulls."""
    mailbox = f"sqlite:///{tmp_path}/mailbox.db"
    instance = await asyncio.to_thread(
        serve, transport=own_nats_server.url, mailbox=mailbox, verify_every_s=1
    )
    received: list[str] = []

    async def take(messages: Sequence[ReceivedMessage]) -> None:
        received.extend(each.id for each in messages)

    async with (
        instance.async_http("urn:backend", "send") as http,
        PokeClient(instance.url, instance.token(BOB), take) as client,
    ):
        await client.wait_ready()
        await asyncio.to_thread(own_nats_server.kill)
        for number in range(3):
            given = {"recipient": BOB, "body": number, "id": f"{number}"}
            heard = silence("NATS is away for all, with `verify_every_s` 1")
            (await http.post("/v1/messages", json=given)).raise_for_status()
            await wait_until(partial(_has_all, received, number + 1), 60)
            heard()
    assert not own_nats_server.is_running()
