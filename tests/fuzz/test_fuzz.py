"""The fuzz runs in short; ``make fuzz`` has the long ones."""

from pathlib import Path

import pytest

from tests.fuzz.running import BORDERS, ON_A_SOCKET, run

INPUTS = {"key_sets": 200, "ingress": 500}
INPUTS |= dict.fromkeys(ON_A_SOCKET, 300)


@pytest.mark.parametrize("border", BORDERS)
async def test_nonsense_at_a_border_harms_nothing(border: str, tmp_path: Path) -> None:
    """No traceback, no session left behind, memory flat, and the next poke is delivered."""
    told: list[str] = []
    await run([border], INPUTS.get(border, 2_000), 1, tmp_path, told.append)
    assert told
