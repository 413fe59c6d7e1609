"""``python -m tests.fuzz``: inputs without sense at every border of real instances."""

import argparse
import logging
import tempfile
from pathlib import Path

import structlog
import uvloop

from tests.fuzz.running import BORDERS, run
from tests.support import environment

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="for each border")
    parser.add_argument("--seed", type=int, default=1, help="the same one makes the same inputs")
    parser.add_argument("--only", choices=BORDERS, action="append", help="may be given repeatedly")
    asked = parser.parse_args()

    def tell(line: str) -> None:
        """Print a line."""
        print(line, flush=True)  # noqa: T201 - a program's output

    # Most key sets are unreadable, and each would be a log line.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    environment.clean()
    with tempfile.TemporaryDirectory() as name:
        chosen = asked.only or BORDERS
        uvloop.run(run(chosen, asked.inputs, asked.seed, Path(name), tell))
