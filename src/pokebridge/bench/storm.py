"""A storm: kill an instance under its clients, and measure how they come back.

:class:`Storm` carries it out, :func:`storm_report` turns it into figures, and :func:`storm_table`
into a table.
"""

import asyncio
import gc
import os
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any

from pokebridge.bench.fleet import Fleet, FleetPlan, StormInstance
from pokebridge.bench.probe import PokeTime, Probe, ProbeConfig, ProbeResult
from pokebridge.bench.traffic import (
    Sampler,
    Sender,
    Watcher,
    make_clients,
    most_in_a_second,
    percentiles_ms,
    start_clients,
)
from pokebridge.errors import UnavailableError
from pokebridge.supervisor import cancel

# The rate of first connects. In the storm the clients decide when they connect.
_RAMP_PER_S = 400.0
_RAMP_SHARE = 0.8
_POLL_S = 0.05
# How long the last messages have to be pulled.
_STRAGGLERS_S = 30.0
_MOST_PROBE_CLIENTS = 200


@dataclass(frozen=True, slots=True)
class StormPlan:
    """What to do with ``fleet``; times in seconds."""

    fleet: FleetPlan
    clients: int
    messages_per_s: float
    calm_s: float
    restart_s: float | None
    within_s: float


@dataclass(slots=True)
class Course:
    """When each step happened, in seconds of the monotonic clock; ``None``: not yet."""

    calm_from_s: float | None = None
    killed_s: float | None = None
    killed: str = ""
    restarted_s: float | None = None
    back_s: float | None = None
    """When all clients were connected again and had pulled."""


