"""Sessions that listen to more than their own recipient, over real sockets."""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from pokebridge.errors import KeysUnavailableError
from pokebridge.gateway.shard_routing import Reach
from pokebridge.model import Feed
from pokebridge.placement import ShardMap
from pokebridge.session import Timing
from pokebridge.sharding import shard_of
from pokebridge.tokens import TokenVerifier
from tests.gateway.harness import BOB, SECRET, Client, Running, running, token
from tests.support.waiting import wait_until

DOC, TEAM = "urn:doc:7", "urn:team:3"
LISTENS = Timing(max_listened=3)


def listen(client: Client, recipient: str, bearer: str | None = None) -> None:
    """Ask to hear a recipient."""
    client.say({"type": "listen", "recipient": recipient, "token": bearer or token(recipient)})


async def listening(server: Running, *recipients: str, **options: Any) -> Client:
    """A client that hears these as well."""
    client = await server.open(**options)
    for recipient in recipients:
        listen(client, recipient)
        answer = await client.message()
        assert (answer["type"], answer["recipient"]) == ("listening", recipient)
    return client


async def refused(client: Client, recipient: str | None = DOC) -> int:
    """The code with which the client does not hear the recipient."""
    answer = await client.message()
    assert answer["type"] == "unlistened"
    assert answer.get("recipient") == recipient
    assert answer["reason"]
    code: int = answer["code"]
    return code


async def still_serves(server: Running, client: Client) -> None:
    """The session goes on: it hears its own pokes."""
    await server.poke(BOB, 77)
    assert await client.message() == {"type": "poke", "version": 77}


async def test_a_session_hears_what_it_listens_to_until_it_does_not() -> None:
    """Pokes of further recipients name them. After ``unlisten`` none come."""
    async with running(LISTENS) as server:
        client = await server.connect()
        assert (await client.message())["listens"] == 3
        listen(client, DOC)
        answer = await client.message()
        assert answer == {
            "type": "listening",
            "recipient": DOC,
            "expires_in": pytest.approx(599, abs=2),
        }
        await server.poke(DOC, 5)
        assert await client.message() == {"type": "poke", "recipient": DOC, "version": 5}
        await server.poke(DOC)
        assert await client.message() == {"type": "poke", "recipient": DOC}
        sessions = server.gateway.sessions
        assert (len(sessions), sessions.listened) == (1, 1)
        client.say({"type": "unlisten", "recipient": DOC})
        client.say({"type": "unlisten", "recipient": "urn:never:heard"})
        await wait_until(lambda: not sessions.listened)
        await server.poke(DOC, 6)
        await still_serves(server, client)
        assert server.gateway.bridge.counters.noise == 1


async def test_the_token_alone_decides_who_is_heard() -> None:
    """``recipient`` is not needed, and a token of another one is refused."""
    async with running(LISTENS) as server:
        client = await server.open()
        client.say({"type": "listen", "token": token(DOC)})
        assert (await client.message())["recipient"] == DOC
        listen(client, TEAM, token(DOC))
        assert await refused(client, TEAM) == 4403
        listen(client, BOB)
        assert await refused(client, BOB) == 4403
        assert not server.gateway.sessions.find(TEAM)
        await still_serves(server, client)


BAD_TOKENS = {
    "garbage": "x.y.z",
    "foreign secret": token(DOC, secret="f" * 64),
    "expired": token(DOC, ttl_s=-10),
}


@pytest.mark.parametrize("bad", BAD_TOKENS.values(), ids=BAD_TOKENS.keys())
async def test_a_refused_token_ends_nothing_else(bad: str) -> None:
    """Only that recipient gets 4401, and the session's other recipients are not affected."""
    async with running(LISTENS) as server:
        client = await listening(server, TEAM)
        listen(client, DOC, bad)
        assert await refused(client) == 4401
        client.say({"type": "listen", "token": bad})
        assert await refused(client, None) == 4401
        await server.poke(TEAM, 1)
        assert (await client.message())["recipient"] == TEAM
        await still_serves(server, client)


