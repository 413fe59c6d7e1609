"""Running the command, in this process or in one of its own."""

import os
import subprocess
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from pokebridge.cli import main
from tests.support.serving import JWT_SECRET, POKEBRIDGE, Instance

TIMEOUT_S = 200.0  # for what hangs


class Result(NamedTuple):
    """How a command ended and what it wrote."""

    status: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture(scope="session")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """One instance for all, that knows the secret and hands out no tokens."""
    environ = os.environ | {
        "POKEBRIDGE_JWT_SECRET": JWT_SECRET,
        "POKEBRIDGE_MAILBOX": "memory://",
        "POKEBRIDGE_DRAIN_S": "0",
    }
    running = Instance("shared", [], environ, tmp_path_factory.mktemp("shared"))
    running.start()
    yield running
    running.kill()


@pytest.fixture
def ask(instance: Instance, run: Run) -> Run:
    """The command, told where the instance is and what the secret is."""

    def ask_it(*args: str, **environ: str) -> Result:
        given = {"POKEBRIDGE_URL": instance.url, "POKEBRIDGE_JWT_SECRET": JWT_SECRET}
        return run(*args, **(given | environ))

    return ask_it


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """``run("poke", "urn:user:bob", POKEBRIDGE_URL=…)``: the command, in this process."""

    def run_it(*args: str, **environ: str) -> Result:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as exit_:
            main(args)
        captured = capfd.readouterr()
        assert isinstance(exit_.value.code, int)
        return Result(exit_.value.code, captured.out, captured.err)

    return run_it


@pytest.fixture
def run_process() -> Run:
    """The same in a process of its own, as a shell would start it."""

    def run_it(*args: str, stdin: str = "", **environ: str) -> Result:
        done = subprocess.run(
            [POKEBRIDGE, *args],
            input=stdin,
            env=os.environ | environ,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return run_it
