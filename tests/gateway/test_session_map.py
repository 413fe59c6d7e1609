"""The session map: many devices, limits, and disconnects that come late."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from pokebridge.gateway.session_map import SessionMap


@dataclass(eq=False)
class Socket:
    """Anything that belongs to a recipient."""

    recipient: str


def test_a_recipient_may_have_several_sessions() -> None:
    """All of a recipient's sessions are found, oldest first, and nobody else's."""
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
    for socket in sessions.find("bob"):
        sessions.remove(socket)
    assert len(sessions) == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=80), st.integers(1, 3))
def test_the_map_agrees_with_a_plain_list(operations: list[tuple[bool, int]], limit: int) -> None:
    """Under any adds and removes it holds what a list with the same limit would."""
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
