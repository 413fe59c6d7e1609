"""``python -m simulation --seeds 10000``: many worlds, one after the other."""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator

from simulation import faults
from simulation.runner import outcomes, simulate
from simulation.summary import Summary, report
from simulation.world import Outcome

_TOLD_EVERY_S = 10.0
_WHOLE_TRACE = 1_000_000


def _told(told: Iterable[Outcome], count: int) -> Iterator[Outcome]:
    """Yield the same outcomes, and print the progress now and then."""
    began_s = told_s = time.monotonic()
    failed = 0
    for number, outcome in enumerate(told, 1):
        failed += outcome.violation is not None
        now_s = time.monotonic()
        if now_s - told_s > _TOLD_EVERY_S:
            told_s = now_s
            left_s = (now_s - began_s) / number * (count - number)
            _say(f"{number} of {count} seeds, {failed} failed, {left_s:.0f} s to go")
        yield outcome


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m simulation",
        description="Simulate a cluster with its clients and much bad luck, once for each seed.",
    )
    parser.add_argument("--seeds", type=int, default=200, help="how many (default %(default)s)")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first seed")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default %(default)s)")
    parser.add_argument(
        "--faults",
        type=lambda names: names.split(","),
        default=[],
        help="the only kinds of faults, separated by commas (default all)",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--trace", action="store_true", help="print all that happens in one seed")
    asked = parser.parse_args()
    if unknown := set(asked.faults) - faults.ALL.keys():
        parser.error(
            f"there is no fault {', '.join(sorted(unknown))}; there are {', '.join(faults.ALL)}"
        )
    return asked


def main() -> int:
    """Run the requested seeds. Returns 1 if an invariant did not hold."""
    asked = _arguments()
    if asked.trace:
        outcome = simulate(asked.first, kinds=asked.faults, lines_kept=_WHOLE_TRACE)
        sys.stdout.writelines(f"{line}\n" for line in outcome.last)
        return 0
    summary = Summary()
    seeds = range(asked.first, asked.first + asked.seeds)
    for outcome in _told(outcomes(seeds, asked.jobs, asked.faults), asked.seeds):
        summary.add(outcome)
        for line in report(outcome):
            _say(line)
    if asked.json:
        sys.stdout.write(json.dumps(summary.as_dict(), indent=2) + "\n")
    else:
        sys.stdout.writelines(f"{line}\n" for line in summary.lines())
    return 1 if summary.failures else 0


if __name__ == "__main__":
    sys.exit(main())
