"""The servers of an engine, and the routes between them: what crosses a broken route is lost.

A server delivers to its own connections. It forwards a signal to another server only once that
server has announced a subscription for it. The announcement takes the route's delay too, and is
repeated after the route was broken. Signals lost meanwhile are not reported.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random
from typing import Final

from simulation.loop import VirtualLoop
from simulation.network import Peer, Trouble

INTEREST_SPREAD_S: Final = 1.0
"""How long an adapter gives the servers to tell each other of a subscription."""


@dataclass(slots=True)
class Route:
    """The way between two servers."""

    delay_s: float
    """How long a signal takes, and how long the news of a subscription."""
    broken: int = 0
    """How many faults keep it broken now."""
    breaks: int = 0
    """How often it broke: what was on it then is lost."""
    healed_at: float = float("-inf")
    """Since when it is whole: then it carries the news of all subscriptions anew."""


class Servers:
    """The servers that one engine consists of."""

    def __init__(self, outside: VirtualLoop, rng: Random, count: int) -> None:
        self.count = count
        self.lies = Trouble(outside)
        """When they lost signals, and reported nothing."""
        self.spread_s = INTEREST_SPREAD_S if count > 1 else 0.0
        """How long an adapter waits before it relies on a subscription."""
        self._outside = outside
        self._rng = rng
        self._routes = {
            frozenset(pair): Route(rng.choice((0.001, 0.1, 0.4)))
            for pair in combinations(range(count), 2)
        }
        self._homes: dict[Peer, int] = {}
        self._entries: Sequence[int] = range(count)

    # --- connections ------------------------------------------------------------------------------

    def home_of(self, peer: Peer) -> int:
        """The server that ``peer`` is connected to."""
        if peer not in self._homes:
            self._homes[peer] = self._rng.choice(self._entries)
        return self._homes[peer]

    def lead_away_from(self, server: int) -> None:
        """Direct new connections to the other servers; existing ones stay."""
        self._entries = [each for each in range(self.count) if each != server]

    def lead_to_all(self) -> None:
        """Direct new connections to any server."""
        self._entries = range(self.count)

    def connect_anew(self, peer: Peer) -> None:
        """``peer`` has lost its connection: the next one may be to another server."""
        self._homes.pop(peer, None)

    # --- routes -----------------------------------------------------------------------------------

    @property
    def routes(self) -> Sequence[Route]:
        """All routes."""
        return list(self._routes.values())

    def routes_of(self, server: int) -> Sequence[Route]:
        """The routes between ``server`` and the others."""
        return [route for ends, route in self._routes.items() if server in ends]

    def route(self, one: int, other: int) -> Route | None:
        """The route between two servers; ``None`` when they are one."""
        return None if one == other else self._routes[frozenset((one, other))]

    def break_off(self, routes: Sequence[Route]) -> None:
        """Lose what is on ``routes``, and what is sent over them."""
        self.lies.begin()
        for route in routes:
            route.broken += 1
            route.breaks += 1

    def heal(self, routes: Sequence[Route]) -> None:
        """End one break of each of ``routes``; their servers tell each other all subscriptions."""
        now = self._outside.scheduler.now
        for route in routes:
            route.broken -= 1
            route.healed_at = now
        self._outside.deliver(max(route.delay_s for route in routes) + 0.01, self.lies.end)

    def lag(self, route: Route, more_s: float) -> None:
        """Slow ``route`` down."""
        self.lies.begin()
        route.delay_s += more_s

    def catch_up(self, route: Route, more_s: float) -> None:
        """End one :meth:`lag` of ``route``."""
        route.delay_s -= more_s
        self._outside.deliver(more_s + 0.01, self.lies.end)

    def forwards(self, route: Route | None, known_at: float) -> bool:
        """Whether ``route`` now carries signals to a subscription.

        Its own server knows of it since ``known_at``.
        """
        if route is None:
            return True
        told_at = max(known_at, route.healed_at) + route.delay_s
        return not route.broken and told_at <= self._outside.scheduler.now
