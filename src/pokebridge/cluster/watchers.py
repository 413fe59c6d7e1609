"""Pokes for clients that watch the cluster, as the console does.

A watcher is a recipient like any other: it holds a session, is poked when there is something new to
see, and pulls it (``GET /v1/cluster``). A watch expires unless it is renewed, so a watcher that has
gone leaves no state. Without watchers nothing is compared.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import msgspec

from pokebridge.errors import TransportError
from pokebridge.model import Poke, PublishPokes
from pokebridge.supervisor import cancel, supervise

CONSOLE_DEVICE = "console"
"""The device that a console names: such a session is no user's, and is not counted as one."""
WATCH_S = 30.0
LOOK_EVERY_S = 1.0
MAX_WATCHERS = 100
_PUBLISH_TIMEOUT_S = 1.0


class Watchers:
    """The recipients that watch, each for ``WATCH_S`` since it last asked to.

    Args:
        look: returns what there is to see, as a dataclass. Two looks are compared as
            :func:`legible` leaves them.
        publish: pokes the watchers' sessions on every instance.
        poke_console: pokes the consoles of a watcher on this instance, and returns whether there
            is one. Then nothing is published, so that a console does not count its own pokes.
        poke_here: pokes a watcher's sessions on this instance. Used when the transport fails, since
            that is when operators watch.
    """

    def __init__(
        self,
        look: Callable[[], object],
        publish: PublishPokes,
        poke_console: Callable[[str], bool],
        poke_here: Callable[[Poke], None],
    ) -> None:
        self._look = look
        self._publish = publish
        self._poke_console = poke_console
        self._poke_here = poke_here
        self._until_s: dict[str, float] = {}
        self._task: asyncio.Task[None] | None = None

    @property
    def recipients(self) -> Collection[str]:
        """Who watches."""
        return self._until_s.keys()

    def add(self, recipient: str) -> float:
        """Poke ``recipient`` when there is something new, for the seconds returned.

        When there are too many watchers, the one that asked longest ago is dropped.
        """
        self._until_s.pop(recipient, None)
        self._until_s[recipient] = time.monotonic() + WATCH_S
        if len(self._until_s) > MAX_WATCHERS:
            del self._until_s[next(iter(self._until_s))]
        if self._task is None:
            self._task = supervise("console_watchers", self._watch)
        return WATCH_S

    async def close(self) -> None:
        """Stop poking."""
        await cancel(self._task)

    async def _watch(self) -> None:
        shown = None
        while self._until_s:
            seen = legible(msgspec.to_builtins(self._look()))
            if seen != shown:
                shown = seen
                elsewhere = [who for who in self._until_s if not self._poke_console(who)]
                if elsewhere:
                    await self._poke([Poke(recipient) for recipient in elsewhere])
            await asyncio.sleep(LOOK_EVERY_S)
            now_s = time.monotonic()
            self._until_s = {who: end for who, end in self._until_s.items() if end > now_s}
        self._task = None

    async def _poke(self, pokes: Sequence[Poke]) -> None:
        with contextlib.suppress(TransportError, TimeoutError):
            async with asyncio.timeout(_PUBLISH_TIMEOUT_S):
                await self._publish(pokes)
                return
        for poke in pokes:
            self._poke_here(poke)


def legible(value: Any) -> Any:
    """``value`` with its numbers rounded, so that changes too small to see do not count.

    Floats keep two significant digits and at most two decimal places. Large integers, such as
    sizes, keep three digits.
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
