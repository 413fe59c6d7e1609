"""Waiting for a condition, never for a guess of how long it takes."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, overload

T = TypeVar("T")

POLL_S = 0.02
# A limit for hangs, not for slowness: a busy machine takes many times as long as a quiet one.
WAIT_S = 30.0


@overload
async def wait_until(
    condition: Callable[[], Awaitable[T]], timeout_s: float = WAIT_S, what: str = ""
) -> T: ...
@overload
async def wait_until(
    condition: Callable[[], T], timeout_s: float = WAIT_S, what: str = ""
) -> T: ...
async def wait_until(
    condition: Callable[[], T | Awaitable[T]], timeout_s: float = WAIT_S, what: str = ""
) -> T:
    """Return ``condition()``'s first true value; the condition may be a coroutine function.

    Raises :class:`TimeoutError`, which says ``what`` never came, after ``timeout_s`` seconds.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        result = await value if inspect.isawaitable(value) else value
        if result:
            return result
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s} s: {what or condition}")
        await asyncio.sleep(POLL_S)


def block_until(condition: Callable[[], T], timeout_s: float = WAIT_S, what: str = "") -> T:
    """The same for a test without an event loop."""
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s} s: {what or condition}")
        time.sleep(POLL_S)
    return result
