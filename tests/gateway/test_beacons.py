"""Beacons: numbers in, gaps out; who is silent, and who disagrees."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from pokebridge.gateway.beacons import (
    ALONE_S,
    FASTEST_S,
    FORGET_S,
    GAP_EVERY_S,
    HEARD_PER_S,
    LOGGED_CLUSTERS,
    MAX_PEERS,
    OLDER_BY_S,
    REORDER_S,
    SILENT_AFTER,
    UNHEARING_S,
    Beacons,
    group_prefixes_text,
)
from pokebridge.wire import MAX_BEACON_TEXT_CHARS, Beacon

LONG = 1000.0  # this instance has listened for so long


def beacon(sender: str = "two", number: int = 1, **other: Any) -> Beacon:
    """What an instance says that agrees with this one, and has just begun."""
    said = Beacon(
        sender=sender,
        incarnation="i",
        number=number,
        up_s=0.0,
        every_s=FASTEST_S,
        cluster="default",
        shard_count=100,
        carrier="filter",
        assignment="coordinator",
        group_prefixes="urn:room:",
    )
    return msgspec.structs.replace(said, **other)


def listening() -> Beacons:
    """An instance that began at 0."""
    beacons = Beacons(beacon("one"))
    beacons.begin(0.0)
    return beacons


def hear(beacons: Beacons, numbers: Iterable[int], now: float = LONG) -> None:
    """Beacons of one sender, all at once."""
    for number in numbers:
        beacons.hear(beacon(number=number), now)


class TestHoles:
    """What is missing is a gap, once."""

    def test_all_in_order_is_no_gap(self) -> None:
        """Nothing is missing, even when some come twice."""
        beacons = listening()
        hear(beacons, [1, 2, 2, 3, 1])
        assert beacons.step(LONG + REORDER_S) is None
        assert beacons.lost == 0

    def test_a_hole_is_a_gap_when_it_stays(self) -> None:
        """A missing number is no gap at first, because an engine may reorder.

        Then it is one gap.
        """
        beacons = listening()
        hear(beacons, [1, 5])
        assert beacons.step(LONG) is None
        assert beacons.step(LONG + REORDER_S) is not None
        assert beacons.step(LONG + GAP_EVERY_S + REORDER_S) is None
        assert beacons.lost == 3

    @given(st.permutations(range(1, 8)), st.sets(st.integers(2, 6)))
    def test_any_order_counts_exactly_what_is_missing(
        self, order: list[int], missing: set[int]
    ) -> None:
        """However they are reordered, the numbers that never come are lost and no others."""
        beacons = listening()
        hear(beacons, [1, *(number for number in order if number not in missing)])
        beacons.step(LONG + REORDER_S)
        assert beacons.lost == len(missing)

    def test_many_holes_are_few_gaps(self) -> None:
        """A route that loses half of everything causes a gap now and then."""
        beacons = listening()
        gaps = []
        for second in range(100):
            hear(beacons, [1 + 2 * second], LONG + second)
            if beacons.step(LONG + second) is not None:
                gaps.append(second)
        assert len(gaps) == pytest.approx(100 / GAP_EVERY_S, abs=1)
        assert beacons.step(LONG + 100 + GAP_EVERY_S) is not None

    def test_a_peer_that_was_here_before_is_no_gap(self) -> None:
        """An instance that has just begun takes the others' numbers as they are."""
        beacons = listening()
        beacons.hear(beacon(number=500, up_s=1000.0), 1.0)
        assert beacons.step(1.0 + REORDER_S) is None

    def test_a_peer_that_is_heard_late_is_a_gap(self) -> None:
        """It began while this one listened, or would long have been heard: its first are lost."""
        for number, up_s, now in ((3, 5.0, 20.0), (500, 1000.0, 20.0)):
            beacons = listening()
            beacons.hear(beacon(number=number, up_s=up_s), now)
            assert beacons.step(now + REORDER_S) is not None
            assert beacons.lost == number - 1

    def test_a_restart_begins_anew(self) -> None:
        """Another incarnation counts from 1, and two of one name do not disturb each other."""
        beacons = listening()
        for number in (1, 2, 3):
            for incarnation in ("i", "j"):
                beacons.hear(beacon(number=number, incarnation=incarnation), LONG)
        assert beacons.step(LONG + REORDER_S) is None

    def test_its_own_are_no_news(self) -> None:
        """What an instance hears of itself is not compared with anything."""
        beacons = listening()
        beacons.hear(beacon("one", number=7, shard_count=1), LONG)
        assert (beacons.step(LONG + REORDER_S), beacons.every_s) == (None, ALONE_S)

    def test_strangers_without_number_cost_no_memory(self) -> None:
        """Invented senders fill only a table of limited size."""
        beacons = listening()
        for number in range(MAX_PEERS + 10):
            beacons.hear(beacon(f"made-up-{number}"), LONG)
        assert beacons.every_s == MAX_PEERS / HEARD_PER_S


