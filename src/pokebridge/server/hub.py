"""The hub of a host: it starts, watches and replaces workers, and passes them the connections.

The hub is the instance. It has the only subscriptions, leases, sweeps and mailbox writer of the
host, and no sockets of clients (docs/cores.md).
"""

import asyncio
import contextlib
import os
import pickle
import signal
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from typing import Final

import structlog

from pokebridge.api.metrics import Value
from pokebridge.backoff import backoff_s
from pokebridge.border import unforeseen
from pokebridge.coordination.base import WorkerLoad
from pokebridge.errors import PokebridgeError, UnavailableError
from pokebridge.server.door import Door
from pokebridge.server.fork_server import ForkServer
from pokebridge.server.garbage import keep_what_exists
from pokebridge.server.hub_http import PassedRequests
from pokebridge.server.instance import Instance
from pokebridge.server.uvicorn_server import on_stop_signals, tell_address
from pokebridge.settings import Settings
from pokebridge.supervisor import cancel, supervise, task_failures
from pokebridge.telemetry import Metric
from pokebridge.wire import Disconnect
from pokebridge.workers import methods
from pokebridge.workers.frames import Ask, Report, Revoke, Stop, Want, Welcome
from pokebridge.workers.inbox import offer_inbox
from pokebridge.workers.link import WorkerLink
from pokebridge.workers.methods import HttpRequest, HttpResponse

ASK_EVERY_S: Final = 1.0
STALLED_AFTER: Final = 5
"""A worker that answers nothing in so many rounds of questions hangs, and is killed."""
REFRESH_TIMEOUT_S: Final = 0.5
"""How long a call that shows figures of workers waits for their reports."""
START_TIMEOUT_S: Final = 60.0
"""A worker that does not serve within this time after its start is killed."""
WELL_AFTER_S: Final = 10.0
"""A worker that has lived this long is healthy. Its next death counts as the first."""
RESTART_FIRST_S: Final = 0.1
RESTART_CAP_S: Final = 10.0
FAILING_AFTER: Final = 3
"""After this many deaths in a row the instance is not ready."""
STOP_EXTRA_S: Final = 5.0
"""What a worker may take to stop, beside the time for its requests."""

_SHOW_WORKERS: Final = frozenset({"/metrics", "/v1/cluster"})
_NOTHING: Final = Report(0, 0, 0, 0, 0.0, 0, 0, 0, 0, 0, {}, {}, {}, (), ())

log = structlog.get_logger(__name__)


class Slot:
    """The place of one worker, which one process after another takes.

    - ``number``: from 1
    - ``link``: the hub's end of the process that serves now; ``None`` while none does
    - ``door``: where connections are passed to it
    - ``pid``: of the process; ``None`` while there is none
    - ``starts``: processes so far
    - ``deaths``: in a row, of processes that did not live long
    - ``report``: the last one of the process
    - ``passed``: connections that were passed to the process
    - ``_asked``: the number of the last question
    - ``_unheard``: how many rounds of questions ago the process was heard
    - ``_began_s``: when the process was started, or began to serve
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.link: WorkerLink | None = None
        self.door: socket.socket | None = None
        self.pid: int | None = None
        self.starts = 0
        self.deaths = 0
        self.report = _NOTHING
        self.passed = self._asked = self._unheard = 0
        self._began_s = time.monotonic()

    def begin(self) -> None:
        """A new process takes the place."""
        self.starts += 1
        self.report = _NOTHING
        self.passed = self._asked = self._unheard = 0
        self._began_s = time.monotonic()

    def serve(self, link: WorkerLink, door: socket.socket) -> None:
        """The process serves from now on."""
        self.link, self.door, self._began_s = link, door, time.monotonic()

    def end(self) -> float:
        """The process is gone. Returns the pause before the next one, in seconds."""
        lived_s = time.monotonic() - self._began_s if self.link is not None else 0.0
        self.link = self.door = None
        self.report, self._began_s = _NOTHING, time.monotonic()
        if lived_s >= WELL_AFTER_S:
            self.deaths = 0
        self.deaths += 1
        if self.deaths == 1:
            return 0.0
        return backoff_s(self.deaths - 2, first_s=RESTART_FIRST_S, cap_s=RESTART_CAP_S, least=0.5)

    @property
    def is_failing(self) -> bool:
        """Whether several processes died in a row, and this one is not healthy yet."""
        is_well = self.link is not None and time.monotonic() - self._began_s >= WELL_AFTER_S
        return self.deaths >= FAILING_AFTER and not is_well

    @property
    def load(self) -> int:
        """Its connections, those on their way included."""
        report = self.report
        return report.connections + report.sessions + self.passed - report.accepted

    def kill(self) -> None:
        """Kill the process."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, signal.SIGKILL)

    def ask(self) -> None:
        """Ask for a report, if a process serves."""
        if self.link is not None:
            self._asked += 1
            self.link.send(Ask(self._asked))

    def take(self, report: Report) -> None:
        """The process has reported."""
        self.report, self._unheard = report, 0

    @property
    def is_asked(self) -> bool:
        """Whether the last question is not answered yet."""
        return self.link is not None and self.report.number < self._asked

    def stands_still(self) -> bool:
        """Whether the process has been silent for too long; to be called once in ASK_EVERY_S."""
        if self.link is None:
            return self.pid is not None and time.monotonic() - self._began_s > START_TIMEOUT_S
        self._unheard += 1
        return self._unheard > STALLED_AFTER


