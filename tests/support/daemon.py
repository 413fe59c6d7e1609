"""A server process of a test's own: started, killed, restarted on the same port, and stopped."""

import os
import secrets
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import psutil

from tests.support.waiting import block_until

# Limits for hangs, not for slowness: a busy machine takes many times as long as a quiet one.
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0
LOG_TAIL_LINES = 60
PORTS = range(20_000, 32_000)

alive: "set[Daemon]" = set()
"""The daemons that run now; their logs go into the report of a test that fails."""


_given_ports: set[int] = set()


def free_port() -> int:
    """A loopback port that nobody listens on, and that this run gives to nobody else.

    Each process of the run has a range of its own, and gives each port away once: a server that is
    down for a moment finds its port free. The range lies below the one that the kernel takes
    client ports from (32768 on Linux): a client that keeps trying a dead server's port can then
    neither take it nor connect to itself. The port is drawn by the system's randomness, so that
    two runs on one machine seldom meet; pytest-randomly seeds ``random`` alike in each.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    count = len(PORTS) // workers
    while True:
        port = PORTS[worker % workers * count + secrets.randbelow(count)]
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given_ports:
                _given_ports.add(port)
                return port


class Process(Protocol):
    """What is used of :class:`subprocess.Popen`."""

    pid: int

    def poll(self) -> int | None:
        """Its exit status; ``None`` while it runs."""

    def send_signal(self, sig: int, /) -> None:
        """Send it a signal, if it runs."""

    def wait(self, timeout: float) -> int:
        """Wait until it ends; returns its exit status."""


class Daemon:
    """A server on a loopback port. Its calls block: in an async test, ``asyncio.to_thread`` them.

    ``is_ready`` says that the server, which listens already, answers; ``stop_signal`` is what asks
    it to stop at once and in good order.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        port: int,
        url: str,
        directory: Path,
        is_ready: Callable[[], bool] = lambda: True,
        env: Mapping[str, str] | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> None:
        self.name = name
        self.port = port
        self.url = url
        self._command = command
        self._directory = directory
        self._is_ready = is_ready
        self._env = env
        self._stop_signal = stop_signal
        self._log = directory / f"{name}.log"
        self._process: Process | None = None

    @property
    def address(self) -> str:
        """``HOST:PORT``."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        assert self._process is not None, f"{self.name} does not run"
        return self._process.pid

    def is_running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """All that the server has written to stdout and stderr, over all its lives."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def log_tail(self, since: int = 0) -> str:
        """The end of the log, of what was written after its first ``since`` characters."""
        return "\n".join(self.log()[since:].splitlines()[-LOG_TAIL_LINES:])

    def rss_bytes(self) -> int:
        """The resident memory of the process."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def start(self) -> None:
        """Start it and return when it answers; raise with its log when it does not."""
        self._process = self._spawn()
        alive.add(self)
        try:
            block_until(self._answers, START_TIMEOUT_S, f"{self.name} answering on {self.address}")
        except TimeoutError as error:
            self.kill()
            raise RuntimeError(f"{error}\n{self.log_tail()}") from None

    def kill(self) -> None:
        """SIGKILL it and what it has started, as a machine that dies would."""
        if not self.is_running():
            return
        process = psutil.Process(self.pid)
        children = process.children(recursive=True)
        for member in (process, *children):
            with suppress(psutil.NoSuchProcess):
                member.kill()
        self._reap()
        block_until(lambda: all(map(_is_dead, children)), STOP_TIMEOUT_S, "the children's end")

    def terminate(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Ask it to stop and return its exit status.

        Raises :class:`subprocess.TimeoutExpired`, after killing it, when it takes longer.
        """
        process = self._process
        assert process is not None, f"{self.name} was never started"
        if self.is_running():
            process.send_signal(self._stop_signal)
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            self._reap()

    def restart(self) -> None:
        """Stop it if it runs, and start it anew on the same port."""
        if self.is_running():
            self.terminate()
        self.start()

    def _spawn(self) -> Process:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._directory,
                env=self._env,
            )

    def _reap(self) -> None:
        if self._process is not None:
            self._process.wait(STOP_TIMEOUT_S)
        alive.discard(self)

    def _answers(self) -> bool:
        if not self.is_running():
            raise TimeoutError(f"{self.name} ended by itself with {self.terminate()}")
        return self._listens() and self._is_ready()

    def _listens(self) -> bool:
        """Whether the port is this process's own, and not that of another who was quicker."""
        with suppress(psutil.NoSuchProcess):
            return any(
                connection.status == psutil.CONN_LISTEN and connection.laddr.port == self.port
                for connection in psutil.Process(self.pid).net_connections("tcp")
            )
        return False


def _is_dead(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
