"""Fixtures of the tests of workers."""

from collections.abc import AsyncIterator

import pytest

from tests.workers.ends import Ends, connected


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    """Both ends of a channel."""
    async with connected() as both:
        yield both
