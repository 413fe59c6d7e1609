"""What the measures share: processes that exchange lines, clients, and figures."""

import asyncio
import contextlib
import functools
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil

from pokebridge.tokens import sign_token

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build"
SECRET = "a secret for benchmarks, which guards nothing"
PATIENCE_S = 60.0
_POLL_S = 0.02
_POKES_NOT_COUNTED = 1 << 40
# A server is quiet when it uses less than 1% of a core for this long, which is longer than it
# delays confirmations and acks; and how often it is checked at most.
_LOOK_S, _QUIET_SHARE, _LOOKS = 0.25, 0.01, 20


class BenchmarkError(Exception):
    """A measure failed; the message is one line for people."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table: ``at_most`` is the target, ``detail`` explains ``value``."""

    measure: str
    name: str
    value: float
    unit: str
    at_most: float | None = None
    detail: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; ``None`` when there is none."""
        return None if self.at_most is None else self.value <= self.at_most


def compare(
    measure: str,
    name: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    unit: str,
    at_most: float | None = None,
) -> Figure:
    """Our cost relative to a reference: the median ratio of measurements taken in pairs."""
    ratio = median(mine / yours for mine, yours in zip(ours, theirs, strict=True))
    digits = 0 if median(ours) >= 100 else 2
    made_of = f"{median(ours):,.{digits}f} to {median(theirs):,.{digits}f} {unit}"
    return Figure(measure, name, ratio, "x", at_most, made_of)


class Server(NamedTuple):
    """A server under measurement: a process, and its child processes if it has some."""

    port: int
    process: psutil.Process

    def cpu_s(self) -> float:
        """CPU seconds that it has used, user and system, in all threads."""
        return sum(self.cpu_s_by_process().values())

    def cpu_s_by_process(self) -> dict[int, float]:
        """The same of each process, by its id.

        In nanoseconds (Linux, sched-stats.rst), where the clock of a process has steps of 10 ms.
        """
        return {
            process.pid: sum(_schedstat(task)[0] for task in _tasks_of(process)) / 1e9
            for process in self.processes()
        }

    def run_on(self, cores: Iterable[int]) -> None:
        """Give it these cores alone."""
        for process in self.processes():
            for task in _tasks_of(process):
                with contextlib.suppress(ProcessLookupError):  # it has ended
                    os.sched_setaffinity(int(task.name), cores)

    def rss_bytes(self) -> int:
        """Its resident memory (RSS). What processes share counts in each of them."""
        return sum(int(process.memory_info().rss) for process in self.processes())

    def open_files(self) -> int:
        """How many descriptors it has open."""
        return sum(process.num_fds() for process in self.processes())

    def processes(self) -> list[psutil.Process]:
        """It and its child processes."""
        return [self.process, *self.process.children(recursive=True)]


def _tasks_of(process: psutil.Process) -> Iterator[Path]:
    """The directories of all threads (``proc_pid_task(5)``)."""
    return Path(f"/proc/{process.pid}/task").iterdir()


def waited_s(pid: int) -> float:
    """How long the main thread of ``pid`` has waited for a CPU (Linux, sched-stats.rst)."""
    return _schedstat(Path(f"/proc/{pid}"))[1] / 1e9


def _schedstat(task: Path) -> tuple[int, int]:
    """How long a thread has had a CPU, and has waited for one, in nanoseconds; 0 once it ended."""
    try:
        had_ns, waited_ns, _ = (task / "schedstat").read_text().split()
    except OSError:
        return 0, 0
    return int(had_ns), int(waited_ns)


@contextlib.contextmanager
def on_one_core(server: Server, engines: Iterable[Server] = ()) -> Iterator[None]:
    """Give ``server`` one core for itself. The clients and ``engines`` get the others, if any."""
    cores = sorted(os.sched_getaffinity(0))
    others = cores[1:] or cores
    server.run_on(cores[:1])
    for engine in engines:
        engine.run_on(others)
    os.sched_setaffinity(0, others)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def progress(text: str) -> None:
    """Write a line about the progress to stderr."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def tokens(count: int, scopes: Sequence[str] = (), *, first: int = 0) -> list[str]:
    """A token for each of ``count`` recipients, from number ``first`` on."""
    return [sign_token(SECRET, recipient(first + number), scopes) for number in range(count)]


def recipient(number: int) -> str:
    """The name of a recipient."""
    return f"urn:user:{number:06}"


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for ``condition``; raise :class:`BenchmarkError` after ``PATIENCE_S`` seconds."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise BenchmarkError(f"not within {PATIENCE_S:.0f} s: {what}")
        await asyncio.sleep(_POLL_S)


async def quiet(server: Server) -> None:
    """Return when ``server`` has done the work that follows the calls, or does not become quiet."""
    for _ in range(_LOOKS):
        before_s = server.cpu_s()
        await asyncio.sleep(_LOOK_S)
        if server.cpu_s() - before_s < _LOOK_S * _QUIET_SHARE:
            return


# --- processes --------------------------------------------------------------------------------


