"""Dialling an engine that has several hosts, one of which may be mute."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

C = TypeVar("C")

# How long a host may take before the next is dialled as well.
STAGGER_S = 0.5


async def first_of(
    dials: Sequence[Callable[[], Coroutine[Any, Any, C]]],
    discard: Callable[[C], Awaitable[None]],
) -> C:
    """Return the first connection that one of ``dials`` makes.

    Each dial begins :data:`STAGGER_S` after the one before it, or as soon as one has failed. So a
    host that accepts connections and never answers costs half a second, and not the whole time.

    Args:
        dials: in order of preference; at least one. A dial that is cancelled must clean up.
        discard: closes a connection that came too late.

    Raises:
        Exception: what the first dial that failed raised, when all have failed.
    """
    waiting = list(dials)
    dialling: set[asyncio.Task[C]] = set()
    failures: list[BaseException] = []
    try:
        while waiting or dialling:
            if waiting:
                dialling.add(asyncio.create_task(waiting.pop(0)()))
            done, dialling = await asyncio.wait(
                dialling,
                timeout=STAGGER_S if waiting else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            made = [task for task in done if task.exception() is None]
            failures += [error for task in done if (error := task.exception())]
            if made:
                dialling |= set(made[1:])
                return made[0].result()
        raise failures[0]
    finally:
        for task in dialling:
            task.cancel()
        for late in await asyncio.gather(*dialling, return_exceptions=True):
            if not isinstance(late, BaseException):
                await discard(late)
