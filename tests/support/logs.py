"""What a test does to logging and to the counts of failures ends with the test."""

import logging
from collections.abc import Iterator

import pytest
import structlog

from pokebridge import border, supervisor


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """Undo what a command sets up for its process, which may be the tests' own.

    Its handler would hold on to a captured, and then closed, stderr.
    """
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    supervisor._pace.forget()
    supervisor.task_failures.clear()
    border.unforeseen.clear()
