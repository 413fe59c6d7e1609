"""Loops that survive every error, and log entries when a part fails and when it is back."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Final

import structlog

from pokebridge.backoff import backoff_s, spread
from pokebridge.errors import UnavailableError

BACKOFF_FIRST_S: Final = 0.1
BACKOFF_CAP_S: Final = 2.0

log = structlog.get_logger(__name__)


class Part:
    """A part that we depend on. Logs when it fails, and when it is back."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._down_since_s: float | None = None
        self._failed_s = 0.0

    @property
    def is_down(self) -> bool:
        """Whether the last call to it failed."""
        return self._down_since_s is not None

    def failed_within(self, span_s: float) -> bool:
        """Whether the last call to it failed, and did so within the last ``span_s`` seconds."""
        return self.is_down and monotonic() - self._failed_s < span_s

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch one call to the part."""
        try:
            yield
        except UnavailableError as error:
            self._failed_s = monotonic()
            if self._down_since_s is None:
                self._down_since_s = monotonic()
                log.warning("part_unavailable", part=self._name, error=str(error))
            raise
        if self._down_since_s is not None:
            down_s = round(monotonic() - self._down_since_s, 3)
            log.info("part_is_back", part=self._name, down_s=down_s)
            self._down_since_s = None


class Attempts:
    """The attempts of one loop. No error ends it. A growing pause follows each failure."""

    def __init__(self) -> None:
        self._failures = 0

    async def __call__(self, step: Awaitable[None]) -> bool:
        """Await ``step``. Returns whether it succeeded. Pauses first if it failed."""
        try:
            await step
        except UnavailableError:
            pass  # the part has logged it
        except Exception:  # a defect, too, is logged and survived: without the loop, silence
            log.exception("step_failed")
        else:
            self._failures = 0
            return True
        pause_s = backoff_s(self._failures, first_s=BACKOFF_FIRST_S, cap_s=BACKOFF_CAP_S)
        self._failures += 1
        await asyncio.sleep(pause_s)
        return False


async def keep_doing(step: Callable[[], Awaitable[None]], pause_s: float) -> None:
    """Do ``step`` again and again, with a jittered pause after each success. Runs until cancelled.

    The jitter, up to half of ``pause_s``, lets the loops of several processes drift apart.
    """
    attempt = Attempts()
    while True:
        if await attempt(step()):
            await asyncio.sleep(spread(pause_s))
