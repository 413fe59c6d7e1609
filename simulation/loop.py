"""Virtual time: event loops that never wait, one for each simulated process.

All loops of a run share one :class:`Scheduler`. It runs callbacks one at a time and, when there is
none to run, jumps to the next timer: minutes pass in milliseconds, and always in the same order.
Each process has its own loop and with it its own clock, set and paced differently from the others'.
It can be **paused**, as by SIGSTOP (nothing of it runs, its clock goes on, and when it wakes all
that has come due runs at once), or **killed**, as by SIGKILL: nothing of it runs ever again.
"""

import asyncio
import contextvars
import logging
import math
import random
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, TypeVar

T = TypeVar("T")

_log = logging.getLogger(__name__)

EPOCH_S = 1_800_000_000.0
"""The Unix time at which every simulation begins."""
# This many callbacks at one instant mean that code reschedules itself forever.
_LIVELOCK = 200_000
# The rounds in which what is left at the end may unwind.
_UNWINDINGS = 20


class LivelockError(Exception):
    """Virtual time no longer advances: some code reschedules itself forever."""


class Handle:
    """A callback that will be called, unless it is cancelled or its process dies."""

    __slots__ = ("_args", "_callback", "_cancelled", "_context", "_when", "arrives", "loop")

    def __init__(
        self,
        loop: "VirtualLoop",
        callback: Callable[..., object],
        args: tuple[Any, ...],
        *,
        context: contextvars.Context | None = None,
        when: float = 0.0,
        arrives: bool = False,
    ) -> None:
        self.loop = loop
        self.arrives = arrives
        """Whether it comes from outside, as what a selector reports does."""
        self._callback = callback
        self._args = args
        self._context = context
        self._when = when
        self._cancelled = False

    def cancel(self) -> None:
        """Do not call it."""
        self._cancelled = True
        self._args = ()

    def cancelled(self) -> bool:
        """Whether it is cancelled."""
        return self._cancelled

    @property
    def is_turn(self) -> bool:
        """Whether it lets a task run on."""
        return isinstance(getattr(self._callback, "__self__", None), asyncio.Task)

    def when(self) -> float:
        """When it is due, by its loop's clock."""
        return self._when

    def run(self) -> None:
        """Call it, unless it was cancelled."""
        if self._cancelled:
            return
        loop = self.loop
        if self._when:
            loop.not_before(self._when)
        try:
            if self._context is None:
                self._callback(*self._args)
            else:
                self._context.run(self._callback, *self._args)
        except Exception as error:  # noqa: BLE001 - as any event loop does, it is told and goes on
            loop.call_exception_handler({"message": "in a callback", "exception": error})


