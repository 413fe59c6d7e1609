"""What is told of the changes between two views of a cluster."""

from collections.abc import Mapping
from dataclasses import replace

from pokebridge.cluster.history import KEPT, History
from pokebridge.cluster.membership import View
from pokebridge.coordination.base import Member, Report
from pokebridge.model import Mode
from pokebridge.placement import ShardMap

NOW_S = 1_700_000_000.0


def member(
    name: str, *, life: str = "1", state: str = "active", gaps: int = 0, epoch: int = 1
) -> Member:
    """One that joined long ago."""
    return Member(name, "", life, 1.0, 5, state=state, report=Report(epoch=epoch, gaps=gaps))


def view(
    members: Mapping[str, Member] | list[Member],
    owners: str,
    *,
    epoch: int = 1,
    mode: Mode = "fanout",
    draining: frozenset[str] = frozenset(),
) -> View:
    """A cluster; ``owners`` has a letter a shard, a dot for none."""
    listed = members if isinstance(members, list) else list(members.values())
    owned = tuple(None if letter == "." else letter for letter in owners)
    return View(ShardMap(epoch, mode, owned, draining), {each.id: each for each in listed})


def told(*views: View) -> list[tuple[str, str]]:
    """Kinds and texts of what the last of ``views`` brought."""
    history = History(lambda: NOW_S)
    for each in views[:-1]:
        history.add(each)
    return [(event.kind, event.text) for event in history.add(views[-1])]


def test_the_first_view_tells_who_is_there() -> None:
    """Those that were there before joined when they say they did; nothing has moved."""
    history = History(lambda: NOW_S)
    first = history.add(view([member("a"), member("b")], "ab"))
    assert [(each.id, each.at_ms) for each in first] == [("joined:a:1", 5), ("joined:b:1", 5)]


def test_joining_restarting_and_moving() -> None:
    """The history tells who joined or restarted, and how many shards moved between whom."""
    before = view([member("a"), member("b")], "aab.")
    after = view([member("a"), member("b", life="2"), member("c")], "cabc", epoch=2)
    assert told(before, after) == [
        ("joined", "b came back, restarted"),
        ("joined", "c joined"),
        ("moved", "2 shards moved: 1 from a to c, 1 from nobody to c"),
    ]


def test_dying_is_not_leaving() -> None:
    """Who drained before it went has left; anybody else has died."""
    before = view(
        [member("a"), member("b"), member("c", state="draining"), member("d")],
        "aaaa",
        draining=frozenset("d"),
    )
    assert told(before, view([member("a")], "aaaa")) == [
        ("died", "b died: its lease was not renewed"),
        ("left", "c left, after it had drained"),
        ("left", "d left, after it had drained"),
    ]


def test_a_drain_is_told_once() -> None:
    """When the map says so; not again when the instance itself does."""
    active, draining = member("a"), member("a", state="draining")
    marked = view([active], "a", draining=frozenset("a"))
    assert [kind for kind, _ in told(view([active], "a"), marked)] == ["draining"]
    assert told(view([active], "a"), marked, view([draining], "a", epoch=2)) == []


def test_gaps_are_told_of_the_same_life() -> None:
    """A growing count is a gap. A count that restarts from zero is not."""
    had = view([member("a", gaps=2), member("b", gaps=5)], "a")
    has = view([member("a", gaps=3), member("b", life="2", gaps=6)], "a")
    assert {kind for kind, _ in told(had, has)} == {"gap", "joined"}
    assert [text for kind, text in told(had, has) if kind == "gap"] == [
        "a had 1 gap in the transport: every session concerned was poked"
    ]


def test_a_migration_begins_and_ends() -> None:
    """It has ended when every member has settled on the map that began it."""
    old = view([member("a"), member("b")], "ab")
    began = view([member("a"), member("b")], "ab", epoch=2, mode="partitioned")
    a, b = member("a", epoch=2), member("b", epoch=2)
    unsettled = replace(b, report=replace(b.report, settled=False))
    half = view([a, unsettled], "ab", epoch=2, mode="partitioned")
    done = view([a, b], "ab", epoch=2, mode="partitioned")
    assert told(old, began) == [("migrating", "migrating to partitioned mode")]
    assert told(old, began, half) == []
    assert told(old, began, half, done) == [
        ("migrated", "migrated: all instances are in partitioned mode")
    ]
    assert told(old, began, half, done, done) == []


def test_two_instances_give_an_event_the_same_id() -> None:
    """Whenever each of them saw it."""
    before = view([member("a"), member("b")], "ab")
    after = view([member("a")], "aa", epoch=2)
    early, late = History(lambda: NOW_S), History(lambda: NOW_S + 3)
    for history in (early, late):
        history.add(before)
        history.add(after)
    assert [each.id for each in early] == [each.id for each in late]
    assert [each.id for each in early][-2:] == ["died:b:1", "moved:2:died:b:1"]


def test_an_owner_that_comes_and_goes_is_told_every_time() -> None:
    """Also with a ring, where the epoch stays and the owners may: the entries' ids differ."""
    history = History(lambda: NOW_S)
    for life in "123":
        history.add(view([member("a")], "aa"))
        history.add(view([member("a"), member("b", life=life)], "ab"))
    ids = [each.id for each in history]
    assert len(set(ids)) == len(ids)


def test_only_the_newest_are_kept() -> None:
    """The oldest entries are dropped, and the ids continue."""
    history = History(lambda: NOW_S)
    for life in range(KEPT + 10):
        history.add(view([member("a", life=str(life))], "a"))
    assert history.count == KEPT + 10
    assert len(list(history)) == KEPT
