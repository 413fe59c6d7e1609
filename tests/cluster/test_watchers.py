"""Pokes for whoever watches."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from pokebridge.cluster import watchers
from pokebridge.cluster.watchers import MAX_WATCHERS, Watchers, legible
from pokebridge.errors import TransportError
from pokebridge.model import Poke
from tests.support import wait_until


class World:
    """A cluster of one number, and what was poked."""

    def __init__(self) -> None:
        self.shown = 0
        self.looks = 0
        self.published: list[str] = []
        self.poked_here: list[str] = []
        self.is_down = False
        self.consoles: set[str] = set()
        self.watchers = Watchers(self._look, self._publish, self._poke_console, self._poke_here)

    def _look(self) -> dict[str, int]:
        self.looks += 1
        return {"shown": self.shown}

    async def _publish(self, pokes: Sequence[Poke]) -> None:
        if self.is_down:
            raise TransportError("gone")
        self.published += [poke.recipient for poke in pokes]

    def _poke_console(self, recipient: str) -> bool:
        if is_here := recipient in self.consoles:
            self.poked_here.append(recipient)
        return is_here

    def _poke_here(self, poke: Poke) -> None:
        self.poked_here.append(poke.recipient)


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """Looked at more often than in earnest."""
    monkeypatch.setattr(watchers, "LOOK_EVERY_S", 0.01)
    world = World()
    yield world
    await world.watchers.close()


async def test_a_change_is_poked_once(world: World) -> None:
    """At first, and whenever there is something new, never otherwise."""
    world.watchers.add("bob")
    await wait_until(lambda: world.looks > 5, what="a few looks")
    assert world.published == ["bob"]
    world.shown = 1
    await wait_until(lambda: world.published == ["bob", "bob"], what="the second poke")


async def test_a_console_here_is_poked_without_a_signal(world: World) -> None:
    """Otherwise it would count its own pokes. For a watcher elsewhere a signal is published."""
    world.consoles = {"alice"}
    world.watchers.add("alice")
    world.watchers.add("bob")
    await wait_until(lambda: bool(world.published and world.poked_here), what="both pokes")
    assert (set(world.published), set(world.poked_here)) == ({"bob"}, {"alice"})


async def test_nobody_watches_nobody_looks(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who does not say so again is forgotten, and the last one ends the looking."""
    monkeypatch.setattr(watchers, "WATCH_S", 0.05)
    world.watchers.add("bob")
    await wait_until(lambda: world.watchers._task is None, what="the end of looking")
    looks = world.looks
    await asyncio.sleep(0.03)
    assert world.looks == looks
    world.watchers.add("bob")
    await wait_until(lambda: world.looks > looks, what="looking again")


async def test_a_broken_transport_is_gone_around(world: World) -> None:
    """The sessions here are poked even so."""
    world.is_down = True
    world.watchers.add("bob")
    await wait_until(lambda: world.poked_here == ["bob"], what="a poke")


async def test_watchers_are_bounded(world: World) -> None:
    """One too many replaces the one that said so longest ago."""
    for number in range(MAX_WATCHERS):
        world.watchers.add(str(number))
    world.watchers.add("0")
    world.watchers.add("late")
    await wait_until(lambda: bool(world.published), what="the first pokes")
    assert set(world.published) == {str(n) for n in range(MAX_WATCHERS)} - {"1"} | {"late"}


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        (0.01234, 0.01),
        (123.4, 120.0),
        (87_654_321, 87_700_000),
        (3, 3),
        (True, True),
        ("a", "a"),
        ({"a": [1.26, "x"]}, {"a": [1.3, "x"]}),
    ],
)
def test_what_no_eye_sees_is_no_news(value: object, seen: object) -> None:
    """Floats are compared by two digits, large integers by three, the rest exactly."""
    assert legible(value) == seen