class TestPublishing:
    """When this instance speaks, and what it says."""

    def test_alone_it_says_little(self) -> None:
        """At the start, and then every ten seconds; at once faster when somebody else appears."""
        beacons = listening()
        assert beacons.next(0.0) is not None
        assert beacons.next(ALONE_S - 1) is None
        assert beacons.next(ALONE_S) is not None
        beacons.hear(beacon(), ALONE_S + FASTEST_S)
        assert beacons.next(ALONE_S + FASTEST_S) is not None

    def test_who_hears_nobody_says_little(self) -> None:
        """There may be many of those, and they can't know."""
        beacons = Beacons(beacon("one"))
        beacons.begin(0.0, hears=False)
        said = beacons.next(0.0)
        assert said is not None
        assert said.every_s == UNHEARING_S
        assert beacons.next(UNHEARING_S - 1) is None
        assert beacons.next(UNHEARING_S) is not None

    def test_many_are_heard_four_times_a_second(self) -> None:
        """With more instances each publishes less often."""
        beacons = listening()
        for number in range(50):
            beacons.hear(beacon(f"peer-{number}"), LONG)
        assert beacons.every_s == 50 / HEARD_PER_S

    def test_what_the_engine_refused_leaves_no_hole(self) -> None:
        """The number of a beacon that was not accepted is used again."""
        beacons = listening()
        refused = beacons.next(0.0)
        accepted = beacons.next(ALONE_S)
        assert refused is not None
        assert accepted is not None
        beacons.sent(accepted)
        assert (refused.number, accepted.number, beacons.farewell(0.0).number) == (1, 1, 2)


class TestSilence:
    """A member that renews its lease and is not heard."""

    def test_a_silent_member_is_counted_until_it_is_heard(self) -> None:
        """A member counts as silent after three missed beacons, until it is heard again."""
        beacons = listening()
        beacons.members = {"one", "two"}
        hear(beacons, [1])
        for away_s, silent in ((SILENT_AFTER * FASTEST_S, 0), (10 * FORGET_S, 1)):
            beacons.step(LONG + away_s)
            assert beacons.silent_members == silent
        hear(beacons, [2], LONG + 11 * FORGET_S)
        beacons.step(LONG + 11 * FORGET_S)
        assert beacons.silent_members == 0

    @pytest.mark.parametrize("count", [2, 400])
    def test_a_member_that_was_never_heard_is_silent_too(self, count: int) -> None:
        """It may use another engine. In a large cluster beacons are rare, so it takes longer."""
        beacons = listening()
        beacons.members = {"one", *(f"m{number}" for number in range(count - 1))}
        beacons.step(LONG)
        for late_s, silent in ((0.0, 0), (1.0, count - 1)):
            with capture_logs() as logs:
                beacons.step(LONG + SILENT_AFTER * max(ALONE_S, count / HEARD_PER_S) + late_s)
            assert beacons.silent_members == silent
            assert [line["count"] for line in logs] == [silent] * bool(silent)
        beacons.hear(beacon("m0"), LONG * 2)
        with capture_logs() as logs:
            beacons.step(LONG * 2)
        assert (beacons.silent_members, logs) == (count - 2, [])

    @pytest.mark.parametrize("members", [None, {"one"}])
    def test_who_has_left_is_forgotten(self, members: set[str] | None) -> None:
        """A sender that is no longer a member is forgotten soon, because it may have crashed."""
        beacons = listening()
        beacons.members = members
        hear(beacons, [1])
        beacons.step(LONG + FORGET_S)
        assert (beacons.silent_members, beacons.every_s) == (0, FASTEST_S)
        beacons.step(LONG + FORGET_S + 1)
        assert beacons.every_s == ALONE_S

    def test_who_says_farewell_is_not_missed(self) -> None:
        """Its last beacon says that there will be no other."""
        beacons = listening()
        beacons.members = {"one", "two"}
        hear(beacons, [1])
        beacons.hear(beacon(number=3, last=True), LONG)
        assert beacons.step(LONG + REORDER_S + 0.1) is not None
        assert beacons.every_s == ALONE_S


