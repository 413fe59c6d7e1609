"""A client that listens to more than its own recipient, against a bridge in this process."""

import asyncio
from collections.abc import Sequence

import msgspec
import pytest

from pokebridge.client import PokeClient, ReceivedMessage, core
from pokebridge.errors import ForbiddenError, InputError
from pokebridge.session import Timing
from tests.api.test_waiting import World, serving
from tests.client.middlebox import Middlebox
from tests.client.test_transports import QUICK
from tests.gateway.harness import BOB, token
from tests.support.waiting import wait_until

DOC, TEAM = "urn:doc:7", "urn:team:3"
LISTENS = Timing(max_listened=2)


class Inbox:
    """The bodies that came."""

    def __init__(self) -> None:
        self.got: list[object] = []

    async def __call__(self, messages: Sequence[ReceivedMessage]) -> None:
        """Keep them."""
        self.got += [message.body for message in messages]


class Pulls:
    """Counts the calls of ``on_poke``."""

    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self, cursor: int) -> None:
        """Count."""
        self.calls += 1


def client_of(world: World, inbox: Inbox, url: str = "") -> PokeClient:
    """Bob's client."""
    url = url or f"http://127.0.0.1:{world.server.port}"
    return PokeClient(url, token(BOB), inbox, policy=QUICK)


async def hears(world: World, inbox: Inbox, body: str, recipient: str = DOC) -> None:
    """A message for the recipient arrives."""
    await world.commit(f'"{body}"'.encode(), recipient)
    await wait_until(lambda: inbox.got[-1:] == [body], what=f"{body}, not {inbox.got}")


async def test_one_socket_brings_all_that_a_client_listens_to() -> None:
    """Each recipient is pulled with its own token and cursor, until it is closed."""
    async with serving(timing=LISTENS) as world:
        own, doc, team = Inbox(), Inbox(), Pulls()
        await world.commit(b'"before"', DOC)
        async with client_of(world, own) as client:
            listening = client.listen(DOC, token(DOC), doc)
            async with client.listen(TEAM, token(TEAM), on_poke=team) as other:
                await listening.wait_ready(10)
                await other.wait_ready(10)
                assert doc.got == ["before"] or not listening.cursor
                await hears(world, doc, "of the doc")
                await hears(world, own, "of bob", BOB)
                calls = team.calls
                await world.server.poke(TEAM)
                await wait_until(lambda: team.calls > calls)
                sessions = world.server.gateway.sessions
                assert (len(sessions), sessions.listened) == (1, 2)
                assert doc.got == ["before", "of the doc"]
                assert listening.cursor == 2
            await wait_until(lambda: sessions.listened == 1)
            await listening.close()
            await wait_until(lambda: sessions.listened == 0)
            await world.commit(b'"unheard"', DOC)
            await hears(world, own, "heard", BOB)
            assert doc.got == ["before", "of the doc"]


async def test_it_listens_again_in_each_new_session() -> None:
    """After the socket broke: what came meanwhile is pulled, and pokes arrive again."""
    async with serving(timing=LISTENS) as world:
        own, doc = Inbox(), Inbox()
        async with client_of(world, own) as client:
            listening = client.listen(DOC, token(DOC), doc)
            for life in range(3):
                await listening.wait_ready(10)
                await hears(world, doc, f"in life {life}")
                (connection,) = world.server.connections
                connection.abort()
                await wait_until(lambda: connection not in world.server.connections)  # noqa: B023 - called here
                await world.commit(f'"after life {life}"'.encode(), DOC)
                await wait_until(lambda: doc.got[-1:] == [f"after life {life}"])  # noqa: B023 - called here


async def test_it_listens_where_no_websocket_gets_through() -> None:
    """Over the polled session, and again over the socket that comes later."""
    async with (
        serving(timing=LISTENS) as world,
        Middlebox(world.server.port, "refuse").run() as box,
    ):
        own, doc = Inbox(), Inbox()
        async with client_of(world, own, box.url) as client:
            listening = client.listen(DOC, token(DOC), doc)
            await wait_until(lambda: client.polls and listening.connected)
            await hears(world, doc, "over HTTP")
            assert len(world.server.gateway.sessions) == 1
            box.mode = "pass"
            await wait_until(lambda: not client.polls and listening.connected)
            await hears(world, doc, "through a socket")
            await wait_until(lambda: len(world.server.gateway.sessions) == 1)


