"""The course of a storm: connect, calm, kill one instance, until all are back, calm again."""

import asyncio
import gc
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from math import inf
from pathlib import Path
from time import monotonic

from pokebridge.bench.storm_fleet import Fleet, FleetPlan, StormInstance
from pokebridge.bench.storm_sender import Sender, make_clients, start_clients
from pokebridge.bench.storm_watch import Sampler, Watcher
from pokebridge.bench.storm_witness import Orders, Testimony, Witness
from pokebridge.errors import UnavailableError

# While they connect for the first time; in the storm they come as they do.
_RAMP_PER_S = 400.0
_RAMP_SHARE = 0.8
_POLL_S = 0.05
# Until what was accepted last must have been pulled.
_STRAGGLERS_S = 30.0
_MOST_WITNESSES = 200


@dataclass(frozen=True, slots=True)
class StormPlan:
    """What is done to ``fleet``; times in seconds."""

    fleet: FleetPlan
    clients: int
    messages_per_s: float
    calm_s: float
    restart_s: float | None
    within_s: float


@dataclass(slots=True)
class Course:
    """When what happened, in seconds of the monotonic clock; ``None``: it did not."""

    calm_from_s: float | None = None
    killed_s: float | None = None
    killed: str = ""
    restarted_s: float | None = None
    back_s: float | None = None
    """All were connected again, and had pulled."""


class Storm:
    """Carries out a :class:`StormPlan`; ``say`` is told how it goes."""

    def __init__(self, plan: StormPlan, directory: Path, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._say = say
        self._loop = asyncio.get_running_loop()
        self.fleet = Fleet(plan.fleet, directory)
        self.watcher = Watcher()
        self.sampler = Sampler(self.watcher, self.fleet)
        self.course = Course()
        self.testimony = Testimony(0, 0, [])
        secret, balancer = self.fleet.secret, self.fleet.balancer
        self.sender = Sender(plan.messages_per_s, secret, balancer, self.watcher)
        self._clients = make_clients(plan.clients, secret, balancer, self.watcher)
        # Slowly enough that none is refused.
        all_per_s = plan.fleet.handshakes_per_s * plan.fleet.instances
        self._clients_per_s = min(_RAMP_PER_S, all_per_s * _RAMP_SHARE)
        self._victim = self.fleet.instances[-1]
        self._witness = self._make_witness()
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        """Do it.

        Raises:
            UnavailableError: an instance does not start or ends by itself, or the clients can't
                even connect before anything is done to them.
        """
        try:
            self._say(f"starting {self._plan.fleet.instances} instances")
            await self.fleet.start()
            await self._witness.start()
            self._spawn(self.sampler.run())
            self._spawn(self._report_progress())
            await self._until_all_are_connected()
            # What has been made until now stays: looking through it again and again would stop
            # all clients at once, and look like a slow instance.
            gc.collect()
            gc.freeze()
            sending = self._spawn(self.sender.run(self._clients))
            await self._storm()
            sending.cancel()
            # What is not answered yet may still become owed.
            await self._until(lambda: not self.watcher.under_way, _STRAGGLERS_S)
            self.testimony = await self._witness.finish()
        finally:
            await self._end()

    @property
    def back(self) -> int:
        """How many of the struck clients have been connected again, and have pulled."""
        if self.course.back_s is not None:
            return len(self.watcher.struck)
        return sum(client.caught_up for client in self.watcher.struck)

    def _make_witness(self) -> Witness:
        plan = self._plan
        others = [each for each in self.fleet.instances if each is not self._victim]
        share = len(others) / plan.fleet.instances
        return Witness(
            Orders(
                secret=self.fleet.secret,
                ports={each.name: each.port for each in others},
                clients=min(_MOST_WITNESSES, plan.clients // 10 + 1),
                clients_per_s=self._clients_per_s * share,
                messages_per_s=plan.messages_per_s,
            )
        )

    async def _until_all_are_connected(self) -> None:
        await start_clients(self._clients, self._clients_per_s)
        if not await self._until(self._all_are_back, self._plan.within_s):
            statuses = ", ".join(
                f"{count} answered {status}"
                for status, count in self.watcher.statuses.most_common()
            )
            raise UnavailableError(
                f"only {self.watcher.connected} of {self._plan.clients} clients could connect"
                f" (handshakes: {statuses or 'none answered'})"
            )

    async def _storm(self) -> None:
        plan, course = self._plan, self.course
        course.calm_from_s = monotonic()
        await self._pass(plan.calm_s)
        victim = self._victim
        self.watcher.struck = frozenset(each for each in self._clients if each.where is victim)
        self._say(f"killing {victim.name} and its {len(self.watcher.struck)} sessions")
        course.killed_s, course.killed = monotonic(), victim.name
        await self.fleet.kill(victim)
        if plan.restart_s is not None:
            self._spawn(self._restart(victim, plan.restart_s))
        if await self._until(self._all_are_back, plan.within_s):
            course.back_s = monotonic()
            self._say(f"all are back after {course.back_s - course.killed_s:.1f} s")
            if plan.restart_s is not None:
                await self._until(lambda: course.restarted_s is not None, inf)
            await self._pass(plan.calm_s)

    async def _restart(self, victim: StormInstance, after_s: float) -> None:
        await asyncio.sleep(after_s)
        await self.fleet.start_one(victim)
        self.course.restarted_s = monotonic()
        self._say(f"{victim.name} is ready again")

    def _all_are_back(self) -> bool:
        return self.watcher.connected == len(self._clients) and all(
            client.caught_up for client in self._clients
        )

    async def _until(self, condition: Callable[[], bool], within_s: float) -> bool:
        """Whether ``condition`` came true in time; what fails meanwhile is raised here."""
        until_s = monotonic() + within_s
        while not (is_true := condition()) and monotonic() < until_s:
            for task in self._tasks:
                if task.done() and not task.cancelled():
                    task.result()
            await asyncio.sleep(_POLL_S)
        return is_true

    async def _pass(self, duration_s: float) -> None:
        await self._until(lambda: False, duration_s)

    async def _report_progress(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            last = self.sampler.samples[-4:]
            self._say(
                f"{self.watcher.connected} of {self._plan.clients} connected;"
                f" in the last second {sum(each.accepted for each in last)} handshakes,"
                f" {sum(each.refused for each in last)} refused,"
                f" {sum(each.pulls for each in last)} pulls"
            )

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(coroutine)
        self._tasks.append(task)
        return task

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for client in self._clients:
            client.stop()
        gc.unfreeze()
        await self._witness.close()
        await self.fleet.close()