class Storm:
    """Carries out a :class:`StormPlan`; ``say`` gets lines about the progress."""

    def __init__(self, plan: StormPlan, directory: Path, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._say = say
        self._loop = asyncio.get_running_loop()
        self.fleet = Fleet(plan.fleet, directory)
        self.watcher = Watcher()
        self.sampler = Sampler(self.watcher, self.fleet)
        self.course = Course()
        self.probe_result = ProbeResult(0, 0, [])
        secret, balancer = self.fleet.secret, self.fleet.balancer
        self.sender = Sender(plan.messages_per_s, secret, balancer, self.watcher)
        self._clients = make_clients(plan.clients, secret, balancer, self.watcher)
        # Below the limit of the instances, so that no client is refused.
        all_per_s = plan.fleet.handshakes_per_s * plan.fleet.instances
        self._clients_per_s = min(_RAMP_PER_S, all_per_s * _RAMP_SHARE)
        self._victim = self.fleet.instances[-1]
        self._probe = self._make_probe()
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        """Start the instances, connect the clients, kill an instance, wait until all are back.

        Raises:
            UnavailableError: an instance did not start or ended by itself, or the clients could
                not connect at the beginning.
        """
        try:
            self._say(f"starting {self._plan.fleet.instances} instances")
            await self.fleet.start()
            await self._probe.start()
            self._spawn(self.sampler.run())
            self._spawn(self._report_progress())
            await self._until_all_are_connected()
            # All objects so far stay. Collecting them again and again would pause all clients at
            # once, and look like a slow instance.
            gc.collect()
            gc.freeze()
            sending = self._spawn(self.sender.run(self._clients))
            await self._storm()
            sending.cancel()
            # Messages without an answer yet may still be accepted.
            await self._until(lambda: not self.watcher.under_way, _STRAGGLERS_S)
            self.probe_result = await self._probe.finish()
        finally:
            await self._end()

    @property
    def back(self) -> int:
        """How many of the struck clients are connected again and have pulled."""
        if self.course.back_s is not None:
            return len(self.watcher.struck)
        return sum(client.caught_up for client in self.watcher.struck)

    def _make_probe(self) -> Probe:
        plan = self._plan
        others = [each for each in self.fleet.instances if each is not self._victim]
        share = len(others) / plan.fleet.instances
        return Probe(
            ProbeConfig(
                secret=self.fleet.secret,
                ports={each.name: each.port for each in others},
                clients=min(_MOST_PROBE_CLIENTS, plan.clients // 10 + 1),
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
                f"only {self.watcher.connected} of {self._plan.clients} clients connected within"
                f" {self._plan.within_s:g} s"
                f" (handshakes: {statuses or 'none answered'})"
            )

    async def _storm(self) -> None:
        plan, course = self._plan, self.course
        course.calm_from_s = monotonic()
        await self._pass(plan.calm_s)
        victim = self._victim
        self.watcher.struck = frozenset(each for each in self._clients if each.where is victim)
        self._say(f"killing {victim.name} and its {len(self.watcher.struck)} sessions")
        readies = {client: client.readies for client in self.watcher.struck}

        def all_are_back() -> bool:
            # A client hears of the kill a moment later, or when the victim's workers have ended.
            are_struck = all(client.readies > before for client, before in readies.items())
            return are_struck and self._all_are_back()

        course.killed_s, course.killed = monotonic(), victim.name
        await self.fleet.kill(victim)
        if plan.restart_s is not None:
            self._spawn(self._restart(victim, plan.restart_s))
        if await self._until(all_are_back, plan.within_s):
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
        """Whether ``condition`` became true in time; raises what a task of the storm raised."""
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
        await cancel(*self._tasks)
        for client in self._clients:
            client.stop()
        gc.unfreeze()
        await self._probe.close()
        await self.fleet.close()


# Digits of the figures in a file.
_DIGITS = 4


def storm_report(plan: StormPlan, storm: Storm, machine_load: float) -> dict[str, Any]:
    """All figures of the storm; moments are seconds after the kill."""
    watcher, course, sender = storm.watcher, storm.course, storm.sender
    zero_s = course.killed_s or 0.0

    def moment(at_s: float | None) -> float | None:
        return None if at_s is None else round(at_s - zero_s, _DIGITS)

    return {
        "clients": plan.clients,
        "instances": plan.fleet.instances,
        "killed": course.killed,
        "struck": len(watcher.struck),
        "back": storm.back,
        "back_s": moment(course.back_s),
        "restarted_s": moment(course.restarted_s),
        "connected": watcher.connected,
        "messages": {
            "wanted_per_s": plan.messages_per_s,
            "sent": sender.sent,
            "resent": sender.resent,
            "refused": sender.refused,
            "lost": watcher.owed,
        },
        "probe": {"sent": storm.probe_result.sent, "lost": storm.probe_result.lost},
        "handshakes": {
            "limit_per_s": plan.fleet.handshakes_per_s,
            "most_in_a_second": {
                name: most_in_a_second(times) for name, times in sorted(watcher.accepted.items())
            },
            "by_status": {str(status): count for status, count in watcher.statuses.items()},
        },
        "others_poke_ms": _poke_times(storm),
        "silence_s": {
            "struck": round(watcher.silence.struck_s, _DIGITS),
            "others": round(watcher.silence.others_s, _DIGITS),
        },
        "machine": {"cores": os.cpu_count(), "load_before": round(machine_load, 2)},
        "samples": [
            asdict(sample) | {"at_s": moment(sample.at_s)}
            for sample in storm.sampler.samples
            if sample.at_s >= (course.calm_from_s or 0)
        ],
        "pokes_by_second": _pokes_by_second(storm),
    }


def _poke_times(storm: Storm) -> dict[str, Any]:
    """How long pokes took on the surviving instances before, during and after the storm."""
    course = storm.course
    killed_s, back_s = course.killed_s or inf, course.back_s or inf
    phases = {
        "before": (course.calm_from_s or 0.0, killed_s),
        "storm": (killed_s, back_s),
        "after": (back_s, inf),
    }
    return {
        name: _percentiles_ms(
            [each for each in storm.probe_result.poke_times if since_s <= each.asked_s < until_s]
        )
        for name, (since_s, until_s) in phases.items()
    }


def _pokes_by_second(storm: Storm) -> list[dict[str, Any]]:
    zero_s = storm.course.killed_s or 0.0
    seconds: dict[int, list[PokeTime]] = {}
    for each in storm.probe_result.poke_times:
        seconds.setdefault(int((each.asked_s - zero_s) // 1), []).append(each)
    return [{"at_s": second + 0.5, **_percentiles_ms(each)} for second, each in seconds.items()]


def _percentiles_ms(times: Sequence[PokeTime]) -> dict[str, Any]:
    found = percentiles_ms([each.took_s for each in times], digits=2)
    return {"count": len(times)} | (found or dict.fromkeys(("p50", "p99", "max")))


def storm_failures(report: dict[str, Any]) -> Sequence[str]:
    """What went wrong, a sentence each; empty when nothing did."""
    failures = []
    if report["back_s"] is None:
        failures.append(
            f"{report['connected']} of {report['clients']} clients are connected, and"
            f" {report['back']} of the {report['struck']} struck have come back and pulled"
        )
    if lost := report["messages"]["lost"] + report["probe"]["lost"]:
        failures.append(f"{lost} messages were lost")
    return failures


def storm_table(report: dict[str, Any]) -> str:
    """A summary of ``report`` in lines for a terminal."""
    messages, handshakes = report["messages"], report["handshakes"]
    pokes, silence = report["others_poke_ms"], report["silence_s"]
    back = "never" if report["back_s"] is None else f"after {report['back_s']:.1f} s"
    most = ", ".join(f"{each} {name}" for name, each in handshakes["most_in_a_second"].items())
    statuses = ", ".join(f"{each} x {status}" for status, each in handshakes["by_status"].items())
    sent = f"{messages['sent']} sent, {messages['resent']} of them again"
    machine = report["machine"]
    rows = [
        ("clients", f"{report['clients']} on {report['instances']} instances"),
        ("killed", f"{report['killed']}, with {report['struck']} sessions"),
        ("back", f"{report['back']} of {report['struck']} have pulled, all {back}"),
        ("messages", f"{sent}, {messages['refused']} refused, {messages['lost']} lost"),
        ("handshakes", statuses),
        ("", f"at most {most} in a second; the limit is {handshakes['limit_per_s']}"),
        ("poke p50", _phases(pokes, "p50")),
        ("poke p99", _phases(pokes, "p99")),
        ("silence", f"{silence['struck']:.1f} s at most, {silence['others']:.2f} s on the others"),
        ("machine", f"{machine['cores']} cores, load before: {machine['load_before']:g}"),
    ]
    return "\n".join(f"{name:<11} {text}" for name, text in rows)


def _phases(pokes: dict[str, Any], name: str) -> str:
    figures = [
        "-" if pokes[phase][name] is None else f"{pokes[phase][name]:.1f} ms {phase}"
        for phase in ("before", "storm", "after")
    ]
    return ", ".join(figures)
