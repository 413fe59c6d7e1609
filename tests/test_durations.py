"""The time that most pulls stay within."""

import pytest

from pokebridge.durations import BOUNDS_S, PULL, Durations, RequestDurations, p99_ms


def p99_of(durations_ms: list[float]) -> float:
    """What pulls that took so long come to."""
    times = Durations()
    for duration_ms in durations_ms:
        times.add(duration_ms / 1000)
    return p99_ms(times.counts)


def test_the_slowest_of_a_hundred_does_not_count() -> None:
    """99 of 100 stay within the figure, which lies between the bounds around them."""
    assert 3 < p99_of([4.0] * 99 + [900.0]) <= 5


def test_two_slow_ones_of_a_hundred_do() -> None:
    """Then it is the slow ones' time."""
    assert 500 < p99_of([4.0] * 98 + [900.0] * 2) <= 1000


@pytest.mark.parametrize(("given", "expected"), [([], 0.0), ([1e6], BOUNDS_S[-1] * 1000)])
def test_the_ends(given: list[float], expected: float) -> None:
    """Nothing was pulled; all took longer than the last bound can tell."""
    assert p99_of(given) == expected


def test_pulls_of_every_status_count_and_nothing_else() -> None:
    """The pull rate and the report see all pulls, and no other request."""
    requests = RequestDurations()
    requests.by_labels[*PULL, "200"].add(0.004)
    requests.by_labels[*PULL, "304"].add(0.001)
    requests.by_labels["POST", "/v1/messages", "202"].add(3.0)
    pulls = requests.pulls()
    assert sum(pulls.counts) == 2
    assert pulls.sum_s == pytest.approx(0.005)
    assert pulls.up_to((0.001, 0.0025, 0.005)) == [1, 1, 2]
