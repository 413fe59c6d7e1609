"""The watch on the red line: crossed and left, and never flapping."""

import math
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pokebridge.red_line import LOG_RULES, MIGRATE_RULES, RedLineWatch, WatchRules

RULES = WatchRules(over_for_s=10, under_for_s=30, leave_at=0.8)


def test_the_line_is_crossed_and_left_once() -> None:
    """Over it for ten seconds crosses; under 80% for thirty leaves; each is told once."""
    watch = RedLineWatch(5000, RULES)
    seen = {
        second: crossing
        for second in range(120)
        if (crossing := watch.observe(6000 if 10 <= second < 50 else 1000, float(second)))
    }
    assert seen == {20: "crossed", 80: "left"}
    assert not watch.over


def test_a_short_peak_does_not_cross() -> None:
    """One figure at the line restarts the time."""
    watch = RedLineWatch(5000, RULES)
    for second in range(100):
        assert watch.observe(5000 if second % 10 == 9 else 9000, float(second)) is None
    assert not watch.over


def test_between_the_marks_nothing_changes() -> None:
    """From 80% of the line to the line itself, over stays over and under stays under."""
    watch = RedLineWatch(5000, RULES)
    for second in range(100):
        assert watch.observe(4000 + 10.0 * second, float(second)) is None
    watch.observe(9000, 100.0)
    assert watch.observe(9000, 110.0) == "crossed"
    for second in range(200, 300):
        assert watch.observe(4000 + 10.0 * (second - 200), float(second)) is None
    assert watch.over


def test_a_rising_and_falling_load_migrates_once_and_back_once() -> None:
    """With the rules for migrating, an hour up and two hours down, noisy at every moment."""
    watch = RedLineWatch(5000, MIGRATE_RULES)
    seen = []
    for second in range(4 * 3600):
        trend = second / 3600 if second < 3600 else max(0.0, 1 - (second - 3600) / 7200)
        noise = 1 + 0.1 * math.sin(second) * math.cos(second / 7)
        if crossing := watch.observe(10_000 * trend * noise, float(second)):
            seen.append((crossing, second))
    assert [crossing for crossing, _ in seen] == ["crossed", "left"]
    (_, crossed_s), (_, left_s) = seen
    assert 1600 + MIGRATE_RULES.over_for_s < crossed_s < 2000 + MIGRATE_RULES.over_for_s
    assert 8600 + MIGRATE_RULES.under_for_s < left_s < 9400 + MIGRATE_RULES.under_for_s


@given(
    st.lists(st.tuples(st.floats(0, 20_000), st.floats(0, 100)), max_size=200),
    st.sampled_from([RULES, LOG_RULES, MIGRATE_RULES]),
)
def test_it_never_flaps(figures: list[tuple[float, float]], rules: WatchRules) -> None:
    """Whatever the figures, it alternates, and not before the time for it has passed."""
    watch, now = RedLineWatch(5000, rules), 0.0
    seen = []
    for ops_per_s, passed_s in figures:
        now += passed_s
        if crossing := watch.observe(ops_per_s, now):
            seen.append((crossing, now))
            assert watch.over == (crossing == "crossed")
            assert (ops_per_s > 5000) == watch.over
    assert [crossing for crossing, _ in seen] == ["crossed", "left"] * (len(seen) // 2) + [
        "crossed"
    ] * (len(seen) % 2)
    for (_, before), (crossing, after) in pairwise(seen):
        needed_s = rules.over_for_s if crossing == "crossed" else rules.under_for_s
        assert after - before >= needed_s - 1e-6
