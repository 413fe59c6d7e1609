"""Virtual time: what a simulated process may rely on."""

import asyncio
import time

import pytest

from simulation.loop import EPOCH_S, LivelockError, Scheduler


async def test_hours_pass_at_once() -> None:
    """A sleep moves every clock, and takes no time."""
    loop = asyncio.get_running_loop()
    before = loop.time(), time.monotonic(), time.time()
    await asyncio.sleep(3600)
    assert (loop.time(), time.monotonic(), time.time()) == tuple(each + 3600 for each in before)


def test_each_process_has_its_own_clocks() -> None:
    """Set and paced differently, and a timer is never early by its own."""
    scheduler = Scheduler()
    fast = scheduler.process("fast", clock_s=1000, pace=2, wall_ahead_s=5)
    fired: list[tuple[float, float]] = []
    fast.call_later(10, lambda: fired.append((scheduler.now, fast.time())))
    scheduler.run()
    assert fired == [(5.0, 1010.0)]
    assert fast.wall() == EPOCH_S + 5 + 5


def test_a_paused_process_misses_nothing_and_does_all_at_once() -> None:
    """After SIGSTOP and SIGCONT all timers and arrivals are handled, only later."""
    scheduler = Scheduler()
    outside, process = scheduler.process("outside"), scheduler.process("process")
    did: list[tuple[str, float]] = []
    process.call_later(1, lambda: did.append(("timer", scheduler.now)))
    process.deliver(2, lambda: did.append(("arrival", scheduler.now)))
    process.pause()
    outside.call_later(10, process.resume)
    scheduler.run()
    assert sorted(did) == [("arrival", 10.0), ("timer", 10.0)]


def test_a_killed_process_does_nothing_more() -> None:
    """After SIGKILL neither due callbacks nor ``finally`` blocks run."""
    scheduler = Scheduler()
    process = scheduler.process("process")
    did = []

    async def work() -> None:
        try:
            await asyncio.sleep(1)
        finally:
            did.append("cleaned up")

    process.create_task(work())
    scheduler.run(0.5)
    process.call_soon(did.append, "more")
    process.kill()
    scheduler.run()
    assert did == []
    process.reap()
    assert did == ["cleaned up"]


def test_what_was_killed_before_its_turn_unwinds_at_the_end() -> None:
    """A task that was to run on when its process was killed cleans up too, awaits included."""
    scheduler = Scheduler()
    process = scheduler.process("process")
    did = []

    async def work() -> None:
        try:
            await asyncio.sleep(0)
        finally:
            await asyncio.sleep(0)
            did.append("cleaned up")

    process.create_task(work())
    process.call_soon(process.kill)
    scheduler.run()
    assert did == []
    process.reap()
    assert did == ["cleaned up"]


def test_standing_still_is_noticed() -> None:
    """Code that reschedules itself for ever does not hang the simulation."""
    process = Scheduler().process("process")

    def again() -> None:
        process.call_soon(again)

    process.call_soon(again)
    with pytest.raises(LivelockError, match="process"):
        process.scheduler.run()


def test_what_nobody_catches_is_told() -> None:
    """An error in a callback or in a task is reported, and the loop continues."""
    scheduler = Scheduler()
    process = scheduler.process("process")
    told: list[str] = []
    scheduler.on_error = told.append

    async def fail() -> None:
        raise ValueError("in a task")

    process.call_soon(lambda: 1 / 0)
    process.create_task(fail())
    scheduler.run()
    assert len(told) == 2
    assert "division by zero" in told[0]
    assert "in a task" in told[1]
