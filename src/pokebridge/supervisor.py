"""Background tasks that survive every error, and report when they or a part they need have failed.

A task that ends unnoticed can leave clients silent. So every background loop runs here: an
unforeseen error is logged with its traceback, counted by the task's name, and the loop is started
again after a growing pause. ``failing_tasks`` is for readiness.

The counts belong to the process, as its metrics do.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any, Final
from weakref import WeakSet

import structlog

from pokebridge.backoff import backoff_s, spread
from pokebridge.errors import UnavailableError
from pokebridge.telemetry import LogPace

BACKOFF_FIRST_S: Final = 0.1
BACKOFF_CAP_S: Final = 2.0
# A task that has run for this long since its last failure counts as recovered.
WELL_AFTER_S: Final = 5.0
# The same failure of the same task is logged again after this time. Its count always rises.
LOG_AGAIN_S: Final = 600.0

log = structlog.get_logger(__name__)

task_failures: Counter[str] = Counter()
"""Unforeseen errors since the start, by task."""
_pace = LogPace(LOG_AGAIN_S)
_attempts: "WeakSet[Attempts]" = WeakSet()


def note_failure(task: str, error: BaseException) -> None:
    """Count an unforeseen ``error`` of ``task``, and log its trace unless it has just been."""
    task_failures[task] += 1
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = (task, type(error), 0 if trace is None else trace.tb_lineno)
    if _pace.allows(place, monotonic()):
        with suppress(Exception):  # to fail at writing the log must not end the task
            log.error("task_failed", task=task, exc_info=error)


def failing_tasks() -> Sequence[str]:
    """The tasks that failed last time and have not been well since, sorted by name."""
    return sorted({each.task for each in _attempts if each.is_failing})


class Part:
    """A part that this process depends on. Logs when it fails, and when it is back."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._down_since_s: float | None = None
        self._failed_s = 0.0

    @property
    def is_down(self) -> bool:
        """Whether the last call to it failed."""
        return self._down_since_s is not None

    def failed_within(self, span_s: float) -> bool:
        """Whether the last call to it failed, and did so within the last ``span_s`` seconds."""
        return self.is_down and monotonic() - self._failed_s < span_s

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch one call to the part."""
        try:
            yield
        except UnavailableError as error:
            self._failed_s = monotonic()
            if self._down_since_s is None:
                self._down_since_s = monotonic()
                log.warning("part_unavailable", part=self._name, error=str(error))
            raise
        if self._down_since_s is not None:
            down_s = round(monotonic() - self._down_since_s, 3)
            log.info("part_is_back", part=self._name, down_s=down_s)
            self._down_since_s = None


class Attempts:
    """The attempts of one task. No error ends it. A growing pause follows each failure.

    An UnavailableError is foreseen, and its :class:`Part` logs it. Any other error is a failure of
    ``task``. So is a cancellation that was not meant for this task: a driver that breaks cancels
    its futures, and a task that awaits one of them would end unnoticed.
    """

    def __init__(
        self, task: str, *, foreseen: Collection[type[Exception]] = (UnavailableError,)
    ) -> None:
        self.task = task
        self._foreseen = tuple(foreseen)
        self._failures = 0
        self._is_defect = False
        # When the attempt under way began; None during the pause after a failure.
        self._began_s: float | None = None
        _attempts.add(self)

    @property
    def is_failing(self) -> bool:
        """Whether an unforeseen error was the last thing to happen, and that just now."""
        is_well = self._began_s is not None and _now_s() - self._began_s >= WELL_AFTER_S
        return self._is_defect and not is_well

    async def __call__(self, step: Awaitable[None]) -> bool:
        """Await ``step``. Returns whether it succeeded. Pauses first if it failed."""
        self._began_s = _now_s()
        try:
            await step
        except asyncio.CancelledError as error:
            current = asyncio.current_task()
            if current is None or current.cancelling():
                self._is_defect = False  # nobody waits for this task any more
                raise
            self._note(error)
        except self._foreseen:
            self._is_defect = False
        except Exception as error:  # noqa: BLE001 - a defect, too, is survived: else there is silence
            self._note(error)
        else:
            self._failures, self._is_defect = 0, False
            return True
        if _now_s() - self._began_s >= WELL_AFTER_S:
            self._failures = 0
        self._began_s = None
        pause_s = backoff_s(self._failures, first_s=BACKOFF_FIRST_S, cap_s=BACKOFF_CAP_S)
        self._failures += 1
        await asyncio.sleep(pause_s)
        return False

    def _note(self, error: BaseException) -> None:
        self._is_defect = True
        note_failure(self.task, error)


def supervise(task: str, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
    """Run ``work`` in the background until it returns; when it raises, start it again.

    ``task`` names it in logs and metrics: constant, few, the same for all that do the same. The
    work must be one that can begin again at any time. Cancel the returned task to end it.
    """

    async def run() -> None:
        attempt = Attempts(task, foreseen=())
        while not await attempt(work()):
            pass

    return asyncio.create_task(run(), name=task)


def keep_doing(
    task: str, step: Callable[[], Awaitable[None]], pause_s: float
) -> asyncio.Task[None]:
    """Do ``step`` again and again, with a jittered pause after each success. Cancel it to end it.

    The jitter, up to half of ``pause_s``, lets the loops of several processes drift apart.
    """

    async def run() -> None:
        attempt = Attempts(task)
        while True:
            if await attempt(step()):
                await asyncio.sleep(spread(pause_s))

    return asyncio.create_task(run(), name=task)


def run_once(task: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Run ``work`` in the background, once. An unforeseen error is noted as one of ``task``."""

    async def run() -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001 - nobody awaits the task, so it is told here
            note_failure(task, error)

    return asyncio.create_task(run(), name=task)


async def cancel(*tasks: asyncio.Future[Any] | None) -> None:
    """Cancel ``tasks``, and return when all have ended. ``None``: there is no such task."""
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
