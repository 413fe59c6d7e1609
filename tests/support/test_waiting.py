"""Waiting returns what came, and says what did not."""

import pytest

from tests.support import block_until, wait_until


async def test_it_returns_the_first_true_value() -> None:
    """Plain and coroutine conditions are asked until they have something."""
    answers = iter([None, 0, "here"])

    async def ask() -> str | int | None:
        return next(answers)

    assert await wait_until(ask) == "here"
    assert await wait_until(lambda: "at once") == "at once"
    assert block_until(iter([[], [1]]).__next__) == [1]


async def test_it_gives_up_with_a_reason() -> None:
    """A wait that times out names what it waited for."""
    with pytest.raises(TimeoutError, match=r"not within 0\.05 s: rain"):
        await wait_until(lambda: False, 0.05, "rain")
    with pytest.raises(TimeoutError, match="rain"):
        block_until(lambda: False, 0.05, "rain")
