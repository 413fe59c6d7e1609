"""The measure of the whole message runs, at a size that proves that and measures nothing."""

import shutil

import pytest

from benchmarks import cycle
from benchmarks.cycle import Sizes
from tests.support.missing import missing


# nats-py 2 opens its WebSockets by an older signature of aiohttp's.
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:parameter 'timeout' of type 'float':DeprecationWarning")
async def test_cycle() -> None:
    """Every message is sent, heard of, pulled and acknowledged, with each mailbox and on NATS."""
    if shutil.which("node") is None:
        missing("node")
    sizes = Sizes(requests=64, messages=64, clients=16, rounds=1, steady_s=0.3)
    figures = {figure.name: figure for figure in await cycle.measure(sizes=sizes)}
    assert all(figure.value > 0 for figure in figures.values())
    for mailbox in cycle.MAILBOXES:
        assert f"CPU: whole message, {mailbox}" in figures
        assert f"capacity of one core, {mailbox}" in figures
    ratios = {name for name, figure in figures.items() if figure.unit == "x"}
    assert ratios == {f"{name}, to {other}" for name, other, _ in cycle.AT_MOST}
    assert all(figures[name].at_most is not None for name in ratios)
