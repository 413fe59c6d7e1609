"""The noise ratio beside a profiler's, at a size that proves that and measures nothing."""

from benchmarks import profiled


async def test_the_profiler_finds_the_bridge() -> None:
    """py-spy sees an instance drop pokes for others, and the instance says that it does."""
    (figure,) = await profiled.measure(duration_s=3, signals_per_s=2000, warm_up_s=1.5)
    assert 1 <= figure.value < 50
