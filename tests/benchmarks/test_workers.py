"""The measure of a host with workers runs, at a size that proves that and measures nothing."""

import pytest

from benchmarks import workers
from benchmarks.workers import Sizes


@pytest.mark.long
async def test_workers() -> None:
    """Every figure is taken, and the ratios of CPU and memory are of a likely size."""
    sizes = Sizes(
        sessions=(100, 50),
        warm_up=20,
        handshakes=100,
        signals=500,
        messages=32,
        listeners=8,
        rounds=1,
        crowd=(100, 100),
    )
    figures = await workers.measure(sizes=sizes)
    ratios = [figure for figure in figures if figure.unit == "x"]
    assert len(ratios) == 2 + 2 * len(workers.MAILBOXES)
    assert all(0.1 < figure.value < 10 for figure in ratios)


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_as_many_sessions_as_two_workers_can_open() -> None:
    """38,000 on one port: even, and each of them is poked."""
    *uneven, memory = await workers.crowd(Sizes())
    assert [figure.met for figure in uneven] == [True] * 3
    assert memory.met
