"""How long somebody was silent in a test. ``python -m tests.silences`` prints the table."""

from collections.abc import Callable
from time import monotonic

import pytest

Silence = Callable[[str], Callable[[], None]]
"""Begins a silence that ``fault`` causes. What it returns is called when the silence is over."""


@pytest.fixture
def silence(record_property: Callable[[str, object], None]) -> Silence:
    """Note silences in the test's report: the fault, and how long it lasted (s)."""

    def begin(fault: str) -> Callable[[], None]:
        began_s = monotonic()
        return lambda: record_property(fault, monotonic() - began_s)

    return begin
