"""The session map: many devices, limits, and disconnects that come late."""

import time
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from pokebridge.gateway.session_map import FEW, SessionMap


@dataclass(eq=False)
class Socket:
    """Anything that belongs to a recipient."""

    recipient: str
    is_session: bool = True


def test_a_recipient_may_have_several_sessions() -> None:
    """Exactly the recipient's sessions are found, oldest first."""
    sessions = SessionMap[Socket](64)
    one, two, other = Socket("bob"), Socket("bob"), Socket("eve")
    for socket in (one, two, other):
        assert sessions.add(socket) is None
    assert sessions.find("bob") == (one, two)
    assert sessions.find("eve") == (other,)
    assert sessions.find("nobody") == ()
    assert (len(sessions), sessions.recipients) == (3, 2)


def test_a_stale_disconnect_cannot_evict_a_newer_session() -> None:
    """Removing twice, or removing one that was replaced, leaves the newer one in place."""
    sessions = SessionMap[Socket](1)
    old, new = Socket("bob"), Socket("bob")
    sessions.add(old)
    assert sessions.add(new) is old
    assert not sessions.remove(old)
    assert sessions.find("bob") == (new,)
    assert sessions.remove(new)
    assert not sessions.remove(new)
    assert (len(sessions), sessions.recipients) == (0, 0)


def test_sessions_may_end_while_their_recipient_is_poked() -> None:
    """A caller may remove sessions while it iterates over those it found."""
    sessions = SessionMap[Socket](64)
    for _ in range(5):
        sessions.add(Socket("bob"))
    for socket in tuple(sessions.find("bob")):
        sessions.remove(socket)
    assert len(sessions) == 0


def test_a_user_has_a_limit_and_a_group_has_none() -> None:
    """A group is told by how its recipient begins."""
    sessions = SessionMap[Socket](2, ("urn:room:", "urn:doc:"))
    for recipient in ("urn:room:7", "urn:doc:1", "urn:user:bob", "urn:room"):
        replaced = [sessions.add(Socket(recipient)) for _ in range(3 * FEW)]
        is_group = recipient in {"urn:room:7", "urn:doc:1"}
        assert replaced.count(None) == (3 * FEW if is_group else 2)
        assert len(sessions.find(recipient)) == (3 * FEW if is_group else 2)


def change_cpu_s(size: int) -> float:
    """The CPU time of replacing and finding 200 sessions of a group of ``size``, one by one."""
    sessions = SessionMap[Socket](64, ("room",))
    crowd = [Socket("room") for _ in range(size)]
    for socket in crowd:
        sessions.add(socket)
    rounds = []
    for _ in range(5):
        started_s = time.thread_time()
        for number in range(200):
            socket = crowd[number * 7919 % size]
            sessions.remove(socket)
            assert len(sessions.find("room")) == size - 1
            sessions.add(socket)
        rounds.append(time.thread_time() - started_s)
    return min(rounds)


def test_a_large_group_costs_no_more_than_a_small_one() -> None:
    """To add, find and remove one of 10,000 takes as long as one of a hundred.

    If the sessions were copied, it would take a hundred times as long.
    """
    assert change_cpu_s(10_000) < 20 * change_cpu_s(100)


def test_who_listens_from_another_session_is_found_and_not_counted() -> None:
    """The limit, and the length, are for the sessions of the recipient itself."""
    sessions = SessionMap[Socket](1)
    listeners = [Socket("doc", is_session=False) for _ in range(3)]
    for each in listeners:
        assert sessions.add(each) is None
    old, new = Socket("doc"), Socket("doc")
    assert sessions.add(old) is None
    assert sessions.add(new) is old
    assert list(sessions.find("doc")) == [*listeners, new]
    assert (len(sessions), sessions.listened, sessions.recipients) == (1, 3, 1)
    assert sessions.remove(listeners[1])
    assert (len(sessions), sessions.listened) == (1, 2)


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=80),
    st.sampled_from([1, 2, 3, FEW, FEW + 2]),
)
def test_the_map_agrees_with_a_plain_list(operations: list[tuple[bool, int]], limit: int) -> None:
    """After any adds and removes it holds the same as a list with the same limit."""
    sessions = SessionMap[Socket](limit)
    model: list[Socket] = []
    for add, who in operations:
        mine = [socket for socket in model if socket.recipient == str(who)]
        if add:
            socket = Socket(str(who))
            expected = mine[0] if len(mine) == limit else None
            assert sessions.add(socket) is expected
            model = [other for other in model if other is not expected] + [socket]
        elif mine:
            assert sessions.remove(mine[-1])
            model.remove(mine[-1])
        assert len(sessions) == len(model)
        assert set(sessions) == set(model)