async def test_a_token_that_is_refused_at_its_renewal_ends_the_listening() -> None:
    """As it ends a session."""
    async with running(LISTENS) as server:
        client = await listening(server, DOC)
        listen(client, DOC, "x.y.z")
        assert await refused(client) == 4401
        assert not server.gateway.sessions.listened
        await still_serves(server, client)


async def test_what_is_refused_is_not_heard() -> None:
    """Whatever the reason: no poke follows ``unlistened``."""
    async with running(LISTENS) as server:
        client = await listening(server, DOC)
        listen(client, DOC, token(TEAM))
        assert await refused(client) == 4403
        assert not server.gateway.sessions.listened
        listen(client, DOC)
        assert (await client.message())["type"] == "listening"
        (connection,) = server.connections
        while connection.session.may_listen():
            pass
        listen(client, DOC)
        assert await refused(client) == 1013
        assert not server.gateway.sessions.listened
        await still_serves(server, client)


async def test_each_recipient_has_its_own_expiry() -> None:
    """A recipient ends with its token, unless the token is renewed."""
    async with running(LISTENS) as server:
        client = await server.open()
        soon = token(DOC, ttl_s=1.5), token(TEAM, ttl_s=1.5)
        for recipient, bearer in zip((DOC, TEAM), soon, strict=True):
            listen(client, recipient, bearer)
            assert (await client.message())["type"] == "listening"
        listen(client, TEAM)
        renewed = await client.message()
        assert (renewed["type"], renewed["recipient"]) == ("listening", TEAM)
        assert renewed["expires_in"] > 500
        assert await refused(client) == 4401
        await server.poke(TEAM, 4)
        assert (await client.message())["recipient"] == TEAM
        await still_serves(server, client)


async def test_there_is_a_limit() -> None:
    """One recipient too many is refused until another one ends. A renewal does not count."""
    async with running(LISTENS) as server:
        client = await listening(server, "urn:doc:1", "urn:doc:2", "urn:doc:3")
        listen(client, DOC)
        assert await refused(client) == 4403
        listen(client, "urn:doc:3")
        assert (await client.message())["type"] == "listening"
        client.say({"type": "unlisten", "recipient": "urn:doc:1"})
        listen(client, DOC)
        assert (await client.message())["type"] == "listening"


async def test_too_many_listens_are_refused_unread() -> None:
    """They cost no signature check, and they do not end the session."""
    async with running(LISTENS) as server:
        client = await server.open()
        codes = []
        for _ in range(110):
            listen(client, DOC, "x.y.z")
            codes.append(await refused(client))
        assert codes == [4401] * 106 + [1013] * 4
        await still_serves(server, client)


async def test_without_the_offer_a_listen_closes_the_session() -> None:
    """As it does at an instance of release 0.1.0."""
    async with running() as server:
        client = await server.connect()
        assert "listens" not in await client.message()
        listen(client, DOC)
        assert await client.closed() == 1008


async def test_listening_is_said_once_the_shard_is_live() -> None:
    """In partitioned mode: the shard is subscribed to, and proven, before ``listening``."""
    async with running(LISTENS, mode="partitioned") as server:
        client = await server.open()
        server.transport.deaf = True
        listen(client, DOC)
        await wait_until(lambda: server.gateway.sessions.listened)
        (heard,) = server.gateway.sessions.find(DOC)
        assert shard_of(DOC, 100) in server.gateway.shard_routing.interest
        assert not heard.is_open
        server.transport.deaf = False
        assert (await client.message())["type"] == "listening"
        assert server.gateway.subscriptions.covers(DOC)
        await server.poke(DOC, 2)
        assert await client.message() == {"type": "poke", "recipient": DOC, "version": 2}
        client.say({"type": "unlisten", "recipient": DOC})
        await wait_until(lambda: shard_of(DOC, 100) not in server.gateway.shard_routing.interest)


async def test_the_end_of_a_session_ends_all_that_it_listens_to() -> None:
    """The session map and the interests are empty afterwards."""
    async with running(LISTENS, mode="partitioned") as server:
        client = await listening(server, DOC, TEAM)
        await client.close()
        await wait_until(lambda: not len(server.gateway.sessions))
        assert (server.gateway.sessions.listened, server.gateway.sessions.recipients) == (0, 0)
        assert not server.gateway.shard_routing.interest


