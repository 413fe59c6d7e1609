"""Recipients with many sessions: nobody waits for them, and their pulls are spread.

The listeners are simple ones here, so that each turn of the event loop can be looked at.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from pokebridge.gateway.audiences import LARGE, SLICE
from pokebridge.gateway.bridge import Bridge
from pokebridge.gateway.session_map import SessionMap
from pokebridge.model import Poke
from pokebridge.supervisor import supervise, task_failures
from pokebridge.wire import Disconnect, frame_text
from tests.gateway.harness import running
from tests.support.waiting import wait_until

ROOM, BOB = "urn:group:room", "urn:user:bob"
MANY = 10 * LARGE


@dataclass(eq=False)
class Hearer:
    """A session that keeps what it is told."""

    recipient: str
    began_at: int = 0
    is_session: bool = True
    heard: list[Any] = field(default_factory=list)

    def notify(self, version: int | None, frame: bytes) -> bool:
        """Take a poke."""
        assert "closed" not in self.heard
        self.heard.append(json.loads(frame_text(frame)))
        return True

    def close(self, code: int, reason: str) -> None:
        """End."""
        self.heard.append("closed")


class World:
    """A bridge with an audience, and a user beside it."""

    def __init__(self, pulls_per_s: float) -> None:
        self.sessions: SessionMap[Any] = SessionMap(64, ("urn:group:",))
        self.bridge = Bridge(self.sessions, lambda: pulls_per_s)
        self.room = [self.join() for _ in range(MANY)]
        self.bob = self.join(BOB)

    def join(self, recipient: str = ROOM) -> Hearer:
        """A new session."""
        session = Hearer(recipient)
        self.sessions.add(session)
        return session

    def poke(self, version: int | None, recipient: str = ROOM) -> None:
        """A poke arrives."""
        self.bridge.handle_poke(Poke(recipient, version))

    @property
    def reached(self) -> int:
        """How many of the audience have heard anything."""
        return sum(bool(each.heard) for each in self.room)

    def versions(self) -> set[tuple[int | None, ...]]:
        """The versions of the pokes of a session, for all sessions of the audience."""
        return {tuple(each.get("version") for each in session.heard) for session in self.room}


@asynccontextmanager
async def audience(pulls_per_s: float = 1e6) -> AsyncIterator[World]:
    """An audience that pulls at most so often."""
    world = World(pulls_per_s)
    task = supervise("walks", world.bridge.walks.run)
    yield world
    task.cancel()


async def test_others_have_their_turn_between_two_slices() -> None:
    """A slice is poked in a turn of the loop, and a poke for somebody else does not wait."""
    async with audience() as world:
        world.poke(1)
        before, turns = 0, 0
        while world.reached < MANY:
            assert world.reached - before <= SLICE
            before = world.reached
            turns += 1
            world.poke(turns, BOB)
            assert len(world.bob.heard) == turns
            await asyncio.sleep(0)
        assert turns >= MANY / SLICE
        assert world.bridge.counters.delivered == MANY + turns


async def test_two_audiences_share_the_turns() -> None:
    """With two of them a turn takes no longer than with one, and neither waits for the other."""
    async with audience() as world:
        others = [world.join("urn:group:other") for _ in range(MANY)]
        world.poke(1)
        world.poke(1, "urn:group:other")
        before = 0
        while (reached := world.reached + sum(bool(each.heard) for each in others)) < 2 * MANY:
            assert reached - before <= SLICE
            assert abs(2 * world.reached - reached) <= 2 * SLICE
            before = reached
            await asyncio.sleep(0)


async def test_the_pulls_of_an_audience_are_spread() -> None:
    """``within_ms`` grows with the audience; a small one is poked at once, without it."""
    async with audience(pulls_per_s=2000) as world:
        world.poke(7)
        await wait_until(lambda: world.reached == MANY)
        assert world.room[0].heard == [{"type": "poke", "version": 7, "within_ms": MANY // 2}]
        few = [world.join("urn:group:few") for _ in range(LARGE)]
        world.poke(7, "urn:group:few")
        assert {tuple(map(str, each.heard)) for each in few} == {
            ("{'type': 'poke', 'version': 7}",)
        }


async def test_a_slow_instance_keeps_no_audience_waiting_for_long() -> None:
    """Pulls are spread over a minute at most, however few of them it bears."""
    async with audience(pulls_per_s=1) as world:
        world.poke(7)
        await wait_until(lambda: world.reached == MANY)
        assert world.room[0].heard[0]["within_ms"] == 60_000


async def test_pokes_meanwhile_are_merged_into_one() -> None:
    """It has the newest version, or none if a poke had none. Known versions are not repeated."""
    async with audience(pulls_per_s=10 * MANY) as world:
        for version in (5, 7, 6, 4):
            world.poke(version)
        assert world.bridge.audiences.was_poked(ROOM)
        await wait_until(lambda: not world.bridge.audiences.was_poked(ROOM))
        for each in (8, None, 9):
            world.poke(each)
        await wait_until(lambda: not world.bridge.audiences.was_poked(ROOM))
        world.poke(10)
        world.poke(10)  # the echo of a poke that began on this host
        heard = {(5, 7, 8, None, 10)}
        await wait_until(lambda: world.versions() == heard)
        await wait_until(lambda: not world.bridge.audiences.was_poked(ROOM))
        assert world.versions() == heard


async def test_sessions_come_and_go_during_a_walk() -> None:
    """One that leaves is not missed, and one that joins pulls on its ``ready``: others hear all."""
    async with audience() as world:
        world.poke(1)
        await asyncio.sleep(0)
        gone, late = world.room.pop(), world.join()
        world.sessions.remove(gone)
        world.poke(2)
        await wait_until(lambda: late.heard and len(world.room[-1].heard) == 2)
        assert world.versions() == {(1, 2)}
        assert late.heard[0]["version"] == 2


async def test_a_disconnect_closes_an_audience_in_slices() -> None:
    """All who were there are closed, during a poke too; who comes later is not."""
    async with audience() as world:
        world.poke(1)
        world.bridge.disconnect(Disconnect(ROOM))
        late = world.join()
        await asyncio.sleep(0)
        assert sum("closed" in each.heard for each in world.room) <= SLICE
        await wait_until(lambda: all("closed" in each.heard for each in world.room))
        assert all(each.heard[0] != "closed" for each in world.room)
        assert "closed" not in late.heard


async def test_one_broken_session_silences_no_other() -> None:
    """What its poke raises is counted as a failure."""
    async with audience() as world:
        before = task_failures["audience"]
        world.room[5].heard = ["closed"]  # so that its poke fails
        world.poke(1)
        await wait_until(lambda: world.reached == MANY and world.room[-1].heard)
        assert all(each.heard != [] for each in world.room)
        assert task_failures["audience"] == before + 1


async def test_a_gap_wakes_an_audience_in_slices() -> None:
    """Everybody is poked once, whatever is being poked at the same time."""
    async with audience() as world:
        world.bridge.wake(lambda _: True, 1e6)
        await asyncio.sleep(0)
        assert world.reached <= SLICE
        await wait_until(lambda: world.reached == MANY and bool(world.bob.heard))
        assert world.versions() == {(None,)}


async def test_the_sockets_of_a_group() -> None:
    """More than a user may have: each hears a poke once, and goes with its client."""
    async with running(group_prefixes=("urn:group:",), audience_pulls_per_s=1e5) as server:
        clients = [await server.open(ROOM) for _ in range(LARGE + 20)]
        await server.poke(ROOM, 3)
        for client in clients:
            assert await client.message() == {"type": "poke", "version": 3, "within_ms": 1}
        for client in clients[:40]:
            await client.close()
        await wait_until(lambda: len(server.gateway.sessions) == LARGE - 20)
        await wait_until(lambda: not server.gateway.bridge.audiences.was_poked(ROOM))
        await server.poke(ROOM, 4)
        for client in clients[40:]:
            assert await client.message() == {"type": "poke", "version": 4}