class Scheduler:
    """The true time, and all callbacks and timers; ``now`` is seconds since the start."""

    def __init__(self) -> None:
        self.now = 0.0
        self.callbacks = 0
        self.on_error: Callable[[str], None] = _log.error
        """Called with what callbacks and tasks of living processes raised and nobody caught."""
        self._due: deque[Handle] = deque()
        self._timers: list[tuple[float, int, Handle]] = []
        self._number = 0
        self._stopped = False

    def process(
        self, name: str, *, clock_s: float = 0.0, pace: float = 1.0, wall_ahead_s: float = 0.0
    ) -> "VirtualLoop":
        """The loop of a new process; see :class:`VirtualLoop` for its clocks."""
        return VirtualLoop(  # type: ignore[abstract] # no sockets, signals, child processes
            self, name, clock_s=clock_s, pace=pace, wall_ahead_s=wall_ahead_s
        )

    def soon(self, handle: Handle) -> None:
        """Run ``handle`` at this instant, after what is due already."""
        self._due.append(handle)

    def at(self, when: float, handle: Handle) -> None:
        """Run ``handle`` at ``when``; of two at one instant the one that came first."""
        self._number += 1
        heappush(self._timers, (when, self._number, handle))

    def stop(self) -> None:
        """Make :meth:`run` return before anything else happens."""
        self._stopped = True

    def run(self, deadline_s: float = math.inf) -> bool:
        """Run until :meth:`stop`; False when the deadline came first, or nothing was left to do.

        Raises:
            LivelockError: time does not move on any more.
        """
        outer = asyncio._get_running_loop()  # noqa: SLF001 - documented for event loops
        self._stopped = False
        try:
            self._run(deadline_s)
        finally:
            asyncio._set_running_loop(outer)  # noqa: SLF001 - the same
        return self._stopped

    def _run(self, deadline_s: float) -> None:
        enter, due, timers = asyncio._set_running_loop, self._due, self._timers  # noqa: SLF001 - the same
        enter(None)
        running: VirtualLoop | None = None
        here = 0
        while not self._stopped:
            if due:
                handle = due.popleft()
            elif timers and timers[0][0] <= deadline_s:
                when, _, handle = heappop(timers)
                if when > self.now:
                    self.now, here = when, 0
            else:
                self.now = max(self.now, deadline_s if timers else self.now)
                return
            loop = handle.loop
            if loop.paused or loop.dead:
                loop.backlog.append(handle)
                continue
            if loop is not running:
                enter(None)
                enter(loop)
                running = loop
            self.callbacks += 1
            here += 1
            if here > _LIVELOCK:
                raise LivelockError(f"{handle.loop.name} keeps time from moving on at {self.now}")
            handle.run()


