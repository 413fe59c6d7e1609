"""Group commit: calls that arrive while others are under way share the next round trip."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from pokebridge.errors import MailboxError, MailboxRefusedError
from pokebridge.mailbox.base import admit
from pokebridge.supervisor import supervise

Job = TypeVar("Job")
Result = TypeVar("Result")

# Fewer calls than this are not worth a second concurrent round trip.
SHARE_AT_LEAST = 32


class _Call(NamedTuple, Generic[Job, Result]):
    job: Job
    done: "asyncio.Future[Result]"
    expires_s: float


class Batcher(Generic[Job, Result]):
    """Does jobs by ``do``, many at a time, in the order in which they came.

    ``do`` returns a result or an error for each job. What it raises is the error of every job, but
    for MailboxRefusedError: then the batch is split, so that one bad job fails alone.
    A batch has at most ``max_count`` jobs with a total ``cost`` of at most ``max_cost``, or a
    single job that costs more. Up to ``workers`` batches run at once. Each takes its share of the
    waiting jobs, so that one is prepared here while the store works on another.

    A job waits at most ``timeout_s`` for its turn. ``do`` must end in bounded time by itself.
    """

    def __init__(
        self,
        do: Callable[[Sequence[Job]], Awaitable[Sequence[Result | Exception]]],
        *,
        timeout_s: float,
        workers: int,
        max_count: int,
        max_cost: int,
        cost: Callable[[Job], int] = lambda _: 0,
    ) -> None:
        self._do = do
        self._timeout_s = timeout_s
        self._max_count = max_count
        self._max_cost = max_cost
        self._cost = cost
        self._waiting: deque[_Call[Job, Result]] = deque()
        self._workers = self._idle_workers = workers
        self._working: set[asyncio.Task[None]] = set()
        self._closed = False

    async def __call__(self, job: Job) -> Result:
        """The result of ``job``. When the caller is cancelled it is done completely or not at all.

        Raises:
            MailboxError: too many jobs wait, or this one waited for ``timeout_s``.
        """
        admit(waiting=len(self._waiting), closed=self._closed)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Result] = loop.create_future()
        self._waiting.append(_Call(job, done, loop.time() + self._timeout_s))
        if self._idle_workers:
            self._idle_workers -= 1
            task = supervise("mailbox_batch", self._work)
            self._working.add(task)
            task.add_done_callback(self._working.discard)
        return await done

    async def close(self) -> None:
        """Refuse new jobs, and finish the waiting ones."""
        self._closed = True
        while self._working:
            await asyncio.wait(self._working)

    async def _work(self) -> None:
        while batch := self._take():
            outcomes = await self._outcomes_of([call.job for call in batch])
            for call, result in zip(batch, outcomes, strict=True):
                if call.done.done():  # the caller was cancelled
                    continue
                if isinstance(result, Exception):
                    call.done.set_exception(result)
                else:
                    call.done.set_result(result)
        self._idle_workers += 1  # before anything can suspend, so that the next call finds it

    async def _outcomes_of(self, jobs: Sequence[Job]) -> list[Result | Exception]:
        """The result or the error of each of ``jobs``."""
        try:
            results = await self._do(jobs)
            return [result for _, result in zip(jobs, results, strict=True)]
        except asyncio.CancelledError:  # a driver's, as nobody cancels a worker
            return [MailboxError("the mailbox gave up the call, try again")] * len(jobs)
        except MailboxRefusedError as error:
            if len(jobs) == 1:
                return [error]
            middle = len(jobs) // 2
            first = await self._outcomes_of(jobs[:middle])
            return first + await self._outcomes_of(jobs[middle:])
        except Exception as error:  # noqa: BLE001 - any error belongs to the callers
            return [error] * len(jobs)

    def _take(self) -> list[_Call[Job, Result]]:
        now_s = asyncio.get_running_loop().time()
        share = max(SHARE_AT_LEAST, -(-len(self._waiting) // self._workers))
        batch: list[_Call[Job, Result]] = []
        cost = 0
        while self._waiting and len(batch) < min(share, self._max_count):
            call = self._waiting[0]
            if call.expires_s < now_s and not call.done.done():
                call.done.set_exception(
                    MailboxError(f"the mailbox was overloaded for {self._timeout_s:g} s")
                )
            if not call.done.done():
                cost += self._cost(call.job)
                if batch and cost > self._max_cost:
                    break
                batch.append(call)
            self._waiting.popleft()
        return batch
