"""Large audiences: many sessions of one recipient are poked and closed a few at a time.

Poking 10,000 sessions takes a tenth of a second, and then they all pull. So the event loop gets a
turn after each slice, and other pokes do not wait. An audience, like a session, holds at most one
pending poke. It is poked no more often than its clients can pull.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

from pokebridge.gateway.listener import Listener
from pokebridge.model import Poke
from pokebridge.supervisor import note_failure
from pokebridge.wire import poke_frame

LARGE: Final = 100
"""A recipient with more sessions has a large audience."""
SLICE: Final = 25
"""The sessions of a large audience that share a turn: half a millisecond for a poke."""
MOST_S: Final = 60.0
"""Pulls are spread over this time at most, so that a client hears of everything in bounded time."""


class Walks:
    """Actions on many sessions, in slices: one slice of one walk in each turn of the loop."""

    def __init__(self) -> None:
        self._walks: deque[tuple[Iterator[Listener], Callable[[Listener], object]]] = deque()
        self._begun = asyncio.Event()

    def do(self, sessions: Collection[Listener], act: Callable[[Listener], object]) -> None:
        """Do ``act`` to the present ``sessions``, in their order; at once if they are few."""
        walk = iter(tuple(sessions))
        if len(sessions) <= LARGE:
            _do(act, walk)
        else:
            self._walks.append((walk, act))
            self._begun.set()

    async def run(self) -> None:
        """Walk on for as long as the task runs. Walks take turns."""
        while True:
            await self._begun.wait()
            walk, act = self._walks.popleft()
            if _do(act, islice(walk, SLICE)) == SLICE:
                self._walks.append((walk, act))
            if not self._walks:
                self._begun.clear()
            await asyncio.sleep(0)


def _do(act: Callable[[Listener], object], sessions: Iterator[Listener]) -> int:
    """Do ``act`` to each of ``sessions``. Returns to how many."""
    count = 0
    for count, session in enumerate(sessions, 1):  # noqa: B007 - it is returned
        try:
            act(session)
        except Exception as error:  # noqa: BLE001 - one session must not silence those after it
            note_failure("audience", error)
    return count


@dataclass(slots=True)
class _Poked:
    """An audience that was poked lately.

    - ``version``: for which version, if it is known
    - ``owed``: the poke that it gets next
    """

    version: int | None
    owed: Poke | None = None

    def merge(self, poke: Poke) -> None:
        """Merge ``poke`` into the next one, unless the audience was just poked for its version."""
        if poke.version is None:
            self.owed = poke
        elif self.version is None or poke.version > self.version:
            owed = self.owed
            if owed is None or (owed.version is not None and owed.version < poke.version):
                self.owed = poke


class Audiences:
    """Pokes the recipients with more than LARGE sessions.

    The pulls that a poke causes are spread so that the instance can serve them (``within_ms`` of
    docs/protocol.md). Pokes published meanwhile become one more poke, after that time. Otherwise
    each poke would hurry the pulls that still wait, and their rate would have no bound.
    """

    def __init__(
        self,
        walks: Walks,
        pulls_per_s: Callable[[], float],
        notify: Callable[[Listener, int | None, bytes], object],
        poke: Callable[[Poke], None],
    ) -> None:
        """``notify`` pokes a session. ``poke`` routes the poke that a recipient is owed."""
        self._walks = walks
        self._pulls_per_s = pulls_per_s
        self._notify = notify
        self._poke = poke
        self._poked: dict[str, _Poked] = {}

    def was_poked(self, recipient: str) -> bool:
        """Whether ``recipient`` was poked lately, so that its pending poke is sent soon."""
        return recipient in self._poked

    def poke(self, poke: Poke, sessions: Collection[Listener]) -> None:
        """Poke the ``sessions`` of a recipient: now, or when those that were poked have pulled."""
        poked = self._poked.get(poke.recipient)
        if poked is not None:
            poked.merge(poke)
            return
        self._poked[poke.recipient] = _Poked(poke.version)
        within_s = min(len(sessions) / self._pulls_per_s(), MOST_S)
        frame = poke_frame(poke.version, within_ms=max(1, int(within_s * 1000)))
        self._walks.do(sessions, lambda session: self._notify(session, poke.version, frame))
        asyncio.get_running_loop().call_later(within_s, self._end, poke.recipient)

    def _end(self, recipient: str) -> None:
        owed = self._poked.pop(recipient).owed
        if owed is not None:
            self._poke(owed)