class TestDisagreement:
    """Settings that must be the same in a cluster."""

    @pytest.mark.parametrize(
        ("setting", "theirs"),
        [
            ("shard_count", 64),
            ("carrier", "topic"),
            ("assignment", "ring"),
            ("group_prefixes", ""),
            ("group_prefixes", "urn:doc:,urn:room:"),
        ],
    )
    def test_it_is_told_and_counted(self, setting: str, theirs: Any) -> None:
        """The younger instance is not ready, and names the setting and the other instance."""
        beacons = listening()
        beacons.hear(beacon(up_s=500.0, **{setting: theirs}), 100.0)
        assert beacons.disagreements[setting] == 1
        assert beacons.trouble is not None
        assert setting in beacons.trouble
        assert "'two'" in beacons.trouble

    @pytest.mark.parametrize("setting", ["assignment", "group_prefixes"])
    def test_who_does_not_tell_agrees(self, setting: str) -> None:
        """An instance that has no part in it, or that is too old to know it."""
        beacons = listening()
        silent: Any = {setting: None}
        beacons.hear(beacon(up_s=500.0, **silent), 100.0)
        assert beacons.disagreements[setting] == 0
        assert beacons.trouble is None

    @pytest.mark.parametrize(
        ("prefixes", "text"),
        [
            ([], ""),
            (["urn:room:", "urn:doc:", "urn:room:"], "urn:doc:,urn:room:"),
            (["urn:room:open:", "urn:room:", "urn:roof:", "urn:room:z"], "urn:roof:,urn:room:"),
        ],
    )
    def test_prefixes_that_mean_the_same_agree(self, prefixes: list[str], text: str) -> None:
        """In any order, and with those that another one includes."""
        assert group_prefixes_text(prefixes) == text

    def test_long_prefixes_are_compared_too(self) -> None:
        """As much as a beacon holds, and a digest."""
        ends = ("a", "b")
        texts = [group_prefixes_text(["x" * 200, f"y{'z' * 99}{end}"]) for end in ends]
        assert texts[0] != texts[1]
        assert {len(text) for text in texts} == {MAX_BEACON_TEXT_CHARS}

    def test_the_older_one_stays_ready(self) -> None:
        """One wrong instance must not take the whole cluster away. Together, both are wrong."""
        for began_at, is_ready in ((OLDER_BY_S - 1, False), (OLDER_BY_S + 1, True)):
            beacons = listening()
            beacons.hear(beacon(shard_count=64), began_at)
            assert (beacons.trouble is None) == is_ready
            assert beacons.disagreements["shard_count"] == 1

    def test_it_ends_with_the_other_instance(self) -> None:
        """When the wrong one has stopped, this one is ready again."""
        beacons = listening()
        beacons.hear(beacon(shard_count=64, last=True), 0.0)
        assert beacons.trouble is not None
        beacons.step(REORDER_S + 0.1)
        assert beacons.trouble is None

    @pytest.mark.parametrize(("theirs", "count"), [("", 0), ("file 1", 0), ("file 2", 1)])
    def test_another_mailbox_is_told(self, theirs: str, count: int) -> None:
        """It is logged once and counted while it lasts. An instance without a mailbox agrees."""
        beacons = listening()
        beacons.mailbox = lambda: "file 1"
        with capture_logs() as logs:
            for number in (1, 2):
                beacons.hear(beacon(number=number, mailbox=theirs), LONG)
        assert [line["setting"] for line in logs] == ["mailbox"] * count
        assert beacons.disagreements["mailbox"] == count
        assert beacons.trouble is None

    def test_a_namesake_is_told(self) -> None:
        """Another instance of the same name, but not the earlier life of this one."""
        beacons = listening()
        beacons.hear(beacon("one", incarnation="before"), OLDER_BY_S)
        assert beacons.disagreements["instance"] == 0
        with capture_logs() as logs:
            for number in (2, 3):
                beacons.hear(beacon("one", number, incarnation="before"), LONG)
        assert [line["setting"] for line in logs] == ["instance"]
        assert beacons.disagreements["instance"] == 1
        assert beacons.trouble is None

    def test_another_cluster_may_differ(self) -> None:
        """It is counted, since it should have subjects of its own, and it is no trouble."""
        beacons = listening()
        beacons.hear(beacon(cluster="blue", shard_count=64), 0.0)
        assert beacons.trouble is None
        assert beacons.disagreements == {"cluster": 1}

    def test_made_up_instances_do_not_fill_the_log(self) -> None:
        """A publisher could invent a thousand instances in a second."""
        beacons = listening()
        with capture_logs() as logs:
            for number in range(1000):
                beacons.hear(beacon(f"i{number}", shard_count=64), 0.0)
                beacons.hear(beacon(f"i{number}", cluster=f"c{number}"), 0.0)
        lines = Counter(line["event"] for line in logs)
        assert lines == {"settings_disagree": 1, "other_cluster_heard": LOGGED_CLUSTERS}
