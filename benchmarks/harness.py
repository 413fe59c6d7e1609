"""What the measures share: processes that speak in lines, the herd of clients, and figures."""

import asyncio
import contextlib
import functools
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
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


class BenchmarkError(Exception):
    """A measure can't be taken; the message is one line for people."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table: ``at_most`` is the target, ``detail`` what ``value`` is made of."""

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
    """Our cost to a yardstick's: the median of the ratios, each of two neighbours in time."""
    ratio = median(mine / yours for mine, yours in zip(ours, theirs, strict=True))
    digits = 0 if median(ours) >= 100 else 2
    made_of = f"{median(ours):,.{digits}f} to {median(theirs):,.{digits}f} {unit}"
    return Figure(measure, name, ratio, "x", at_most, made_of)


class Server(NamedTuple):
    """A server process under measurement."""

    port: int
    process: psutil.Process

    def cpu_s(self) -> float:
        """CPU time that it has used, user and system, in steps of 10 ms."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def rss_bytes(self) -> int:
        """Its resident memory."""
        return int(self.process.memory_info().rss)


def waited_s(pid: int) -> float:
    """How long the main thread of ``pid`` has waited for a CPU (Linux, sched-stats.rst)."""
    _, waited_ns, _ = Path(f"/proc/{pid}/schedstat").read_text().split()
    return int(waited_ns) / 1e9


def progress(text: str) -> None:
    """Say on stderr what is going on."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def tokens(count: int, scopes: Sequence[str] = ()) -> list[str]:
    """Tokens of ``count`` recipients, as ``recipient`` names them."""
    return [sign_token(SECRET, recipient(number), scopes) for number in range(count)]


def recipient(number: int) -> str:
    """The name of a recipient."""
    return f"urn:user:{number:06}"


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for ``condition``; raise :class:`BenchmarkError` when it does not come."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise BenchmarkError(f"not within {PATIENCE_S:.0f} s: {what}")
        await asyncio.sleep(_POLL_S)


# --- processes --------------------------------------------------------------------------------


class Child:
    """A process that is told lines and answers with lines."""

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
        """The next line of its stdout; raises :class:`BenchmarkError` when there comes none."""
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
    """Run ``command`` until the block ends; what it says on stderr is passed on."""
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
        await process.communicate()  # waits for its end, and closes the pipes


@functools.cache
def load_program() -> Path:
    """Compile ``load.c``, once a run, and return the program's path."""
    BUILD.mkdir(exist_ok=True)
    fresh = BUILD / f"load.{os.getpid()}"  # another run may be using the one that is there
    source = Path(__file__).with_name("load.c")
    try:
        subprocess.run(["cc", "-O2", "-o", fresh, source], check=True)
    except FileNotFoundError:
        raise BenchmarkError("a C compiler is needed, as the command cc") from None
    except subprocess.CalledProcessError:
        raise BenchmarkError("load.c does not compile") from None
    return fresh.rename(BUILD / "load")


@contextlib.asynccontextmanager
async def instance(**more: str) -> AsyncIterator[Server]:
    """A real ``pokebridge serve`` on a free port, without limits for strangers.

    ``more``: further settings.
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
    """A server of ``peers.py``, and the process to tell how many sweeps of pokes it shall send."""
    async with child(kind, sys.executable, "-m", "benchmarks.peers", kind) as it:
        yield Server(int(await it.line()), psutil.Process(it.pid)), it


@contextlib.asynccontextmanager
async def websockets_server() -> AsyncIterator[Server]:
    """The yardstick: the ``websockets`` library's server, with the same check of the token."""
    async with peer("websockets") as (server, _):
        yield server


# --- clients ----------------------------------------------------------------------------------


class Herd:
    """Clients in C that have all heard ``ready``."""

    def __init__(self, process: Child) -> None:
        self._process = process
        self._heard = 0

    async def hear(self, count: int) -> None:
        """Wait until all together have heard exactly ``count`` more pokes."""
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
    """Connect a client for each token; they hang up when the block ends.

    ``pokes_at_once``: how many ``hear`` is asked to wait for, each time.
    """
    arguments = ("read", str(port), str(len(bearers)), str(pokes_at_once))
    async with child("load read", load_program(), *arguments) as it:
        it.tell("".join(f"{bearer}\n" for bearer in bearers))
        if await it.line() != "ready":
            raise BenchmarkError("a poke came before ready")
        yield Herd(it)


async def connect_and_leave(server: Server, bearers: Sequence[str]) -> float:
    """Connect a client for each token and hang up; the CPU seconds that the handshakes took."""
    open_files, before_s = server.process.num_fds(), server.cpu_s()
    async with herd(server.port, bearers):
        used_s = server.cpu_s() - before_s
    await until(lambda: server.process.num_fds() <= open_files, "all clients have left")
    return used_s
