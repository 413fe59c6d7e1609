"""Calls that come while others are under way share the next batch."""

import asyncio
from collections.abc import Callable, Sequence

import pytest

from pokebridge.errors import MailboxError
from pokebridge.mailbox import batcher
from pokebridge.mailbox.batcher import Batcher, LockedError
from tests.support import wait_until


class Store:
    """Doubles numbers, batch by batch, when its gate is open."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def double(self, numbers: Sequence[int]) -> list[int | Exception]:
        """Answer each number; an odd one below zero is an error of its own."""
        self.batches.append(list(numbers))
        await self.gate.wait()
        if self.error:
            raise self.error
        return [ValueError(f"{n}") if n == -1 else 2 * n for n in numbers]


@pytest.fixture
async def store() -> Store:
    """A store with its gate open."""
    return Store()


def doubling(
    store: Store,
    *,
    workers: int = 1,
    max_count: int = 100,
    max_cost: int = 1000,
    timeout_s: float = 10,
    cost: Callable[[int], int] = lambda _: 0,
) -> Batcher[int, int]:
    """What is tested."""
    return Batcher(
        store.double,
        timeout_s=timeout_s,
        workers=workers,
        max_count=max_count,
        max_cost=max_cost,
        cost=cost,
    )


async def test_what_comes_at_once_is_one_batch(store: Store) -> None:
    """Each caller gets its own answer."""
    double = doubling(store)
    assert await asyncio.gather(*(double(n) for n in range(20))) == [2 * n for n in range(20)]
    assert store.batches == [list(range(20))]


async def test_what_comes_meanwhile_is_the_next_batch(store: Store) -> None:
    """While one is under way the others wait, in their order."""
    double = doubling(store)
    store.gate.clear()
    first = asyncio.create_task(double(1))
    await wait_until(lambda: store.batches)
    others = asyncio.gather(*(double(n) for n in (5, 3, 4)))
    await asyncio.sleep(0)
    store.gate.set()
    assert (await first, await others) == (2, [10, 6, 8])
    assert store.batches == [[1], [5, 3, 4]]


async def test_a_batch_is_bounded(store: Store) -> None:
    """The number and the cost of a batch are limited. An expensive call is a batch of one."""
    double = doubling(store, max_count=3, max_cost=10, cost=lambda n: n)
    await asyncio.gather(*(double(n) for n in (1, 1, 1, 1, 9, 1, 50, 2)))
    assert store.batches == [[1, 1, 1], [1, 9], [1], [50], [2]]


async def test_workers_share_what_waits(store: Store) -> None:
    """Two batches are under way at once when there is enough for two; a few are one batch."""
    double = doubling(store, workers=2)
    await asyncio.gather(*(double(n) for n in range(100)))
    assert [len(batch) for batch in store.batches[:2]] == [50, batcher.SHARE_AT_LEAST]
    assert sorted(n for batch in store.batches for n in batch) == list(range(100))
    store.batches.clear()
    await asyncio.gather(*(double(n) for n in range(20)))
    assert store.batches == [list(range(20))]


async def test_an_error_of_one_is_its_own(store: Store) -> None:
    """Others of its batch get their answers."""
    double = doubling(store)
    calls = (double(n) for n in (1, -1, 2))
    one, error, two = await asyncio.gather(*calls, return_exceptions=True)
    assert (one, two) == (2, 4)
    assert isinstance(error, ValueError)


async def test_an_error_of_all_is_everyones_and_no_end(store: Store) -> None:
    """What fails as a whole fails for each; the next batch is tried again."""
    double = doubling(store)
    store.error = MailboxError("gone")
    answers = await asyncio.gather(double(1), double(2), return_exceptions=True)
    assert [type(answer) for answer in answers] == [MailboxError, MailboxError]
    store.error = None
    assert await double(3) == 6


async def test_who_has_left_costs_nothing(store: Store) -> None:
    """A caller that is cancelled before its turn is left out; one that is under way harms none."""
    double = doubling(store)
    store.gate.clear()
    first = asyncio.create_task(double(1))
    await wait_until(lambda: store.batches)
    second, third = (asyncio.create_task(double(n)) for n in (2, 3))
    await asyncio.sleep(0)
    for task in (first, second):
        task.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    store.gate.set()
    assert await third == 6
    assert store.batches == [[1], [3]]


async def test_nobody_waits_for_ever(store: Store) -> None:
    """A call that waited too long for its turn fails with an error."""
    double = doubling(store, timeout_s=0.02)
    store.gate.clear()
    first = asyncio.create_task(double(1))
    await wait_until(lambda: store.batches)
    second = asyncio.create_task(double(2))
    await asyncio.sleep(0)
    loop = asyncio.get_running_loop()
    late_s = loop.time() + 0.03
    await wait_until(lambda: loop.time() > late_s)
    store.gate.set()
    assert await first == 2
    with pytest.raises(MailboxError, match=r"overloaded for 0\.02 s"):
        await second


async def test_closing_does_what_waits(store: Store) -> None:
    """Calls made before get their answer, later ones are refused, and no task is left."""
    double = doubling(store, max_count=2)
    calls = asyncio.gather(*(double(n) for n in range(5)))
    await asyncio.sleep(0)
    await double.close()
    assert await calls == [0, 2, 4, 6, 8]
    with pytest.raises(MailboxError, match="closed"):
        await double(1)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_whatever_a_store_does_no_call_waits_for_ever() -> None:
    """A driver that cancels its future, or omits a result, fails only that batch."""
    answers: list[Callable[[Sequence[int]], list[int]]] = [_cancelled, lambda _: [], list]

    async def do(numbers: Sequence[int]) -> list[int]:
        return answers.pop(0)(numbers)

    double = Batcher(do, timeout_s=10, workers=1, max_count=100, max_cost=1000)
    with pytest.raises(MailboxError, match="gave up"):
        await double(1)
    with pytest.raises(ValueError, match="shorter"):
        await double(1)
    assert await double(1) == 1
    await double.close()


def _cancelled(_: Sequence[int]) -> list[int]:
    raise asyncio.CancelledError


async def test_who_is_locked_out_holds_up_no_other(store: Store) -> None:
    """The others of its batch are answered, and those that come later; its own key's wait."""
    locked = {3}

    async def do(numbers: Sequence[int]) -> list[int | Exception]:
        if locked & {number % 10 for number in numbers}:
            await asyncio.sleep(0.001)
            raise LockedError("locked")
        return await store.double(numbers)

    double = Batcher(
        do, timeout_s=10, workers=1, max_count=100, max_cost=1000, key=lambda number: number % 10
    )
    calls = [asyncio.create_task(double(number)) for number in range(40)]
    await wait_until(lambda: sum(call.done() for call in calls) == 36)
    assert [n for n, call in enumerate(calls) if not call.done()] == [3, 13, 23, 33]
    later = asyncio.create_task(double(43))
    assert [await double(50), await double(51)] == [100, 102]
    assert not later.done()
    assert max(map(len, store.batches)) > 1
    locked.clear()
    assert await asyncio.gather(*calls, later) == [2 * n for n in [*range(40), 43]]
    assert store.batches[-1] == [3, 13, 23, 33, 43]
    await double.close()


async def test_who_is_locked_out_for_too_long_is_told() -> None:
    """Every call ends."""

    async def do(_: Sequence[int]) -> list[int]:
        await asyncio.sleep(0.001)
        raise LockedError("locked")

    double = Batcher(do, timeout_s=0.02, workers=1, max_count=100, max_cost=1000)
    with pytest.raises(MailboxError, match=r"locked for 0\.02 s"):
        await double(1)
    await double.close()
