"""Starts of the command ``pokebridge``, forked from a process that has imported it already.

Each is the whole command in a process of its own, but for the imports, which are most of what a
start costs.
"""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pokebridge.cli import main

POLL_S = 0.01

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    [
        "tests.support.forking",
        *(f"pokebridge.cli.{name}" for name in ("cluster", "plan", "serve")),
        "pokebridge.server.assemble",
        # Without Google's driver, because gRPC does not support forks, and a start once hung.
        *(f"pokebridge.transport.{name}" for name in ("memory", "nats", "redis")),
        *(f"pokebridge.mailbox.{name}" for name in ("memory", "postgres", "sqlite")),
        *(f"pokebridge.coordination.{name}" for name in ("memory", "nats", "postgres", "redis")),
    ]
)
# multiprocessing polls all of its children at each start, and is not thread-safe.
_lock = threading.Lock()

Completed = subprocess.CompletedProcess[str]


class ForkedCommand:
    """``pokebridge`` with ``args``; the rest is as of :class:`subprocess.Popen`.

    What it writes is appended to ``stdout``, and to ``stderr`` if that is another file.
    """

    def __init__(
        self,
        args: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        stdout: Path,
        stderr: Path | None = None,
    ) -> None:
        self._args = args
        self._process = _forks.Process(
            target=_run, args=(list(args), dict(env), cwd, stdout, stderr or stdout), daemon=True
        )
        with _lock:
            self._process.start()
        self.pid = self._process.pid or 0

    def poll(self) -> int | None:
        """Its exit status; ``None`` while it runs."""
        with _lock:
            return self._process.exitcode

    def send_signal(self, sig: int) -> None:
        """Send it a signal, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, sig)

    def wait(self, timeout: float) -> int:
        """Wait until it ends; returns its exit status."""
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(["pokebridge", *self._args], timeout)
            time.sleep(POLL_S)
        return status


def run_forked(args: Sequence[str], env: Mapping[str, str], timeout_s: float = 60.0) -> Completed:
    """``pokebridge`` with ``args``, to its end."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        out, err = directory / "stdout", directory / "stderr"
        command = ForkedCommand(args, env=env, cwd=directory, stdout=out, stderr=err)
        try:
            status = command.wait(timeout_s)
        except subprocess.TimeoutExpired:
            command.send_signal(signal.SIGABRT)  # faulthandler shows where it hangs
            command.wait(timeout_s)
            raise AssertionError(f"{out.read_text()}{err.read_text()}") from None
        finally:
            command.send_signal(signal.SIGKILL)
        return Completed(args, status, out.read_text(), err.read_text())


def _run(
    args: Sequence[str], env: Mapping[str, str], cwd: Path, stdout: Path, stderr: Path
) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for path, stream in ((stdout, sys.stdout), (stderr, sys.stderr)):
        with path.open("ab") as lines:
            os.dup2(lines.fileno(), stream.fileno())
    faulthandler.enable()
    main(args)