@pytest.mark.parametrize("at_most", [0, 1])
async def test_what_the_socket_does_not_carry_has_one_of_its_own(at_most: int) -> None:
    """At an instance that carries none, as release 0.1.0, or one too few."""
    async with serving(timing=Timing(max_listened=at_most)) as world:
        own, doc, team = Inbox(), Inbox(), Inbox()
        async with client_of(world, own) as client:
            for listening in (
                client.listen(DOC, token(DOC), doc),
                client.listen(TEAM, token(TEAM), team),
            ):
                await listening.wait_ready(10)
            sessions = world.server.gateway.sessions
            assert (len(sessions), sessions.listened) == (3 - at_most, at_most)
            await hears(world, doc, "of the doc")
            await hears(world, team, "of the team", TEAM)
            await hears(world, own, "of bob", BOB)
        await wait_until(lambda: not len(sessions))


async def test_a_refusal_concerns_one_recipient() -> None:
    """A token of another recipient stops what listens with it, and nothing else."""
    async with serving(timing=LISTENS) as world:
        own, doc = Inbox(), Inbox()
        async with client_of(world, own) as client:
            wrong = client.listen(TEAM, token(DOC), Inbox())
            assert await wrong.wait_stopped() == 4403
            with pytest.raises(ForbiddenError):
                await wrong.wait_ready(10)
            await wrong.close()
            await client.listen(DOC, token(DOC), doc).wait_ready(10)
            await hears(world, doc, "heard")
            await hears(world, own, "heard too", BOB)


async def test_a_token_is_renewed_before_it_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused token is fetched again, too, as a client's own token is."""
    monkeypatch.setattr(core, "MIN_TOKEN_REST_S", 0.1)
    async with serving(timing=LISTENS) as world:
        own, doc, fetched = Inbox(), Inbox(), 0

        async def new_token() -> str:
            nonlocal fetched
            fetched += 1
            return "x.y.z" if fetched == 1 else token(DOC, ttl_s=2.9)

        async with client_of(world, own) as client:
            listening = client.listen(DOC, new_token, doc)
            await listening.wait_ready(10)
            assert fetched == 2
            (heard,) = world.server.gateway.sessions.find(DOC)
            await wait_until(lambda: fetched == 3)
            await hears(world, doc, "with the new token")
            assert world.server.gateway.sessions.find(DOC) == (heard,)


async def test_a_wake_concerns_all_of_it() -> None:
    """All delays end at once, also those of further recipients."""
    async with serving(timing=LISTENS) as world:
        fetched = 0

        async def get_token() -> str:
            nonlocal fetched
            fetched += 1
            if fetched == 1:
                raise ConnectionError("no network")
            return token(DOC)

        patient = msgspec.structs.replace(QUICK, base_s=1e9, cap_s=1e9)
        url = f"http://127.0.0.1:{world.server.port}"
        async with PokeClient(url, token(BOB), Inbox(), policy=patient) as client:
            listening = client.listen(DOC, get_token, Inbox())

            def is_connected_after_a_wake() -> bool:
                client.wake()
                return listening.connected

            await wait_until(is_connected_after_a_wake)


async def test_what_stops_the_client_stops_all_of_it() -> None:
    """A client that is replaced listens to nothing any more."""
    async with serving(timing=LISTENS, max_sessions_per_recipient=1) as world:
        async with client_of(world, Inbox()) as client:
            listening = client.listen(DOC, token(DOC), Inbox())
            await listening.wait_ready(10)
            await world.server.open(BOB)
            assert await client.wait_stopped() == 4409
            assert await listening.wait_stopped() == 4409
        await wait_until(lambda: not world.server.gateway.sessions.listened)


async def test_a_wrong_call_says_what_is_wrong() -> None:
    """No recipient, the same one twice, no handler, and a client that does not run yet."""
    async with serving(timing=LISTENS) as world:
        idle = client_of(world, Inbox())
        with pytest.raises(RuntimeError, match="enter the client"):
            idle.listen(DOC, token(DOC), Inbox())
        async with idle as client:
            with pytest.raises(InputError):
                client.listen("two words", token(DOC), Inbox())
            with pytest.raises(TypeError, match="either on_messages or on_poke"):
                client.listen(DOC, token(DOC))
            client.listen(DOC, token(DOC), Inbox())
            with pytest.raises(ValueError, match="already"):
                client.listen(DOC, token(DOC), Inbox())
            await asyncio.sleep(0)
