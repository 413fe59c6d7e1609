"""The random pauses of every retry and of every periodic task."""

import random

import pytest

from pokebridge.backoff import backoff_s, spread


@pytest.fixture
def at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every random number be the largest that may come."""
    monkeypatch.setattr(random, "uniform", lambda _least, most: most)


@pytest.mark.usefixtures("at_most")
def test_the_longest_pause_doubles_up_to_the_cap() -> None:
    """No number of failures makes a pause longer than the cap, or an overflow."""
    pauses = [backoff_s(failures, first_s=0.1, cap_s=1.0) for failures in (0, 1, 2, 3, 4, 100_000)]
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])


def test_a_pause_stays_random_at_the_cap() -> None:
    """The jitter comes after the cap, so that a long outage does not put everybody in step."""
    pauses = [backoff_s(50, first_s=0.1, cap_s=1.0) for _ in range(200)]
    assert min(pauses) < 0.5 < max(pauses) <= 1.0
    assert min(backoff_s(50, first_s=0.1, cap_s=1.0, least=0.5) for _ in range(200)) >= 0.5


def test_spread_stays_within_its_bounds() -> None:
    """A spread interval is random and stays within its bounds."""
    spreads = [spread(10.0, 0.8, 1.2) for _ in range(200)]
    assert 8.0 <= min(spreads) < 10.0 < max(spreads) <= 12.0
