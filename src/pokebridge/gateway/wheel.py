"""One timing wheel for all sockets of an instance, instead of a timer each.

A timer handle needs more memory than the rest of an idle session, and ten thousand of them keep
the loop's heap busy. Here a deadline is a place in a set, and the loop has one timer, for the next
tick.
"""

import asyncio
import functools
import math
from typing import Protocol

from pokebridge.supervisor import note_failure

TICK_S = 0.25
_STALL_TICKS = 8


class Timed(Protocol):
    """What can be put on the wheel. ``wheel_slot`` is only for the wheel, and starts as 0."""

    wheel_slot: int

    def wake(self, now: float) -> None:
        """The deadline has passed, by less than a tick. The item is off the wheel."""


_NOTHING: tuple[int, dict[Timed, None]] = (0, {})


class Wheel:
    """Deadlines with a resolution of ``tick_s`` seconds; never early, at most one tick late."""

    def __init__(self, tick_s: float = TICK_S) -> None:
        self._tick_s = tick_s
        # By its number, a slot's number and items. A dict of few items is half as large as a set.
        self._slots: dict[int, tuple[int, dict[Timed, None]]] = {}
        self._last_slot = 0
        self._timer: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Turn, until ``stop``, by the loop's clock."""
        self._last_slot = int(loop.time() / self._tick_s)
        self._turn(loop)

    def stop(self) -> None:
        """Turn no more."""
        if self._timer is not None:
            self._timer.cancel()

    def schedule(self, item: Timed, at: float) -> None:
        """Wake ``item`` once ``at`` has passed. This replaces its earlier deadline."""
        slot = max(math.ceil(at / self._tick_s), self._last_slot + 1)
        if slot == item.wheel_slot:
            return
        self.cancel(item)
        # The slot's own object of its number: an int takes 32 bytes, and there are many items.
        item.wheel_slot, items = self._slots.get(slot) or self._slots.setdefault(slot, (slot, {}))
        items[item] = None

    def cancel(self, item: Timed) -> None:
        """Take ``item`` off the wheel."""
        if item.wheel_slot:
            _, items = self._slots.get(item.wheel_slot, _NOTHING)
            items.pop(item, None)
            item.wheel_slot = 0

    def advance(self, now: float) -> None:
        """Wake whatever was due by ``now``."""
        current = int(now / self._tick_s)
        for slot in range(self._last_slot + 1, current + 1):
            self._last_slot = slot
            _, items = self._slots.pop(slot, _NOTHING)
            for item in items:
                if item.wheel_slot == slot:  # not cancelled by one woken before it
                    item.wheel_slot = 0
                    try:
                        item.wake(now)
                    except Exception as error:  # noqa: BLE001 - the others' deadlines still count
                        note_failure("wheel", error)
        self._last_slot = max(self._last_slot, current)

    def _turn(self, loop: asyncio.AbstractEventLoop, *, late: bool = False) -> None:
        now = loop.time()
        # After a stall (the process was stopped, the loop was blocked) timers run before sockets
        # are read. Let the loop first read what peers sent in time, or they would be dropped.
        if now / self._tick_s - self._last_slot > _STALL_TICKS and not late:
            turn = functools.partial(self._turn, loop, late=True)
        else:
            turn = functools.partial(self._turn, loop)
            self.advance(now)
        self._timer = loop.call_later(self._tick_s, turn)
