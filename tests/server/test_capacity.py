"""The rate of pulls follows what the instance bears."""

import pytest

from pokebridge.durations import Durations
from pokebridge.server.capacity import LEAST_PER_S, MOST_PER_S, START_PER_S, PullCapacity


class Instance:
    """Its pulls since its start, and the capacity that it makes of them."""

    def __init__(self) -> None:
        self.pulls = Durations()
        self.capacity = PullCapacity()

    def second(self, pulls: int, each_s: float) -> None:
        """A second in which so many pulls took so long each."""
        for _ in range(pulls):
            self.pulls.add(each_s)
        self.capacity.settle(self.pulls)


def test_it_grows_while_it_is_used_and_pulls_are_quick() -> None:
    """A full second of quick pulls raises it; an idle or half used one says nothing."""
    instance = Instance()
    instance.second(0, 0)
    instance.second(10, 0.001)
    assert instance.capacity.per_s == START_PER_S
    instance.second(int(START_PER_S), 0.001)
    assert instance.capacity.per_s > START_PER_S


def test_it_falls_at_once_when_pulls_are_slow() -> None:
    """One slow second is enough, however few pulls there were."""
    instance = Instance()
    instance.second(3, 2.0)
    assert instance.capacity.per_s < START_PER_S


@pytest.mark.parametrize(("each_s", "limit"), [(9.0, LEAST_PER_S), (0.0001, MOST_PER_S)])
def test_it_stays_within_its_limits(each_s: float, limit: float) -> None:
    """Neither an hour of failures nor one of successes takes it beyond its limits."""
    instance = Instance()
    for _ in range(40):
        instance.second(int(instance.capacity.per_s), each_s)
    assert instance.capacity.per_s == limit