class Hub:
    """The workers of one host.

    - ``instance``: the instance that they are
    - ``slots``: the places of the workers
    - ``_settings``: pickled, for the workers
    - ``_grace_s``: what a worker has to finish its requests
    - ``_listener``, ``_door``: where clients connect, and what accepts them
    - ``_app``: answers the HTTP requests that concern the instance
    - ``_fork_server``: starts the processes
    - ``_has_started``: set when each place has a worker that serves, or one fails
    - ``_reported``: set by each report
    - ``_stops``: whether workers that end are not replaced
    - ``_cpu_s``: of the workers that are gone
    - ``_links``: the workers, those that do not serve yet included
    - ``_tasks``: one for each place, and the one that asks
    """

    def __init__(self, settings: Settings, instance: Instance, listener: socket.socket) -> None:
        self.instance = instance
        self.slots = [Slot(number) for number in range(1, settings.worker_count + 1)]
        self._settings = pickle.dumps(settings)
        self._grace_s = settings.grace_s
        self._listener = listener
        self._door = Door(listener, self._open_slots)
        self._app = instance.create_app()
        self._fork_server = ForkServer()
        self._has_started = asyncio.Event()
        self._reported = asyncio.Event()
        self._stops = False
        self._cpu_s = 0.0
        self._links: set[WorkerLink] = set()
        self._tasks: list[asyncio.Task[None]] = []
        instance.more_reasons = self._reasons
        instance.more_metrics = self._metrics
        instance.gateway.bridge.on_revoked = self._revoke

    async def run(self, on_listening: Callable[[str], None]) -> None:
        """Serve until SIGTERM or SIGINT; then drain. A second SIGINT stops at once.

        ``on_listening`` is called with the address, once all workers serve.

        Raises:
            PokebridgeError: the workers do not start.
        """
        stopped = asyncio.Event()
        with on_stop_signals(lambda _: stopped.set()):
            try:
                await self.instance.start()
                if await _unless(stopped, self._start()):
                    tell_address(self._listener, on_listening)
                    await stopped.wait()
                    stopped.clear()
                    await _unless(stopped, self._drain())
            finally:
                self._listener.close()
                await self._close()
                await self.instance.close()

    async def _drain(self) -> None:
        await self.instance.drain()
        await self._stop()

    async def _start(self) -> None:
        """Start the workers. Returns when all of them serve.

        Raises:
            PokebridgeError: they do not start.
        """
        self._tasks = [supervise("worker", self._keeper_of(slot)) for slot in self.slots]
        self._tasks.append(supervise("ask_workers", self._keep_asking))
        await self._has_started.wait()
        if any(slot.is_failing for slot in self.slots):
            raise PokebridgeError("workers: they end as soon as they are started; see the log")
        keep_what_exists()
        self._door.open()

    async def _stop(self) -> None:
        """Let the workers finish their requests and end. Those that do not are killed."""
        self._stops = True
        self._door.close()
        for slot in self.slots:
            if slot.link is not None:
                slot.link.send(Stop())
        *keepers, asking = self._tasks
        await asyncio.wait(keepers, timeout=self._grace_s + STOP_EXTRA_S)
        asking.cancel()

    async def _close(self) -> None:
        """Kill the workers that are left."""
        self._stops = True
        self._door.close()
        for slot in self.slots:
            slot.kill()
        await cancel(*self._tasks)
        await self._fork_server.close()

    # --- one worker -------------------------------------------------------------------------------

    def _keeper_of(self, slot: Slot) -> Callable[[], Awaitable[None]]:
        return lambda: self._keep(slot)

    async def _keep(self, slot: Slot) -> None:
        while not self._stops:
            slot.begin()
            try:
                await self._live(slot)
            except (OSError, UnavailableError) as error:
                log.warning("worker_not_started", worker=slot.number, reason=str(error))
            pid, slot.pid = slot.pid, None
            self._cpu_s += slot.report.cpu_s
            pause_s = slot.end()
            self._show_load()
            if self._stops:
                return
            log.warning("worker_ended", worker=slot.number, pid=pid, restart_in_s=round(pause_s, 3))
            if slot.is_failing:
                self._has_started.set()
            await asyncio.sleep(pause_s)

    async def _live(self, slot: Slot) -> None:
        """Run one process until it ends."""
        (channel, its_channel), (door, its_door) = socket.socketpair(), socket.socketpair()
        door.settimeout(0)
        link, ended = WorkerLink(slot.number, self.instance.gateway), asyncio.Event()
        link.on_ready = lambda: self._serve(slot, link, door)
        link.on_report = lambda report: self._take_report(slot, report)
        link.on_broken = ended.set
        link.on_pulled = self.instance.note_pulled
        requests = self._offer_methods(link)
        with door:
            await link.channel.connect(channel)
            with its_channel, its_door:
                fds = (its_channel.fileno(), its_door.fileno())
                slot.pid = await self._fork_server.fork(fds)
            try:
                await self._welcome(link)
                await ended.wait()
            finally:
                self._links.discard(link)
                link.channel.close()
                requests.end_all()
                if not self._stops:
                    slot.kill()

    async def _welcome(self, link: WorkerLink) -> None:
        """Tell the worker all that is revoked, and then what it needs to serve."""
        self._links.add(link)
        gateway = self.instance.gateway
        for each in gateway.bridge.disconnects.in_force(time.time()):
            await link.channel.room()
            link.send(Revoke(each))
        link.send(Welcome(link.number, self._settings, takes_acks=gateway.on_ack is not None))

    def _offer_methods(self, link: WorkerLink) -> PassedRequests:
        parts, answers = self.instance.parts, link.answers
        requests = PassedRequests(self._app, lambda number: link.send(Want(number)))
        link.on_gone, link.on_body = requests.end, requests.take_body

        def answer(request: HttpRequest) -> Awaitable[HttpResponse]:
            answering = requests.answer(request)
            return self._refreshed(answering) if request.path in _SHOW_WORKERS else answering

        answers.offer(methods.HTTP, answer)
        answers.offer(methods.PUBLISH, parts.publish)
        answers.offer(methods.PUBLISH_NOW, parts.publisher.publish_now)
        if parts.send is not None:
            answers.offer(methods.SEND, parts.send)
        if parts.mailbox is not None:
            offer_inbox(answers, parts.mailbox)
        return requests

    def _serve(self, slot: Slot, link: WorkerLink, door: socket.socket) -> None:
        slot.serve(link, door)
        log.info("worker_serves", worker=slot.number, pid=slot.pid)
        self._door.retry()
        if all(each.link is not None for each in self.slots):
            self._has_started.set()

    def _open_slots(self) -> Iterator[Slot]:
        """The places whose worker serves, those with the fewest connections first."""
        serving = [slot for slot in self.slots if slot.link is not None]
        return iter(sorted(serving, key=lambda slot: slot.load))

    def _revoke(self, disconnect: Disconnect) -> None:
        for link in self._links:
            link.send(Revoke(disconnect))

    # --- what the workers report ------------------------------------------------------------------

    async def _keep_asking(self) -> None:
        while True:
            await asyncio.sleep(ASK_EVERY_S)
            for slot in self.slots:
                if slot.stands_still():
                    log.error("worker_stalled", worker=slot.number, pid=slot.pid)
                    slot.kill()
                slot.ask()

    def _take_report(self, slot: Slot, report: Report) -> None:
        """Add what has grown since the last report to what the instance has counted."""
        before = slot.report
        slot.take(report)
        self._reported.set()
        gateway, processor = self.instance.gateway, self.instance.parts.processor
        _grow(gateway.entrance.handshakes, before.handshakes, report.handshakes)
        _grow(unforeseen, before.unforeseen, report.unforeseen)
        _grow(task_failures, before.failures, report.failures)
        gateway.sockets.limited += report.limited - before.limited
        merged = report.merged - before.merged
        gateway.bridge.counters.merged += merged
        gateway.bridge.counters.delivered -= merged
        if processor is not None:
            processor.stats.messages_committed += report.committed - before.committed
            processor.stats.messages_refused += report.refused - before.refused
        self._add_durations(before, report)
        self._show_load()

    async def _refreshed(self, answering: Awaitable[HttpResponse]) -> HttpResponse:
        await self._refresh()
        return await answering

    async def _refresh(self) -> None:
        """Ask the workers for reports, and wait briefly for them."""
        for slot in self.slots:
            slot.ask()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REFRESH_TIMEOUT_S):
                while any(slot.is_asked for slot in self.slots):
                    self._reported.clear()
                    await self._reported.wait()

    def _add_durations(self, before: Report, report: Report) -> None:
        known = {labels: (counts, sum_s) for labels, counts, sum_s in before.durations}
        for labels, counts, sum_s in report.durations:
            old_counts, old_sum_s = known.get(labels, ((0,) * len(counts), 0.0))
            durations = self.instance.parts.requests.by_labels[labels]
            grown = (new - old for new, old in zip(counts, old_counts, strict=True))
            durations.counts = [
                each + more for each, more in zip(durations.counts, grown, strict=True)
            ]
            durations.sum_s += sum_s - old_sum_s

    def _show_load(self) -> None:
        meter = self.instance.cluster.meter
        meter.workers = [
            WorkerLoad(
                number=slot.number,
                sessions=slot.report.sessions,
                starts=slot.starts,
                memory_bytes=slot.report.memory_bytes,
            )
            for slot in self.slots
        ]
        meter.workers_cpu_s = self._cpu_s + sum(slot.report.cpu_s for slot in self.slots)

    def _reasons(self) -> Iterator[str]:
        for slot in self.slots:
            if slot.is_failing:
                yield f"worker {slot.number} keeps ending, see the log"
            yield from (
                f"worker {slot.number}: task {task} keeps failing, see the log"
                for task in slot.report.failing
            )

    def _metrics(self) -> Mapping[Metric, Value]:
        return {
            Metric.CONNECTIONS: sum(slot.report.connections for slot in self.slots),
            Metric.WORKER_SESSIONS: self._by_worker(lambda slot: slot.report.sessions),
            Metric.WORKER_CPU: self._by_worker(lambda slot: slot.report.cpu_s),
            Metric.WORKER_STARTS: self._by_worker(lambda slot: slot.starts),
        }

    def _by_worker(self, read: Callable[[Slot], float]) -> Mapping[tuple[str, ...], float]:
        return {(str(slot.number),): read(slot) for slot in self.slots}


async def _unless(stopped: asyncio.Event, work: Coroutine[None, None, None]) -> bool:
    """Do ``work`` until ``stopped`` is set. Returns whether it was done."""
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(stopped.wait())
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    is_done = tasks[0].done()
    await cancel(*tasks)
    if is_done:
        tasks[0].result()
    return is_done


def _grow(counter: Counter[str], before: Mapping[str, int], now: Mapping[str, int]) -> None:
    for name, number in now.items():
        counter[name] += number - before.get(name, 0)