class VirtualLoop(asyncio.AbstractEventLoop):
    """One process's event loop, as far as code without sockets, threads and signals needs one.

    Args:
        scheduler: what it shares with the other processes.
        name: for people.
        clock_s: what its monotonic clock shows at the scheduler's 0.
        pace: how many seconds its clock counts in one: 1.001 is a clock that runs fast.
        wall_ahead_s: by how much its Unix time is ahead of the true one.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        name: str = "",
        *,
        clock_s: float = 0.0,
        pace: float = 1.0,
        wall_ahead_s: float = 0.0,
    ) -> None:
        self.scheduler = scheduler
        self.name = name
        self.paused = False
        self.dead = False
        self.backlog: list[Handle] = []
        self._clock_s = clock_s
        self._pace = pace
        self._wall_ahead_s = wall_ahead_s
        self._not_before = float("-inf")
        self._reaped = False

    def sibling(self, name: str) -> "VirtualLoop":
        """The loop of another process on the same machine, whose clocks are the same."""
        return self.scheduler.process(
            name, clock_s=self._clock_s, pace=self._pace, wall_ahead_s=self._wall_ahead_s
        )

    # --- time -------------------------------------------------------------------------------------

    def time(self) -> float:
        """This process's monotonic clock."""
        return max(self._clock_s + self.scheduler.now * self._pace, self._not_before)

    def wall(self) -> float:
        """This process's Unix time."""
        return EPOCH_S + self.scheduler.now + self._wall_ahead_s

    def not_before(self, when: float) -> None:
        """A timer for ``when`` fires: rounding must not show it an earlier time."""
        self._not_before = max(self._not_before, when)

    def call_soon(  # type: ignore[override] # asyncio's handles are slower, and no better here
        self,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> Handle:
        """See asyncio."""
        handle = Handle(self, callback, args, context=context)
        self.scheduler.soon(handle)
        return handle

    def call_later(  # type: ignore[override] # the same
        self,
        delay_s: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> Handle:
        """See asyncio."""
        return self.call_at(self.time() + delay_s, callback, *args, context=context)

    def call_at(  # type: ignore[override] # the same
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> Handle:
        """See asyncio."""
        handle = Handle(self, callback, args, context=context, when=when)
        due_at = max((when - self._clock_s) / self._pace, self.scheduler.now)
        self.scheduler.at(due_at, handle)
        return handle

    def deliver(self, delay_s: float, callback: Callable[..., object], *args: Any) -> Handle:
        """Call ``callback`` when ``delay_s`` true seconds have passed, as the network would."""
        handle = Handle(self, callback, args, arrives=True)
        self.scheduler.at(self.scheduler.now + delay_s, handle)
        return handle

    # --- life and death ---------------------------------------------------------------------------

    def pause(self) -> None:
        """SIGSTOP."""
        self.paused = True

    def resume(self) -> None:
        """SIGCONT: what came due meanwhile runs now, timers or sockets first, as chance has it."""
        self.paused = False
        first = random.random() < 0.5  # noqa: S311 - both orders are real: asyncio's, and uvloop's
        self.backlog.sort(key=lambda handle: handle.arrives is first)
        for handle in self.backlog:
            self.scheduler.soon(handle)
        self.backlog.clear()

    def kill(self) -> None:
        """SIGKILL."""
        self.dead = True
        self.paused = False

    def reap(self) -> None:
        """Unwind what still runs when the simulation is over.

        Otherwise the garbage collector would do so at any time, with warnings.
        """
        self.dead = self.paused = False
        self._reaped = True
        for _ in range(_UNWINDINGS):
            tasks = asyncio.all_tasks(self)
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            # A task whose turn came after its process was killed still waits for that turn.
            for handle in self.backlog:
                if handle.is_turn:
                    self.scheduler.soon(handle)
            self.backlog.clear()
            self.scheduler.run(self.scheduler.now)
        for task in asyncio.all_tasks(self):
            task._log_destroy_pending = False  # type: ignore[attr-defined] # noqa: SLF001 - asyncio has no other way to say so
        self.dead = True

    # --- futures and tasks ------------------------------------------------------------------------

    def create_future(self) -> asyncio.Future[Any]:
        """See asyncio."""
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: Any, *, name: object = None, context: contextvars.Context | None = None
    ) -> asyncio.Task[Any]:
        """See asyncio."""
        return asyncio.Task(
            coro, loop=self, name=None if name is None else str(name), context=context
        )

    def run_in_executor(  # type: ignore[override] # nothing here is worth a thread
        self,
        executor: object,  # noqa: ARG002 - asyncio's signature
        func: Callable[..., T],
        *args: Any,
    ) -> asyncio.Future[T]:
        """Call it here and now: a simulation has no threads."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - it is the caller's
            future.set_exception(error)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Note what nobody caught."""
        if not (self.dead or self._reaped):
            what = f"{self.name}: {context['message']}: {context.get('exception')!r}"
            self.scheduler.on_error(what)

    # --- for those who run a single loop, as pytest-asyncio does -------------------------------

    def run_until_complete(self, future: Any) -> Any:
        """See asyncio."""
        task = asyncio.ensure_future(future, loop=self)
        task.add_done_callback(lambda _: self.scheduler.stop())
        if not self.scheduler.run():
            raise RuntimeError("nothing is left to run, and the result is not there")
        return task.result()

    def run_forever(self) -> None:
        """See asyncio; here it ends when nothing is left to do."""
        self.scheduler.run()

    def stop(self) -> None:
        """See asyncio."""
        self.scheduler.stop()

    def close(self) -> None:
        """See asyncio."""
        self.dead = True

    def is_closed(self) -> bool:
        """See asyncio."""
        return self.dead

    def is_running(self) -> bool:
        """See asyncio."""
        return asyncio._get_running_loop() is self  # noqa: SLF001 - documented for event loops

    def get_debug(self) -> bool:
        """See asyncio."""
        return False

    def set_debug(self, enabled: bool) -> None:  # noqa: FBT001 - asyncio's signature
        """See asyncio."""

    async def shutdown_asyncgens(self) -> None:
        """See asyncio."""

    async def shutdown_default_executor(self, timeout_s: float | None = None) -> None:
        """See asyncio."""
