"""Blocking the loop in pokebridge fails a test; blocking it in a test does not."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import blockbuster
import pytest

import pokebridge


def _sleeper() -> Callable[[], None]:
    """A function that blocks, compiled as if it stood in pokebridge."""
    directory = Path(pokebridge.__path__[0])
    scope: dict[str, Callable[[], None]] = {}
    source = "import time\ndef sleep(): time.sleep(0.001)"
    exec(compile(source, str(directory / "made_up.py"), "exec"), scope)
    return scope["sleep"]


async def test_a_blocking_call_of_pokebridge_is_caught() -> None:
    """A call that stops the loop raises where it is made."""
    with pytest.raises(blockbuster.BlockingError, match=r"time\.sleep"):
        _sleeper()()


async def test_a_test_and_a_thread_may_block() -> None:
    """Blocking calls of tests, and calls outside the loop, are allowed."""
    time.sleep(0.001)  # noqa: ASYNC251 - that it is let through is the point
    await asyncio.to_thread(_sleeper())
