"""Starts of ``pokebridge serve`` by the dozen: forked from a process that has imported it already.

Each is the whole command in a process of its own, but for the imports, which are nearly all that
a start costs: 50 take the time of three.
"""

import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from pokebridge.cli import main

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    ["tests.cluster.starts", "pokebridge.cli.serve", "pokebridge.server"]
    + [f"pokebridge.{part}.memory" for part in ("mailbox", "coordination")]
    + ["pokebridge.transport.google_pubsub"]
)


@contextmanager
def instances(count: int, settings: Mapping[str, object], log: Path) -> Iterator[None]:
    """Start ``count`` instances, and kill them with SIGKILL when the block ends."""
    env = {f"POKEBRIDGE_{name.upper()}": str(value) for name, value in settings.items()}
    env["PUBSUB_EMULATOR_HOST"] = os.environ["PUBSUB_EMULATOR_HOST"]
    started = [_forks.Process(target=_serve, args=(env, log)) for _ in range(count)]
    try:
        for process in started:
            process.start()
        yield
    finally:
        _kill(started)


def _serve(env: Mapping[str, str], log: Path) -> None:
    os.environ.update(env)
    with log.open("a") as lines:
        os.dup2(lines.fileno(), sys.stderr.fileno())
    main(["serve", "--port", "0", "--dev"])


def _kill(processes: list[ForkServerProcess]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
        process.close()
