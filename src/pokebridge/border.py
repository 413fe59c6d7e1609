"""How unforeseen errors are reported where bytes from outside enter.

HTTP, handshakes, frames, signals, the queue and key sets each have one guard. It answers or drops
the input that raised such an error like any invalid input, and calls ``note_unforeseen``. Nothing
else in the process is affected. No traceback is logged, because strangers could fill the log with
them.

Settings and commands have one guard each as well. They answer with one line on stderr, so they
call ``describe_unforeseen``, which logs nothing.

The counts belong to the process, as its metrics do.
"""

from collections import Counter
from contextlib import suppress
from time import monotonic
from traceback import walk_tb
from typing import Final

import structlog

from pokebridge.telemetry import LogPace

LOG_AGAIN_S: Final = 1.0
"""One line a second for errors of one kind at one border. The count is of all."""
_FRAMES = 3
_FRAMES_IN_ERROR = 6

log = structlog.get_logger(__name__)

unforeseen: Counter[str] = Counter()
"""Unforeseen errors since the start, by border."""
_pace = LogPace(LOG_AGAIN_S)


def note_unforeseen(border: str, error: BaseException) -> None:
    """Count an unforeseen ``error`` at ``border``, and log where it was raised. Never raises."""
    unforeseen[border] += 1
    with suppress(Exception):
        place = _place(error, _FRAMES)
        if not _pace.allows((border, type(error).__name__, place), monotonic()):
            return
        # Not the error's text, which may repeat what the stranger sent.
        log.error(
            "unforeseen_input",
            border=border,
            error=type(error).__name__,
            place=place,
            count=unforeseen[border],
        )


def describe_unforeseen(border: str, error: BaseException) -> str:
    """Count an unforeseen ``error`` at ``border``. Returns a line about it, for people.

    The line omits the error's text, which may repeat a secret.
    """
    unforeseen[border] += 1
    place = _place(error, _FRAMES_IN_ERROR)
    return f"a defect of pokebridge, please report it: {type(error).__name__} at {place}"


def _place(error: BaseException, frames: int) -> str:
    """The innermost calls, the last one first, like ``wire.py:120 < bridge.py:80``."""
    calls = [
        f"{frame.f_code.co_filename.rpartition('/')[2]}:{line}"
        for frame, line in walk_tb(error.__traceback__)
    ]
    return " < ".join(calls[: -frames - 1 : -1])