async def test_a_disconnect_of_one_recipient_ends_it_alone() -> None:
    """Those who listen to it hear 4401, and their own sessions go on."""
    async with running(LISTENS) as server:
        client = await listening(server, DOC, TEAM)
        await server.publish_raw(json.dumps({"type": "disconnect", "recipient": DOC}).encode())
        assert await refused(client) == 4401
        await server.poke(TEAM, 1)
        assert (await client.message())["recipient"] == TEAM
        await still_serves(server, client)


async def test_a_revoked_token_is_not_listened_to() -> None:
    """Listening ends, and the same token is refused again."""
    verifier = TokenVerifier(secret=SECRET)
    async with running(LISTENS, verifier) as server:
        disconnects = server.gateway.bridge.disconnects
        verifier.refuses = lambda who, issued_at: disconnects.refuses(who, issued_at, time.time())
        client = await listening(server, DOC)
        now_ms = int(time.time() * 1000) + 1000
        revocation = {"type": "disconnect", "recipient": DOC, "at_ms": now_ms}
        await server.publish_raw(json.dumps(revocation | {"until_ms": now_ms + 60_000}).encode())
        assert await refused(client) == 4401
        listen(client, DOC)
        assert await refused(client) == 4401
        await still_serves(server, client)


async def test_after_a_gap_each_recipient_is_poked() -> None:
    """What may have been missed concerns all that a session hears."""
    async with running(LISTENS) as server:
        client = await listening(server, DOC)
        for receiver in server.transport.receivers:
            receiver.on_gap(Feed.ALL, "the test says so")
        pokes = [await client.message() for _ in range(2)]
        assert {poke.get("recipient") for poke in pokes} == {None, DOC}
        assert all(poke["within_ms"] > 0 for poke in pokes)


async def test_verification_compares_all_that_a_session_hears() -> None:
    """A poke that was lost is made up for, whosever it was."""
    heads = {BOB: 3, DOC: 8}

    async def read(recipients: Sequence[str]) -> Mapping[str, int]:
        return {each: heads[each] for each in recipients if each in heads}

    async with running(LISTENS, heads=read, verify_every_s=1.0) as server:
        client = await listening(server, DOC)
        pokes = [await client.message() for _ in range(2)]
        assert {(each.get("recipient"), each["version"]) for each in pokes} == {(None, 3), (DOC, 8)}
        heads[DOC] = 9
        assert await client.message() == {"type": "poke", "recipient": DOC, "version": 9}


async def test_a_slow_reader_owes_one_poke_for_each_recipient() -> None:
    """However many came while it did not read; the memory that it costs does not grow."""
    async with running(LISTENS) as server:
        client = await listening(server, DOC, receive_buffer=4096)
        client.stop_reading()
        (connection,) = server.connections
        version = 0
        while connection.session.flows:
            version += 1
            await server.poke(DOC, version)
        for _ in range(2000):
            version += 1
            await server.poke(DOC, version)
        await server.poke(BOB, 1)
        client.read_on()
        told: dict[str | None, list[int]] = {None: [], DOC: []}
        while told[DOC][-1:] != [version] or not told[None]:
            poke = await client.message()
            told[poke.get("recipient")].append(poke["version"])
        assert told[None] == [1]
        assert len(told[DOC]) < version / 10


async def test_a_move_follows_the_sessions_own_recipient() -> None:
    """The owner of a further recipient does not matter. A drain ends the whole session."""
    async with running(LISTENS, move_delay_s=0.01, mode="partitioned") as server:
        client = await listening(server, DOC)
        assert shard_of(DOC, 100) != shard_of(BOB, 100)
        owners = ["i-1"] * 100
        owners[shard_of(DOC, 100)] = "i-2"
        members = {"i-1": Reach("wss://one", "y"), "i-2": Reach("wss://two", "x")}
        server.gateway.apply(ShardMap(1, "partitioned", tuple(owners)), members)
        await wait_until(lambda: server.gateway.shard_routing.url_for(DOC) == "wss://two")
        await server.poke(DOC, 4)
        assert (await client.message())["recipient"] == DOC
        owners[shard_of(BOB, 100)] = "i-2"
        server.gateway.apply(ShardMap(2, "partitioned", tuple(owners)), members)
        while (frame := await client.message())["type"] == "poke":
            assert frame["recipient"] == DOC  # poked twice, as the subscriptions changed
        assert frame == {"type": "move", "url": "wss://two"}
        assert await client.closed() == 4307


