"""The cost of verification: 10,000 sessions compared with their mailbox.

The real ``Verification`` looks up the real mailbox, one step for each second of a minute, without
waiting in between. Nobody is behind, which is the usual case.
"""

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import psutil

from benchmarks.harness import Figure, progress, recipient
from pokebridge.gateway.verification import Verification
from pokebridge.mailbox.base import Mailbox
from pokebridge.mailbox.memory import MemoryMailbox
from pokebridge.mailbox.postgres import PostgresMailbox
from pokebridge.mailbox.sqlite import SqliteMailbox
from pokebridge.model import NewMessage
from tests.support.engines import run_postgres

ROUNDS = 3
EVERY_S = 60
_AT_ONCE = 500


class _Session:
    """An open session that has been told everything."""

    is_open = True
    is_closed = False
    told = 1

    def __init__(self, name: str) -> None:
        self.recipient = name

    def notify(self, version: int | None, frame: bytes) -> bool:
        """Nobody is behind, so nothing is sent."""
        raise AssertionError(self, version, frame)


async def measure(sessions: int = 10_000) -> list[Figure]:
    """CPU time of one core for so many ``sessions``, verified every 60 s."""
    figures = []
    async with contextlib.AsyncExitStack() as stack:
        for kind, opened in (
            ("memory", _memory()),
            ("SQLite", _sqlite()),
            ("PostgreSQL", _postgres()),
        ):
            mailbox, server = await stack.enter_async_context(opened)
            await _fill(mailbox, sessions)
            mine_s, servers_s = await _verify(mailbox, server, sessions)
            share = f"of a core, {mine_s / ROUNDS * 1e6 / sessions:.1f} µs a session"
            figures.append(
                Figure("verification", f"instance, {kind}", _percent(mine_s), "%", detail=share)
            )
            if server is not None:
                figures.append(
                    Figure(
                        "verification",
                        "PostgreSQL itself",
                        _percent(servers_s),
                        "%",
                        detail="of a core",
                    )
                )
    return figures


def _percent(cpu_s: float) -> float:
    return cpu_s / ROUNDS / EVERY_S * 100


async def _verify(
    mailbox: Mailbox, server: psutil.Process | None, sessions: int
) -> tuple[float, float]:
    """CPU seconds of this process, and of ``server`` and its children, for all rounds."""
    looked_up = 0

    async def heads(recipients: Sequence[str]) -> Mapping[str, int]:
        nonlocal looked_up
        looked_up += len(recipients)
        return await mailbox.heads(recipients)

    verification = Verification(heads, EVERY_S)
    for n in range(sessions):
        verification.add(_Session(recipient(n)))
    await verification.step(0.0, in_doubt=False)
    theirs_s, mine_s = _tree_cpu_s(server), time.process_time()
    for second in range(1, EVERY_S * ROUNDS + 1):
        await verification.step(float(second), in_doubt=False)
    assert looked_up >= sessions * ROUNDS - ROUNDS
    return time.process_time() - mine_s, _tree_cpu_s(server) - theirs_s


def _tree_cpu_s(root: psutil.Process | None) -> float:
    if root is None:
        return 0.0
    total_s = 0.0
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total_s += times.user + times.system
    return total_s


async def _fill(mailbox: Mailbox, sessions: int) -> None:
    for start in range(0, sessions, _AT_ONCE):
        numbers = range(start, min(start + _AT_ONCE, sessions))
        messages = (NewMessage(recipient(n), "urn:user:sender", f"{n}", b"{}") for n in numbers)
        await asyncio.gather(*(mailbox.append(each) for each in messages))
    progress(f"verification: {sessions:,} recipients in {type(mailbox).__name__}")


@contextlib.asynccontextmanager
async def _memory() -> AsyncIterator[tuple[Mailbox, psutil.Process | None]]:
    mailbox = MemoryMailbox()
    yield mailbox, None
    await mailbox.close()


@contextlib.asynccontextmanager
async def _sqlite() -> AsyncIterator[tuple[Mailbox, psutil.Process | None]]:
    with tempfile.TemporaryDirectory() as folder:
        mailbox = await SqliteMailbox.open(str(Path(folder) / "mailbox.db"))
        yield mailbox, None
        await mailbox.close()


@contextlib.asynccontextmanager
async def _postgres() -> AsyncIterator[tuple[Mailbox, psutil.Process | None]]:
    with run_postgres() as server:
        mailbox = await PostgresMailbox.open(server.url)
        yield mailbox, psutil.Process(server.pid)
        await mailbox.close()
