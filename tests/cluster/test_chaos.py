"""The play of misfortunes in small: everything is pulled, and nobody waits for long."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.cluster.chaos import (
    SMALL,
    Kind,
    engines,
    play,
    stage,
)

# For a machine that also runs other tests. `make chaos` checks the exact limits.
PATIENCE_S = 30


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kind", "workers"),
    [
        pytest.param("nats", 1, id="on NATS"),
        pytest.param("redis", 1, id="on Valkey"),
        pytest.param("nats", 2, id="on NATS, with workers"),
    ],
)
async def test_five_instances_through_every_misfortune(
    kind: Kind,
    workers: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All that was answered 202 is pulled by every connected client, act after act, in time."""
    with capsys.disabled():
        async with (
            engines(tmp_path, kind) as started,
            stage(tmp_path, started, replace(SMALL, workers=workers), print) as played,
        ):
            outcomes = await play(played)
    for outcome in outcomes:
        assert outcome.others_s <= outcome.limit_others_s + PATIENCE_S, outcome
        assert outcome.struck_s <= outcome.limit_struck_s + PATIENCE_S, outcome
