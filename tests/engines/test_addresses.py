"""Which of several hosts is used."""

import asyncio

import pytest

from pokebridge.engines import addresses
from pokebridge.engines.addresses import first_of


class Hosts:
    """Dials by name: ``mute`` never answers, ``dead`` refuses, others answer with their name."""

    def __init__(self) -> None:
        self.dialled: list[str] = []
        self.discarded: list[str] = []

    async def dial(self, name: str) -> str:
        """Connect."""
        self.dialled.append(name)
        if name == "mute":
            await asyncio.Event().wait()
        if name.startswith("dead"):
            raise ConnectionRefusedError(name)
        return name

    async def discard(self, name: str) -> None:
        """Close."""
        self.discarded.append(name)

    async def first_of(self, *names: str) -> str:
        """The one that is used."""
        return await first_of([lambda n=name: self.dial(n) for name in names], self.discard)  # type: ignore[misc]


async def test_the_first_that_answers_is_used_alone() -> None:
    """The others are not dialled."""
    hosts = Hosts()
    assert await hosts.first_of("a", "b") == "a"
    assert hosts.dialled == ["a"]


async def test_a_host_that_refuses_gives_way_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next is not waited for."""
    monkeypatch.setattr(addresses, "STAGGER_S", 600.0)
    hosts = Hosts()
    assert await hosts.first_of("dead", "b", "c") == "b"
    assert hosts.dialled == ["dead", "b"]


async def test_a_mute_host_gives_way_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up when another has answered."""
    monkeypatch.setattr(addresses, "STAGGER_S", 0.01)
    before = asyncio.all_tasks()
    assert await Hosts().first_of("mute", "mute", "c") == "c"
    assert asyncio.all_tasks() == before


async def test_when_all_fail_the_first_failure_is_raised() -> None:
    """It is the preferred host's."""
    with pytest.raises(ConnectionRefusedError, match="dead-1"):
        await Hosts().first_of("dead-1", "dead-2")


async def test_a_connection_that_comes_too_late_is_discarded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two that answer in one turn of the loop make one connection."""
    monkeypatch.setattr(addresses, "STAGGER_S", 0.01)
    hosts = Hosts()
    answer = asyncio.Event()

    async def dial(name: str) -> str:
        hosts.dialled.append(name)
        if len(hosts.dialled) == 2:
            answer.set()
        await answer.wait()
        return name

    used = await first_of([lambda: dial("a"), lambda: dial("b")], hosts.discard)
    assert sorted([used, *hosts.discarded]) == ["a", "b"]
