"""The asynchronous tests here run on virtual time."""

import asyncio
from collections.abc import Callable, Iterator, Mapping

import pytest

from simulation.determinism import under_control
from simulation.loop import Scheduler


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """A loop that never waits, instead of asyncio's."""
    return {"virtual": lambda: Scheduler().process("test")}


@pytest.fixture(autouse=True)
def _virtual_clocks() -> Iterator[None]:
    """``time.monotonic`` and its like show virtual time too."""
    with under_control(seed=1):
        yield