class Child:
    """A process that reads lines and answers with lines."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self._name = name
        self._process = process

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def tell(self, text: str) -> None:
        """Write ``text``, whole lines, to its stdin."""
        assert self._process.stdin is not None, "it is a pipe"
        self._process.stdin.write(text.encode())

    async def line(self) -> str:
        """The next line of its stdout; raises :class:`BenchmarkError` when none comes in time."""
        assert self._process.stdout is not None, "it is a pipe"
        try:
            async with asyncio.timeout(PATIENCE_S):
                line = await self._process.stdout.readline()
        except TimeoutError:
            raise BenchmarkError(f"{self._name} said nothing for {PATIENCE_S:.0f} s") from None
        if not line:
            raise BenchmarkError(f"{self._name} has ended")
        return line.decode().strip()


@contextlib.asynccontextmanager
async def child(
    name: str, *command: str | Path, env: Mapping[str, str] | None = None
) -> AsyncIterator[Child]:
    """Run ``command`` until the block ends; its stderr is ours."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=env,
        cwd=ROOT,
    )
    try:
        yield Child(name, process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()  # waits until it has ended, and closes the pipes


@functools.cache
def load_program() -> Path:
    """Compile ``load.c`` once in a run, and return the path of the program."""
    BUILD.mkdir(exist_ok=True)
    fresh = BUILD / f"load.{os.getpid()}"  # another run may be using the existing program
    source = Path(__file__).with_name("load.c")
    try:
        subprocess.run(["cc", "-O2", "-o", fresh, source], check=True)
    except FileNotFoundError:
        raise BenchmarkError(
            "the benchmarks need a C compiler as the command cc: install gcc or clang"
        ) from None
    except subprocess.CalledProcessError:
        raise BenchmarkError("load.c does not compile") from None
    return fresh.rename(BUILD / "load")


@contextlib.asynccontextmanager
async def instance(**more: str) -> AsyncIterator[Server]:
    """A real ``pokebridge serve`` on a free port, without limits on handshakes.

    ``more`` are further settings.
    """
    settings = {
        "host": "127.0.0.1",
        "port": "0",
        "mailbox": "memory://",
        "log_level": "warning",
        "jwt_secret": SECRET,
        "max_sessions_per_address": "0",
        "handshakes_per_s": "0",
        **more,
    }
    env = {name: value for name, value in os.environ.items() if not name.startswith("POKEBRIDGE_")}
    env |= {f"POKEBRIDGE_{name.upper()}": value for name, value in settings.items()}
    async with child(
        "pokebridge serve", sys.executable, "-m", "pokebridge", "serve", env=env
    ) as it:
        process = psutil.Process(it.pid)
        await until(lambda: any(_ports(process)), "pokebridge serve listens")
        server = Server(next(_ports(process)), process)
        await _answer(server.port)  # it listens before it has opened all that it needs
        yield server


async def _answer(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /healthz HTTP/1.0\r\n\r\n")
    await reader.read()
    writer.close()


def _ports(process: psutil.Process) -> Iterator[int]:
    try:
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                yield connection.laddr.port
    except psutil.Error:
        raise BenchmarkError("pokebridge serve has ended") from None


@contextlib.asynccontextmanager
async def peer(kind: str) -> AsyncIterator[tuple[Server, Child]]:
    """A server of ``peers.py``, and the process that takes the number of sweeps to send."""
    async with child(kind, sys.executable, "-m", "benchmarks.peers", kind) as it:
        yield Server(int(await it.line()), psutil.Process(it.pid)), it


@contextlib.asynccontextmanager
async def websockets_server() -> AsyncIterator[Server]:
    """The reference: the server of the ``websockets`` library, which checks tokens too."""
    async with peer("websockets") as (server, _):
        yield server


# --- clients ----------------------------------------------------------------------------------


class Herd:
    """Clients, written in C, that have all received ``ready``."""

    def __init__(self, process: Child) -> None:
        self._process = process
        self._heard = 0

    async def hear(self, count: int) -> None:
        """Wait until the clients together have received exactly ``count`` more pokes."""
        self._heard += count
        try:
            heard = int(await self._process.line())
        except BenchmarkError as error:
            raise BenchmarkError(f"of {count} pokes some were lost or merged: {error}") from None
        if heard != self._heard:
            raise BenchmarkError(f"{heard} pokes were heard where {self._heard} were sent")


@contextlib.asynccontextmanager
async def herd(
    port: int, bearers: Sequence[str], *, pokes_at_once: int = _POKES_NOT_COUNTED
) -> AsyncIterator[Herd]:
    """Connect a client for each token; they disconnect when the block ends.

    ``pokes_at_once`` is the count of each call of ``hear``.
    """
    arguments = ("read", str(port), str(len(bearers)), str(pokes_at_once))
    async with child("load read", load_program(), *arguments) as it:
        it.tell("".join(f"{bearer}\n" for bearer in bearers))
        if await it.line() != "ready":
            raise BenchmarkError("a poke came before ready")
        yield Herd(it)


async def connect_and_leave(server: Server, bearers: Sequence[str]) -> float:
    """Connect and disconnect a client for each token; returns the CPU seconds it took."""
    open_files, before_s = server.open_files(), server.cpu_s()
    async with herd(server.port, bearers):
        used_s = server.cpu_s() - before_s
    await until(lambda: server.open_files() <= open_files, "all clients have left")
    return used_s
