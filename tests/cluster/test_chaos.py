"""The play of misfortunes in small: everything is pulled, and nobody waits for long."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cluster.chaos import ACTS, SMALL, Play, kill_one, migrate, play, stage
from tests.support import Daemon

# On a machine that runs other tests too: `make chaos` holds the limits themselves.
PATIENCE = 6


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "acts",
    [
        pytest.param([kill_one, migrate], id="two acts"),
        pytest.param(ACTS, id="all acts", marks=pytest.mark.long),
    ],
)
async def test_five_instances_through_every_misfortune(
    acts: Sequence[Play],
    own_nats_server: Daemon,
    postgres_database: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All that was answered 202 is pulled by every connected client, act after act, in time."""
    with capsys.disabled():
        async with stage(tmp_path, own_nats_server, postgres_database, SMALL, print) as played:
            outcomes = await play(played, acts)
    for outcome in outcomes:
        assert outcome.others_s <= PATIENCE * outcome.limit_others_s, outcome
        assert outcome.struck_s <= PATIENCE * outcome.limit_struck_s, outcome
