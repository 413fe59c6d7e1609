"""Instances by the dozen that serve nobody: to be killed, or to fail."""

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.support.forking import ForkedCommand, run_forked

STOP_TIMEOUT_S = 60.0


@contextmanager
def instances(count: int, settings: Mapping[str, object], log: Path) -> Iterator[None]:
    """Start ``count`` instances, and kill them with SIGKILL when the block ends."""
    env = _environ(settings)
    started = [
        ForkedCommand(_serve("info"), env=env, cwd=log.parent, stdout=log) for _ in range(count)
    ]
    try:
        yield
    finally:
        for process in started:
            process.send_signal(signal.SIGKILL)
        for process in started:
            process.wait(STOP_TIMEOUT_S)


def failing_instance(settings: Mapping[str, object]) -> tuple[int, str]:
    """Start an instance that ends by itself; its exit status, and what it had to say."""
    done = run_forked(_serve("error"), _environ(settings))
    return done.returncode, done.stdout + done.stderr


def _serve(level: str) -> list[str]:
    return ["serve", "--port", "0", "--dev", "--log-level", level]


def _environ(settings: Mapping[str, object]) -> dict[str, str]:
    return os.environ | {f"POKEBRIDGE_{name.upper()}": str(v) for name, v in settings.items()}