async def test_a_drain_counts_sessions_alone() -> None:
    """It closes each once, whatever they listen to."""
    async with running(LISTENS) as server:
        client = await listening(server, DOC, TEAM)
        draining = asyncio.ensure_future(server.gateway.drain(0.0))
        assert await client.closed() == 1012
        await draining
        assert server.gateway.sessions.recipients == 0


async def test_the_limit_of_a_recipients_sessions_spares_those_who_listen() -> None:
    """It is for the sessions of a user, and a room may have any number of listeners."""
    async with running(LISTENS, max_sessions_per_recipient=1) as server:
        listeners = [await listening(server, DOC, subject=f"urn:user:{n}") for n in range(3)]
        of_doc = await server.open(DOC)
        await server.poke(DOC, 3)
        for client in listeners:
            assert await client.message() == {"type": "poke", "recipient": DOC, "version": 3}
        assert await of_doc.message() == {"type": "poke", "version": 3}
        await server.open(DOC)
        assert await of_doc.closed() == 4409
        assert len(server.gateway.sessions.find(DOC)) == 4


class KeysElsewhere:
    """Verifies with keys that have to be fetched, and that come when the test says so."""

    def __init__(self) -> None:
        self.verifier = TokenVerifier(secret=SECRET)
        self.fetched = asyncio.Event()
        self.are_unavailable = False
        self.must_be_fetched = False

    def verify_now(self, bearer: str) -> Any:
        """At once, unless a key must be fetched."""
        if self.must_be_fetched:
            raise KeysUnavailableError("not fetched yet")
        return self.verifier.verify_now(bearer)

    async def verify(self, bearer: str) -> Any:
        """After the key has come."""
        await self.fetched.wait()
        if self.are_unavailable:
            raise KeysUnavailableError("the endpoint is down")
        return self.verifier.verify_now(bearer)


async def test_what_waits_for_a_key_may_be_given_up() -> None:
    """``unlisten`` before the key comes: then the recipient is not heard."""
    keys = KeysElsewhere()
    async with running(LISTENS, keys) as server:
        client = await server.open()
        keys.must_be_fetched = True
        listen(client, DOC)
        listen(client, TEAM)
        client.say({"type": "unlisten", "recipient": DOC})
        client.say({"type": "ping"})
        assert await client.message() == {"type": "pong"}
        keys.fetched.set()
        assert (await client.message())["recipient"] == TEAM
        assert not server.gateway.sessions.find(DOC)


async def test_what_waits_for_a_key_need_not_name_its_recipient() -> None:
    """Each of several is answered, but for the one that was given up."""
    keys = KeysElsewhere()
    async with running(LISTENS, keys) as server:
        client = await server.open()
        keys.must_be_fetched = True
        for recipient in (DOC, TEAM, "urn:doc:8"):
            client.say({"type": "listen", "token": token(recipient)})
        client.say({"type": "unlisten", "recipient": "urn:doc:8"})
        client.say({"type": "ping"})
        assert await client.message() == {"type": "pong"}
        keys.fetched.set()
        assert [(await client.message())["recipient"] for _ in range(2)] == [DOC, TEAM]
        assert server.gateway.sessions.listened == 2


async def test_an_outage_of_the_keys_is_overload_and_no_refusal() -> None:
    """1013 for a new recipient; one that is heard already stays so."""
    keys = KeysElsewhere()
    async with running(LISTENS, keys) as server:
        client = await listening(server, TEAM)
        keys.must_be_fetched = keys.are_unavailable = True
        keys.fetched.set()
        listen(client, TEAM)
        listen(client, DOC)
        assert await refused(client) == 1013
        await server.poke(TEAM, 3)
        assert (await client.message())["recipient"] == TEAM
