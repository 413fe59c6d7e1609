"""The asyncio client on networks that break WebSockets: it polls, and comes back to a socket."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from pokebridge.client import PokeClient, Policy, ReceivedMessage
from tests.api.test_waiting import World, serving
from tests.client.middlebox import Middlebox, Mode
from tests.client.switching import switch_under_traffic
from tests.gateway.harness import BOB, token
from tests.support import Serve
from tests.support.waiting import wait_until

QUICK = Policy(
    base_s=0.01,
    cap_s=0.05,
    poll_after_s=300.0,  # what arrives is poked
    idle_pull_s=3000.0,
    open_within_s=1.0,
    ready_within_s=0.5,
    try_base_s=0.02,
    try_cap_s=0.05,
)


class Between:
    """A bridge, what breaks WebSockets before it, and the bodies that a client has got."""

    def __init__(self, world: World, box: Middlebox) -> None:
        self.world = world
        self.box = box
        self.got: list[object] = []

    async def keep(self, messages: Sequence[ReceivedMessage]) -> None:
        """Keep what came."""
        self.got += [message.body for message in messages]

    def client(self, policy: Policy = QUICK) -> PokeClient:
        """A client that chooses its transport."""
        return PokeClient(self.box.url, token(BOB), self.keep, policy=policy)


@asynccontextmanager
async def between(mode: Mode) -> AsyncIterator[Between]:
    """A bridge behind a box with ``mode``."""
    async with serving() as world, Middlebox(world.server.port, mode).run() as box:
        yield Between(world, box)


@pytest.mark.parametrize("mode", ["refuse", "kill", "buffer"])
async def test_where_no_websocket_gets_through_it_polls(mode: Mode) -> None:
    """A message is poked and pulled, and once the network lets sockets pass there is one again."""
    async with between(mode) as it, it.client() as client:
        await wait_until(lambda: client.polls and client.connected)
        await it.world.commit(b'"over HTTP"')
        await wait_until(lambda: it.got == ["over HTTP"])
        it.box.mode = "pass"
        await wait_until(lambda: client.connected and not client.polls)
        await it.world.commit(b'"through a socket"')
        await wait_until(lambda: it.got == ["over HTTP", "through a socket"])


async def test_a_token_that_is_refused_in_a_header_goes_into_the_query() -> None:
    """Once HTTP is known to work the next WebSocket carries its token in another way."""
    async with between("token") as it, it.client() as client:
        await wait_until(lambda: client.connected and not client.polls)
        await it.world.commit(b'"hello"')
        await wait_until(lambda: it.got == ["hello"])


async def test_no_message_is_missed_while_it_switches() -> None:
    """Changes between the two, each in the midst of traffic: all messages come, once, in order."""
    sent = 0
    async with between("pass") as it, it.client() as client:

        async def send() -> None:
            nonlocal sent
            while True:
                await it.world.commit(b"%d" % sent)
                sent += 1
                await asyncio.sleep(0.003)

        sending = asyncio.create_task(send())
        for number in range(10):
            polls = number % 2 == 0
            it.box.mode = "refuse" if polls else "pass"
            if polls:
                it.box.cut()
            await wait_until(lambda: client.connected and client.polls is polls)  # noqa: B023 - called here
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        await wait_until(lambda: len(it.got) >= sent)
        assert it.got == list(range(len(it.got)))


@pytest.mark.long
async def test_no_message_is_missed_while_the_bridge_comes_and_goes(
    serve: Serve,
) -> None:
    """A hundred changes under traffic, and the instance killed and drained: all come, in order."""
    instance = await asyncio.to_thread(serve, mailbox="sqlite:///mailbox.db", drain_s=0.1)
    got: list[object] = []

    async def keep(messages: Sequence[ReceivedMessage]) -> None:
        got.extend(message.body for message in messages)

    async with (
        Middlebox(instance.port, "pass").run() as box,
        PokeClient(box.url, instance.token(BOB), keep, policy=QUICK) as client,
    ):

        async def until_it_polls(polls: bool) -> None:  # noqa: FBT001 - a callback
            await wait_until(lambda: client.connected and client.polls is polls)

        sent = await switch_under_traffic(instance, box, BOB, until_it_polls)
        await wait_until(lambda: len(got) >= sent)
        assert got == list(range(sent))
