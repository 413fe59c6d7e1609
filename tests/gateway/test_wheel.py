"""The timing wheel, turned by hand."""

from hypothesis import given
from hypothesis import strategies as st

from pokebridge.gateway.wheel import Wheel
from pokebridge.supervisor import task_failures


class Item:
    """Something with a deadline, that notes when it was woken."""

    def __init__(self) -> None:
        self.wheel_slot = 0
        self.woken: list[float] = []

    def wake(self, now: float) -> None:
        """Note it."""
        self.woken.append(now)


@given(st.lists(st.floats(0.01, 50), min_size=1, max_size=30), st.floats(0.05, 1))
def test_never_early_and_at_most_a_tick_late(deadlines: list[float], tick_s: float) -> None:
    """Each deadline is met once, not before it and within two ticks of it."""
    wheel = Wheel(tick_s)
    items = [(at, Item()) for at in deadlines]
    for at, item in items:
        wheel.schedule(item, at)
    turns = int(60 / tick_s)
    for turn in range(1, turns):
        wheel.advance(turn * tick_s)
    for at, item in items:
        (woken,) = item.woken
        assert at - 1e-6 <= woken <= at + 2 * tick_s + 1e-6


def test_a_new_deadline_replaces_the_old() -> None:
    """Scheduling again, earlier or later, leaves one deadline."""
    wheel, item = Wheel(1), Item()
    wheel.schedule(item, 10)
    wheel.schedule(item, 3)
    wheel.schedule(item, 5)
    wheel.advance(4)
    assert item.woken == []
    wheel.advance(20)
    assert item.woken == [20]


def test_a_defect_of_one_item_stops_no_other() -> None:
    """The other items of its slot are still woken, and the wheel continues."""

    class Defect(Item):
        def wake(self, now: float) -> None:
            raise TypeError("a defect")

    wheel, items = Wheel(1), [Defect(), *(Item() for _ in range(20)), Defect()]
    for item in items:
        wheel.schedule(item, 3)
    wheel.advance(4)
    assert all(item.woken == [4] for item in items if type(item) is Item)
    assert task_failures["wheel"] == 2


def test_what_is_cancelled_is_not_woken() -> None:
    """Neither cancelled before, nor by another item in the same slot."""
    wheel, item, other = Wheel(1), Item(), Item()
    wheel.schedule(item, 2)
    wheel.cancel(item)
    wheel.cancel(item)

    class Killer(Item):
        def wake(self, now: float) -> None:
            for victim in (first, second):
                if victim is not self:
                    wheel.cancel(victim)
            super().wake(now)

    first, second = Killer(), Killer()
    wheel.schedule(first, 3)
    wheel.schedule(second, 3)
    wheel.schedule(other, 3)
    wheel.advance(10)
    assert item.woken == []
    assert len(first.woken) + len(second.woken) == 1
    assert other.woken == [10]


def test_an_item_may_schedule_itself_when_woken() -> None:
    """A deadline set in ``wake`` is met at the next turn that passes it, not in the same."""
    wheel = Wheel(1)

    class Repeating(Item):
        def wake(self, now: float) -> None:
            super().wake(now)
            wheel.schedule(self, now + 2)

    item = Repeating()
    wheel.schedule(item, 1)
    for now in range(1, 8):
        wheel.advance(now)
    assert item.woken == [1, 3, 5, 7]
