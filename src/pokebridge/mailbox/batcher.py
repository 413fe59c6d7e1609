"""Group commit: calls that arrive while others are in flight share the next round trip."""

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


class LockedError(MailboxError):
    """Another transaction keeps locked what a job needs."""


class _Call(NamedTuple, Generic[Job, Result]):
    job: Job
    done: "asyncio.Future[Result]"
    expires_s: float


class Batcher(Generic[Job, Result]):
    """Does jobs by ``do``, many at a time, in the order in which they came.

    ``do`` returns a result or an error for each job. What it raises is the error of every job,
    except MailboxRefusedError: then the batch is split, so that one bad job fails alone. It is also
    split for LockedError, until all jobs have one ``key``. These are retried whenever no others
    wait. A batch has at most ``max_count`` jobs with a total ``cost`` of at most ``max_cost``, or a
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
        key: Callable[[Job], object] = lambda _: None,
    ) -> None:
        self._do = do
        self._timeout_s = timeout_s
        self._max_count = max_count
        self._max_cost = max_cost
        self._cost = cost
        self._key = key
        self._waiting: deque[_Call[Job, Result]] = deque()
        # The jobs that were locked out, by key, and the keys that are being tried again.
        self._locked_out: dict[object, deque[_Call[Job, Result]]] = {}
        self._trying: set[object] = set()
        self._workers = self._idle_workers = workers
        self._working: set[asyncio.Task[None]] = set()
        self._closed = False

    async def __call__(self, job: Job) -> Result:
        """The result of ``job``. When the caller is cancelled it is done completely or not at all.

        Raises:
            MailboxError: too many jobs wait, or this one waited for ``timeout_s``.
        """
        locked_out = sum(map(len, self._locked_out.values()))
        admit(waiting=len(self._waiting) + locked_out, closed=self._closed)
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
            await self._do_batch(batch)
        self._idle_workers += 1  # before anything can suspend, so that the next call finds it

    async def _do_batch(self, batch: Sequence[_Call[Job, Result]]) -> None:
        """Do the jobs of ``batch``, and give each caller its result or its error."""
        results: Sequence[Result | Exception]
        try:
            found = await self._do([call.job for call in batch])
            results = [result for _, result in zip(batch, found, strict=True)]
        except asyncio.CancelledError:  # a driver's, as nobody cancels a worker
            results = [MailboxError("the mailbox gave up the call, try again")] * len(batch)
        except LockedError:
            await self._on_locked(batch)
            return
        except MailboxRefusedError as error:
            if len(batch) > 1:
                middle = len(batch) // 2
                await self._do_batch(batch[:middle])
                await self._do_batch(batch[middle:])
                return
            results = [error]
        except Exception as error:  # noqa: BLE001 - any error belongs to the callers
            results = [error] * len(batch)
        for call, result in zip(batch, results, strict=True):
            _settle(call, result)
        if self._trying:
            self._trying.difference_update(self._key(call.job) for call in batch)

    async def _on_locked(self, batch: Sequence[_Call[Job, Result]]) -> None:
        keys = list(dict.fromkeys(self._key(call.job) for call in batch))
        if len(keys) == 1:
            calls = self._locked_out.pop(keys[0], deque())
            calls.extendleft(reversed(batch))
            self._locked_out[keys[0]] = calls  # behind the others
            self._trying.discard(keys[0])
            return
        first = set(keys[: len(keys) // 2])
        await self._do_batch([call for call in batch if self._key(call.job) in first])
        await self._do_batch([call for call in batch if self._key(call.job) not in first])

    def _take(self) -> list[_Call[Job, Result]]:
        share = max(SHARE_AT_LEAST, -(-len(self._waiting) // self._workers))
        if batch := self._take_from(self._waiting, min(share, self._max_count), "overloaded"):
            return batch
        for key in [key for key in self._locked_out if key not in self._trying]:
            if batch := self._take_from(self._locked_out[key], self._max_count, "locked"):
                self._trying.add(key)
                return batch
            del self._locked_out[key]
        return []

    def _take_from(
        self, calls: deque[_Call[Job, Result]], limit: int, trouble: str
    ) -> list[_Call[Job, Result]]:
        """Take up to ``limit`` calls. Those that have waited too long fail with ``trouble``."""
        now_s = asyncio.get_running_loop().time()
        batch: list[_Call[Job, Result]] = []
        cost = 0
        while calls and len(batch) < limit:
            call = calls[0]
            if call.expires_s < now_s:
                _settle(call, MailboxError(f"the mailbox was {trouble} for {self._timeout_s:g} s"))
            if not call.done.done():
                if calls is self._waiting and self._locked_out:
                    key = self._key(call.job)
                    if (others := self._locked_out.get(key)) is not None:
                        others.append(calls.popleft())
                        continue
                cost += self._cost(call.job)
                if batch and cost > self._max_cost:
                    break
                batch.append(call)
            calls.popleft()
        return batch


def _settle(call: _Call[Job, Result], result: Result | Exception) -> None:
    if call.done.done():  # the caller was cancelled
        return
    if isinstance(result, Exception):
        call.done.set_exception(result)
    else:
        call.done.set_result(result)
