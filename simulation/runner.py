"""One seed, or many, one after the other or on several processes."""

import gc
import multiprocessing
from collections.abc import Collection, Iterator
from functools import partial

from simulation import faults
from simulation.determinism import under_control
from simulation.loop import Scheduler
from simulation.trace import Trace
from simulation.world import Outcome, World


def simulate(seed: int, *, kinds: Collection[str] = (), lines_kept: int = 60) -> Outcome:
    """Run the world of ``seed`` to its end, or to the first invariant that does not hold.

    Only ``kinds`` of faults occur in it, or all if none are given.
    """
    scheduler = Scheduler()
    trace = Trace(scheduler, lines_kept)
    possible = {kind: faults.ALL[kind] for kind in kinds or faults.ALL}
    with under_control(seed, trace.note):
        return World(seed, scheduler, trace, possible).run()


def outcomes(seeds: range, jobs: int, kinds: Collection[str] = ()) -> Iterator[Outcome]:
    """The outcomes of ``seeds``, as they finish, on ``jobs`` processes."""
    run = partial(simulate, kinds=kinds)
    if jobs == 1:
        _collect_rarely()
        yield from map(run, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, _collect_rarely) as pool:
        yield from pool.imap_unordered(run, seeds, chunksize=4)


def _collect_rarely() -> None:
    gc.freeze()  # what is imported stays; only the worlds come and go,
    gc.set_threshold(100_000, 20, 20)  # and each is large
