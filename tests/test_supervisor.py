"""Background tasks: no error ends them, each is logged once and counted, readiness can ask."""

import asyncio

import pytest
from structlog.testing import capture_logs

from pokebridge import supervisor
from pokebridge.errors import MailboxError, TransportError
from pokebridge.supervisor import (
    Attempts,
    failing_tasks,
    keep_doing,
    note_failure,
    run_once,
    supervise,
    task_failures,
)
from tests.support import wait_until


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses worth waiting for."""
    monkeypatch.setattr(supervisor, "BACKOFF_CAP_S", 0.001)


class Work:
    """Work that raises as long as it has errors."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)
        self.runs = 0

    async def __call__(self) -> None:
        """Fail, or wait for ever."""
        self.runs += 1
        if self.errors:
            raise self.errors.pop(0)
        await asyncio.Event().wait()


async def ended(task: asyncio.Task[None]) -> None:
    """Cancel ``task``, and wait until it has ended."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_work_is_started_again_until_it_returns() -> None:
    """A defect ends nothing; what returns has ended."""
    work = Work(TypeError("a defect"), KeyError("another"))
    task = supervise("test", work)
    await wait_until(lambda: work.runs == 3)
    assert task_failures["test"] == 2
    await ended(task)
    returned = supervise("test", lambda: asyncio.sleep(0))
    await returned


async def test_the_same_failure_is_logged_once_with_its_trace() -> None:
    """A loop that fails all the time writes one line, and counts every failure."""
    with capture_logs() as logs:
        work = Work(*(TypeError(f"a defect with detail {n}") for n in range(50)))
        task = supervise("test", work)
        await wait_until(lambda: work.runs == 51)
        await ended(task)
    (line,) = logs
    assert (line["event"], line["task"]) == ("task_failed", "test")
    assert line["exc_info"].__traceback__ is not None
    assert task_failures == {"test": 50}


async def test_a_foreseen_outage_is_not_a_failure() -> None:
    """A step that fails because its part is unavailable is retried. Only the part logs it."""
    work = Work(MailboxError("away"), TransportError("away"))
    with capture_logs() as logs:
        task = keep_doing("test", work, 0.001)
        await wait_until(lambda: work.runs == 3)
        await ended(task)
    assert not logs
    assert not task_failures


async def test_an_outage_that_escapes_a_loop_is_a_failure() -> None:
    """No part logs the outage of a whole loop, so it counts as a failure."""
    work = Work(TransportError("away"))
    task = supervise("test", work)
    await wait_until(lambda: work.runs == 2)
    assert task_failures == {"test": 1}
    await ended(task)


async def test_a_cancellation_that_is_not_meant_for_the_task_does_not_end_it() -> None:
    """A driver that cancels the future which a loop awaits must not end the loop."""
    future = asyncio.get_running_loop().create_future()
    runs = 0

    async def work() -> None:
        nonlocal runs
        runs += 1
        await (future if runs == 1 else asyncio.Event().wait())

    task = supervise("test", work)
    await wait_until(lambda: runs == 1)
    future.cancel()
    await wait_until(lambda: runs == 2)
    assert task_failures == {"test": 1}
    await ended(task)
    assert task.cancelled()


async def test_failing_tasks_are_named_until_they_are_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readiness names a task while it keeps failing, until it succeeds, runs on or ends."""
    attempt = Attempts("test")
    await attempt(Work(TypeError())())
    assert failing_tasks() == ["test"]
    await attempt(asyncio.sleep(0))
    assert failing_tasks() == []

    work = Work(TypeError())
    task = supervise("other", work)
    await wait_until(lambda: work.runs == 2)
    assert failing_tasks() == ["other"]
    monkeypatch.setattr(supervisor, "WELL_AFTER_S", 0.0)
    assert failing_tasks() == []
    monkeypatch.undo()
    await ended(task)
    assert failing_tasks() == []


async def test_work_that_runs_once_fails_aloud() -> None:
    """It is not repeated, and its error is noted."""
    with capture_logs() as logs:
        await run_once("test", Work(TypeError("a defect"))())
    assert [line["event"] for line in logs] == ["task_failed"]
    assert task_failures == {"test": 1}


def test_failures_at_different_places_are_each_logged() -> None:
    """Another error of the same task is news."""
    with capture_logs() as logs:
        for error in (TypeError(), TypeError(), KeyError()):
            note_failure("test", error)
    assert len(logs) == 2
