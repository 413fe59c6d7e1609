"""The course of a storm: connect, calm, kill one instance, until all are back, calm again."""

import asyncio
import gc
import json
import random
import secrets
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

from pokebridge.cli.storm_clients import StormClient
from pokebridge.cli.storm_fleet import Fleet, FleetPlan, StormInstance
from pokebridge.cli.storm_http import HOST, Answer
from pokebridge.cli.storm_watch import Message, Watcher
from pokebridge.errors import UnavailableError
from pokebridge.tokens import sign_token

# While they connect for the first time; in the storm they come as they do.
_RAMP_PER_S = 400.0
_RAMP_SHARE = 0.8
_POLL_S = 0.05
_SEND_EVERY_S = 0.01
_RESEND_S = 0.2
# Until what was accepted last must have been pulled.
STRAGGLERS_S = 30.0
_TOKEN_TTL_S = 6 * 3600.0
_MESSAGE_TTL_S = 600
_REQUIRED_DRAWS = 20


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
    """When what happened, in seconds of the loop's clock; ``None``: it did not."""

    calm_from_s: float | None = None
    killed_s: float | None = None
    killed: str = ""
    restarted_s: float | None = None
    back_s: float | None = None
    """All were connected again, and had pulled."""


class Sender:
    """Sends messages at a rate to clients that wait for none."""

    def __init__(self, plan: StormPlan, fleet: Fleet, watcher: Watcher) -> None:
        self._fleet = fleet
        self._watcher = watcher
        self._rate_per_s = plan.messages_per_s
        self._loop = asyncio.get_running_loop()
        self._run = secrets.token_hex(4)
        self._token = sign_token(fleet.secret, f"urn:storm:{self._run}", ["send"], _TOKEN_TTL_S)
        self.sent = 0
        self.resent = 0
        self.refused = 0

    async def run(self, clients: Sequence[StormClient]) -> None:
        """Send until cancelled."""
        began_s, due = self._loop.time(), 0
        while True:
            wanted = int((self._loop.time() - began_s) * self._rate_per_s)
            for _ in range(wanted - due):
                self._send_to_one(clients)
            due = wanted
            await asyncio.sleep(_SEND_EVERY_S)

    def _send_to_one(self, clients: Sequence[StormClient]) -> None:
        for _ in range(_REQUIRED_DRAWS):
            client = random.choice(clients)  # noqa: S311 - spreads load
            if client not in self._watcher.under_way:
                self.sent += 1
                message = Message(f"{self._run}-{self.sent}", client, self._loop.time())
                self._watcher.under_way[client] = message
                self._post(message)
                return

    def _post(self, message: Message) -> None:
        message.asked_s = self._loop.time()
        body = json.dumps(
            {
                "recipient": message.client.recipient,
                "id": message.id,
                "body": None,
                "ttl_s": _MESSAGE_TTL_S,
            }
        ).encode()
        head = (
            f"POST /v1/messages HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {self._token}\r\nContent-Length: {len(body)}\r\n\r\n"
        )

        def done(answer: Answer | None) -> None:
            self._on_answer(message, answer)

        self._fleet.pick().http.send(head.encode() + body, done)

    def _on_answer(self, message: Message, answer: Answer | None) -> None:
        if answer is None:
            # It may be committed or not; with its id it can be sent again, and counts once.
            self.resent += 1
            self._loop.call_later(_RESEND_S, self._post, message)
        elif answer.status in {200, 202}:
            self._watcher.on_answered(message)
        else:
            self.refused += 1
            self._watcher.on_given_up(message)


class Storm:
    """Carries out a :class:`StormPlan`; ``say`` is told how it goes."""

    def __init__(self, plan: StormPlan, directory: Path, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._say = say
        self._loop = asyncio.get_running_loop()
        self.fleet = Fleet(plan.fleet, directory)
        self.watcher = Watcher(self.fleet)
        self.sender = Sender(plan, self.fleet, self.watcher)
        self.course = Course()
        self._clients: list[StormClient] = []
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
            self._spawn(self.watcher.keep_sampling())
            self._spawn(self._report_progress())
            await self._until_all_are_connected()
            # What has been made until now stays: looking through it again and again would stop
            # all clients at once, and look like a slow instance.
            gc.collect()
            gc.freeze()
            sending = self._spawn(self.sender.run(self._clients))
            await self._storm()
            sending.cancel()
            await self._until(lambda: not self.watcher.owed, STRAGGLERS_S)
        finally:
            await self._end()

    @property
    def back(self) -> int:
        """How many of the struck clients have been connected again, and have pulled."""
        if self.course.back_s is not None:
            return len(self.watcher.struck)
        return sum(client.caught_up for client in self.watcher.struck)

    async def _until_all_are_connected(self) -> None:
        plan = self._plan
        run = secrets.token_hex(4)
        for number in range(plan.clients):
            recipient = f"urn:storm:{run}:{number}"
            token = sign_token(self.fleet.secret, recipient, (), _TOKEN_TTL_S)
            self._clients.append(StormClient(self.fleet, self.watcher, recipient, token))
        # Slowly enough that none is refused: who was would remember it, and come back the later
        # from the storm. Without a hurry after a pause of this process, therefore.
        per_s = min(_RAMP_PER_S, plan.fleet.handshakes_per_s * plan.fleet.instances * _RAMP_SHARE)
        for client in self._clients:
            client.start()
            await asyncio.sleep(1 / per_s)
        if not await self._until(self._all_are_back, plan.within_s):
            statuses = ", ".join(
                f"{count} answered {status}"
                for status, count in self.watcher.statuses.most_common()
            )
            raise UnavailableError(
                f"only {self.watcher.connected} of {plan.clients} clients could connect"
                f" (handshakes: {statuses or 'none answered'})"
            )

    async def _storm(self) -> None:
        plan, course = self._plan, self.course
        course.calm_from_s = self._loop.time()
        await self._pass(plan.calm_s)
        victim = self.fleet.up[-1]
        self.watcher.struck = frozenset(each for each in self._clients if each.where is victim)
        self._say(f"killing {victim.name} and its {len(self.watcher.struck)} sessions")
        course.killed_s, course.killed = self._loop.time(), victim.name
        await self.fleet.kill(victim)
        if plan.restart_s is not None:
            self._spawn(self._restart(victim, plan.restart_s))
        if await self._until(self._all_are_back, plan.within_s):
            course.back_s = self._loop.time()
            self._say(f"all are back after {course.back_s - course.killed_s:.1f} s")
            if plan.restart_s is not None:
                await self._until(lambda: course.restarted_s is not None, inf)
            await self._pass(plan.calm_s)

    async def _restart(self, victim: StormInstance, after_s: float) -> None:
        await asyncio.sleep(after_s)
        await self.fleet.start_one(victim)
        self.course.restarted_s = self._loop.time()
        self._say(f"{victim.name} is ready again")

    def _all_are_back(self) -> bool:
        return self.watcher.connected == len(self._clients) and all(
            client.caught_up for client in self._clients
        )

    async def _until(self, condition: Callable[[], bool], within_s: float) -> bool:
        """Whether ``condition`` came true in time; what fails meanwhile is raised here."""
        until_s = self._loop.time() + within_s
        while not (is_true := condition()) and self._loop.time() < until_s:
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
            last = self.watcher.samples[-4:]
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
        await self.fleet.close()
