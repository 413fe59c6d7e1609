"""The fork server: what happens to a host's workers when it can't fork, or does not answer."""

import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from pokebridge.errors import UnavailableError
from pokebridge.server import fork_server
from pokebridge.server.fork_server import ForkServer

# Python runs this file at the start of each process that finds it.
FAILS_ONCE = """
import errno, os
fork, forks = os.fork, []
def fork_but_once():
    forks.append(1)
    if len(forks) == 2:
        raise BlockingIOError(errno.EAGAIN, "no process is left")
    return fork()
os.fork = fork_but_once
"""


@pytest.fixture
async def server() -> AsyncIterator[ForkServer]:
    """A fork server, which starts with the first fork."""
    server = ForkServer()
    yield server
    await server.close()


@pytest.fixture
def descriptors() -> Iterator[Sequence[int]]:
    """A channel and a door, on whose other ends nobody says anything."""
    with ExitStack() as opened:
        ends = [opened.enter_context(end) for _ in range(2) for end in socket.socketpair()]
        yield [ends[0].fileno(), ends[2].fileno()]


async def test_a_fork_that_fails_ends_no_worker(
    server: ForkServer,
    descriptors: Sequence[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the limit of processes the others live on, and a later fork succeeds."""
    (tmp_path / "sitecustomize.py").write_text(FAILS_ONCE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    first = psutil.Process(await server.fork(descriptors))
    with pytest.raises(UnavailableError, match="Resource temporarily unavailable"):
        await server.fork(descriptors)
    second = psutil.Process(await server.fork(descriptors))
    assert first.ppid() == second.ppid()


async def test_a_fork_server_that_stands_still_is_replaced(
    server: ForkServer, descriptors: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the caller nor the stop of the instance waits for ever."""
    first = psutil.Process(await server.fork(descriptors))
    os.kill(first.ppid(), signal.SIGSTOP)
    monkeypatch.setattr(fork_server, "ANSWER_TIMEOUT_S", 0.05)
    with pytest.raises(UnavailableError, match="does not answer"):
        await server.fork(descriptors)
    monkeypatch.undo()
    assert await server.fork(descriptors) != first.pid
