"""Pokes for whoever watches the cluster, as the console does.

A watcher is a recipient like any other: it sleeps on a session, is poked when there is something
new to see, and pulls it (``GET /v1/cluster``). It says that it watches, and again before that runs
out, so nothing is left of one that has gone; while nobody watches, nobody looks.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from pokebridge.errors import TransportError
from pokebridge.model import Poke

WATCH_S = 30.0
LOOK_EVERY_S = 1.0
MAX_WATCHERS = 100
_PUBLISH_TIMEOUT_S = 1.0


class Watchers:
    """Those who watch, each for ``WATCH_S`` from when it last said so.

    Args:
        look: what there is to see, as a struct; compared as :func:`legible` leaves it.
        publish: how pokes reach a watcher's sessions, wherever those are.
        poke_here: how they reach the sessions here, for when the transport fails: just then an
            operator looks.
    """

    def __init__(
        self,
        look: Callable[[], object],
        publish: Callable[[Sequence[Poke]], Awaitable[None]],
        poke_here: Callable[[Poke], None],
    ) -> None:
        self._look = look
        self._publish = publish
        self._poke_here = poke_here
        self._until_s: dict[str, float] = {}
        self._task: asyncio.Task[None] | None = None

    def add(self, recipient: str) -> float:
        """Poke ``recipient`` when there is something new, for the seconds returned.

        One too many replaces whoever said so longest ago.
        """
        self._until_s.pop(recipient, None)
        self._until_s[recipient] = time.monotonic() + WATCH_S
        if len(self._until_s) > MAX_WATCHERS:
            del self._until_s[next(iter(self._until_s))]
        if self._task is None:
            self._task = asyncio.create_task(self._watch())
        return WATCH_S

    async def close(self) -> None:
        """Poke nobody any more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self) -> None:
        shown = None
        try:
            while self._until_s:
                seen = legible(msgspec.to_builtins(self._look()))
                if seen != shown:
                    shown = seen
                    await self._poke([Poke(recipient) for recipient in self._until_s])
                await asyncio.sleep(LOOK_EVERY_S)
                now_s = time.monotonic()
                self._until_s = {who: end for who, end in self._until_s.items() if end > now_s}
        finally:
            self._task = None

    async def _poke(self, pokes: Sequence[Poke]) -> None:
        with contextlib.suppress(TransportError, TimeoutError):
            async with asyncio.timeout(_PUBLISH_TIMEOUT_S):
                await self._publish(pokes)
                return
        for poke in pokes:
            self._poke_here(poke)


def legible(value: Any) -> Any:
    """``value`` with its numbers rounded to what an eye sees, so that a tremble is no news.

    Floats keep two digits, and at most two places; large integers, such as sizes, three digits.
    """
    match value:
        case dict():
            return {key: legible(each) for key, each in value.items()}
        case list() | tuple():
            return [legible(each) for each in value]
        case float():
            return round(float(f"{value:.2g}"), 2)
        case int() if abs(value) >= 100_000:
            return int(float(f"{value:.3g}"))
    return value
