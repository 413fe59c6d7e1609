"""Starting and ending processes: what goes wrong is said, and nothing stays behind."""

import signal
import sys
from pathlib import Path

import psutil
import pytest

from tests.support import Daemon, free_port
from tests.support.daemon import alive

LISTEN = """
import signal, socket, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
signal.sigwait([signal.SIGTERM])
child.kill()
sys.exit(7)
"""


def _daemon(directory: Path, program: str) -> Daemon:
    port = free_port()
    command = [sys.executable, "-c", program, str(port)]
    return Daemon("sample", command, port=port, url="", directory=directory)


def test_terminate_returns_the_exit_status(tmp_path: Path) -> None:
    """After an orderly stop the exit status is returned, and the process is gone."""
    daemon = _daemon(tmp_path, "import signal; signal.pthread_sigmask(0, [15])" + LISTEN)
    daemon.start()
    assert daemon in alive
    assert daemon.rss_bytes() > 1_000_000
    assert daemon.terminate() == 7
    assert not daemon.is_running()
    assert daemon not in alive


def test_kill_leaves_no_child(tmp_path: Path) -> None:
    """The child processes of a killed server are killed, too."""
    daemon = _daemon(tmp_path, LISTEN)
    daemon.start()
    child = psutil.Process(int(daemon.log().split()[1]))
    assert child.status() != psutil.STATUS_ZOMBIE
    daemon.kill()
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert daemon.terminate() == -signal.SIGKILL


def test_a_server_that_does_not_start_shows_its_log(tmp_path: Path) -> None:
    """A failed start raises at once, with the server's output."""
    daemon = _daemon(tmp_path, "raise SystemExit('no such setting: colour')")
    with pytest.raises(RuntimeError, match="no such setting: colour"):
        daemon.start()
    assert daemon not in alive


def test_free_ports_lie_below_the_clients_range() -> None:
    """The kernel gives no client the port of a server that is down for a moment."""
    first, *_ = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    assert all(1024 < free_port() < int(first) for _ in range(20))
