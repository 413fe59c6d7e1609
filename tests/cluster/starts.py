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

PATIENCE_S = 30.0

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    ["tests.cluster.starts", "pokebridge.cli.serve", "pokebridge.server.uvicorn_server"]
    + [f"pokebridge.{part}.memory" for part in ("mailbox", "coordination")]
    + ["pokebridge.transport.google_pubsub"]
)


@contextmanager
def instances(count: int, settings: Mapping[str, object], log: Path) -> Iterator[None]:
    """Start ``count`` instances, and kill them with SIGKILL when the block ends."""
    started = [_fork(settings, log, "info") for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            _kill(process)


def failing_instance(settings: Mapping[str, object], log: Path) -> tuple[int | None, str]:
    """Start an instance that ends by itself; its exit status, and what it had to say."""
    process = _fork(settings, log, "error")
    try:
        process.join(PATIENCE_S)
        return process.exitcode, log.read_text()
    finally:
        _kill(process)


def _fork(settings: Mapping[str, object], log: Path, level: str) -> ForkServerProcess:
    env = {f"POKEBRIDGE_{name.upper()}": str(value) for name, value in settings.items()}
    env = {"PUBSUB_EMULATOR_HOST": os.environ.get("PUBSUB_EMULATOR_HOST", "")} | env
    process = _forks.Process(target=_serve, args=(env, log, level))
    process.start()
    return process


def _serve(env: Mapping[str, str], log: Path, level: str) -> None:
    os.environ.update(env)
    with log.open("a") as lines:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(lines.fileno(), stream.fileno())
    main(["serve", "--port", "0", "--dev", "--log-level", level])


def _kill(process: ForkServerProcess) -> None:
    process.kill()
    process.join()
    process.close()
