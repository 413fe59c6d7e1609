"""The port of a host: every connection that is accepted reaches a worker, however busy all are."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from pokebridge.server.door import Door
from tests.support.waiting import wait_until

CONNECTIONS = 300


class FullPlace:
    """A worker whose queue of connections is short, and which takes none until it is told to."""

    def __init__(self, opened: ExitStack) -> None:
        self.passed = 0
        self.taken: list[socket.socket] = []
        ours, self._its = socket.socketpair()
        self.door: socket.socket | None = opened.enter_context(ours)
        opened.enter_context(self._its)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel's least: a few
        ours.settimeout(0)
        self._its.settimeout(0)

    def take(self) -> None:
        """Take what waits."""
        while True:
            try:
                _, (fd,), _, _ = socket.recv_fds(self._its, 1, 1)
            except BlockingIOError:
                return
            self.taken.append(socket.socket(fileno=fd))


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """What is closed at the end."""
    with ExitStack() as stack:
        yield stack


async def test_no_connection_is_lost_when_all_queues_are_full(opened: ExitStack) -> None:
    """Those that fit nowhere wait; then each client finds itself at one worker, and once."""
    listener = opened.enter_context(socket.create_server(("127.0.0.1", 0), backlog=CONNECTIONS))
    places = [FullPlace(opened), FullPlace(opened)]
    door = Door(listener, lambda: iter(sorted(places, key=lambda place: place.passed)))
    door.open()
    clients = [socket.create_connection(listener.getsockname()) for _ in range(CONNECTIONS)]
    for client in clients:
        opened.enter_context(client)
    await wait_until(lambda: sum(place.passed for place in places) > 0)
    assert sum(place.passed for place in places) < CONNECTIONS, "the queues are full"

    def have_taken_all() -> bool:
        for place in places:
            place.take()
        return sum(len(place.taken) for place in places) == CONNECTIONS

    await wait_until(have_taken_all)
    door.close()
    taken = [sock for place in places for sock in place.taken]
    for sock in taken:
        opened.enter_context(sock)
    assert {sock.getpeername() for sock in taken} == {each.getsockname() for each in clients}
    assert abs(places[0].passed - places[1].passed) <= 1


async def test_a_connection_waits_until_a_worker_serves(opened: ExitStack) -> None:
    """All workers have died: a client that connects is served by the next one that starts."""
    listener = opened.enter_context(socket.create_server(("127.0.0.1", 0)))
    place, places = FullPlace(opened), list[FullPlace]()
    door = Door(listener, lambda: iter(places))
    door.open()
    client = opened.enter_context(socket.create_connection(listener.getsockname()))
    await asyncio.sleep(0)
    assert not place.passed
    places.append(place)
    door.retry()

    def has_taken() -> bool:
        place.take()
        return bool(place.taken)

    await wait_until(has_taken)
    door.close()
    (sock,) = place.taken
    assert opened.enter_context(sock).getpeername() == client.getsockname()
