"""One seed, or many, one after the other or on several processes."""

import gc
import multiprocessing
from collections.abc import Iterator

from simulation import faults
from simulation.determinism import under_control
from simulation.loop import Scheduler
from simulation.trace import Trace
from simulation.world import Outcome, World


def simulate(seed: int, *, lines_kept: int = 60) -> Outcome:
    """Run the world of ``seed`` to its end, or to the first invariant that does not hold."""
    scheduler = Scheduler()
    trace = Trace(scheduler, lines_kept)
    with under_control(seed, trace.note):
        return World(seed, scheduler, trace, faults.ALL).run()


def outcomes(seeds: range, jobs: int) -> Iterator[Outcome]:
    """What comes of ``seeds``, as they are done, on ``jobs`` processes."""
    if jobs == 1:
        _collect_rarely()
        yield from map(simulate, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, _collect_rarely) as pool:
        yield from pool.imap_unordered(simulate, seeds, chunksize=4)


def _collect_rarely() -> None:
    gc.freeze()  # what is imported stays; only the worlds come and go,
    gc.set_threshold(100_000, 20, 20)  # and each is large
