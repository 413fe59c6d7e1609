"""The play of misfortunes in small: everything is pulled, and nobody waits for long."""

from pathlib import Path

import pytest

from tests.cluster.chaos import SMALL, play, stage
from tests.support import Daemon

# On a machine that runs other tests too: `make chaos` holds the limits themselves.
PATIENCE = 6


@pytest.mark.timeout(240)
async def test_five_instances_through_every_misfortune(
    own_nats_server: Daemon,
    postgres_database: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All that was answered 202 is pulled by every connected client, act after act, in time."""
    with capsys.disabled():
        async with stage(tmp_path, own_nats_server, postgres_database, SMALL, print) as played:
            outcomes = await play(played)
    for outcome in outcomes:
        assert outcome.others_s <= PATIENCE * outcome.limit_others_s, outcome
        assert outcome.struck_s <= PATIENCE * outcome.limit_struck_s, outcome
