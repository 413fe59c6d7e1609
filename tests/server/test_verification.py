"""A real instance finds what no transport brought: its mailbox is asked, not the engine."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pokebridge.client import PokeClient, ReceivedMessage
from pokebridge.mailbox.sqlite import SqliteMailbox
from pokebridge.model import Poke
from pokebridge.telemetry import Metric
from pokebridge.testing.mailbox_kit import BOB, message
from tests.support import Serve, wait_until


async def _commit_without_a_poke(path: Path, number: int) -> None:
    """Commit a message whose poke counts as published, as when an engine took and dropped it."""
    mailbox = await SqliteMailbox.open(str(path))
    receipt = await mailbox.append(message(id=f"lost {number}"))
    await mailbox.confirm_outbox([Poke(BOB, receipt.version)])
    await mailbox.close()


def _has_all(received: Sequence[str], count: int) -> bool:
    return len(received) == count


async def test_a_lost_poke_is_made_up_for(serve: Serve, tmp_path: Path) -> None:
    """A connected client pulls what it was never poked for, and the loss is counted."""
    path = tmp_path / "mailbox.db"
    instance = serve(mailbox=f"sqlite:///{path}", verify_every_s=1)
    received: list[str] = []

    async def take(messages: Sequence[ReceivedMessage]) -> None:
        received.extend(each.id for each in messages)

    async with PokeClient(instance.url, instance.token(BOB), take) as client:
        await client.wait_ready()
        # Not before the third is it certain that the instance knows what Bob was poked for last.
        for n in range(3):
            await _commit_without_a_poke(path, n)
            await wait_until(partial(_has_all, received, n + 1))
    assert received == ["lost 0", "lost 1", "lost 2"]
    async with instance.async_http() as http:
        metrics = (await http.get("/metrics")).text
    lost = re.search(rf"^{Metric.POKES_LOST} (\d+)", metrics, re.MULTILINE)
    assert lost is not None
    assert int(lost[1]) in {1, 2}
