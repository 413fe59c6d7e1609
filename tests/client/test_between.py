"""The asyncio client behind proxies, login pages and servers that drip."""

from collections.abc import AsyncIterator, Sequence
from time import monotonic
from urllib.parse import urlsplit

import pytest
from websockets.exceptions import InvalidURI

from pokebridge.client import PokeClient, Policy, ReceivedMessage, polling, pulling
from pokebridge.client.events import AnyAction, AnyEvent, FetchToken, PullFailed, Stop
from pokebridge.client.opening import Opener
from pokebridge.errors import ForbiddenError
from tests.client.between import DRIPS, STRANGERS, Between, FirstProtocolOnly, problem
from tests.client.faulty_bridge import FaultyBridge
from tests.support import Serve, wait_until

QUICK = Policy(base_s=0.01, cap_s=0.05, open_within_s=1.0)
PULL, ACK, CONNECT = "/v1/messages", "/v1/messages/ack", "/v1/connect"


class World:
    """A bridge with a message, what stands before it, and what the client did and got."""

    def __init__(self, bridge: FaultyBridge, between: Between) -> None:
        self.bridge = bridge
        self.between = between
        self.steps: list[AnyEvent | AnyAction] = []
        self.got: list[object] = []

    async def token(self) -> str:
        """A new token."""
        return f"token-{self.fetches}"

    async def show(self, messages: Sequence[ReceivedMessage]) -> None:
        """Keep what came."""
        self.got += [message.body for message in messages]

    @property
    def fetches(self) -> int:
        """How many tokens the client has wanted."""
        return sum(isinstance(step, FetchToken) for step in self.steps)

    def client(self) -> PokeClient:
        """A client whose steps are kept."""
        return PokeClient(
            self.between.url, self.token, self.show, policy=QUICK, on_event=self.steps.append
        )


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """A bridge with a message for the client, and what stands before it."""
    async with FaultyBridge().run() as bridge:
        bridge.commit("a")
        async with Between(urlsplit(bridge.url).port or 0).run() as between:
            yield World(bridge, between)


@pytest.mark.parametrize("path", [PULL, ACK, CONNECT])
@pytest.mark.parametrize("stranger", STRANGERS)
async def test_what_is_not_the_bridge_ends_nothing(world: World, stranger: str, path: str) -> None:
    """Whatever it answers, three times, the client comes through with its first token."""
    if (path, stranger) == (ACK, "an empty 204"):
        pytest.skip("this is how the bridge answers an ack")
    world.between.answers[path] = [STRANGERS[stranger]] * 3
    async with world.client() as client:
        await wait_until(lambda: world.bridge.acks == [1])
        await client.wait_ready(30)
        await wait_until(lambda: world.between.asked == [path] * 3)
    assert world.got == ["a"]
    assert world.fetches == 1
    assert not any(isinstance(step, Stop) for step in world.steps)


@pytest.mark.parametrize("path", [PULL, ACK, CONNECT])
async def test_the_bridges_own_401_is_about_the_token(world: World, path: str) -> None:
    """Its problem has the client fetch a new token, also with parameters in the media type."""
    media_type = 'Application/Problem+JSON; charset="utf-8"'
    world.between.answers[path] = [problem(401, media_type=media_type)]
    async with world.client() as client:
        await wait_until(lambda: world.bridge.acks == [1])
        await client.wait_ready(30)
        await wait_until(lambda: world.fetches == 2)
    assert world.got == ["a"]


async def test_the_bridges_own_403_ends_the_client(world: World) -> None:
    """Only the bridge can say that a client is not allowed."""
    world.between.answers[CONNECT] = [STRANGERS["403 page"], problem(403)]
    async with world.client() as client:
        with pytest.raises(ForbiddenError, match="4403"):
            await client.wait_ready(30)
    assert world.between.asked.count(CONNECT) == 2


@pytest.mark.parametrize("path", [PULL, ACK])
@pytest.mark.parametrize("drip", DRIPS)
async def test_an_answer_that_drips_is_given_up(
    world: World, monkeypatch: pytest.MonkeyPatch, drip: str, path: str
) -> None:
    """Whatever part of it drips, the client is not deaf for long."""
    monkeypatch.setattr(pulling, "PROGRESS_WITHIN_S", 0.5)
    world.between.answers[path] = [DRIPS[drip]] * 2
    async with world.client():
        await wait_until(lambda: world.bridge.acks == [1])
    assert world.between.asked == [path] * 2


async def test_an_answer_without_end_is_given_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that gets on is given up when it is longer, or takes longer, than any page."""
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    monkeypatch.setattr(pulling, "MAX_ANSWER_BYTES", 100_000)
    world.between.answers[PULL] = [[head, *[b" " * 20_000] * 100]]
    async with world.client():
        await wait_until(lambda: world.bridge.acks == [1])
    monkeypatch.setattr(pulling, "ANSWER_WITHIN_S", 1.0)
    monkeypatch.setattr(pulling, "MAX_ANSWER_BYTES", 100_000_000)
    world.between.answers[PULL] = [[head, *[b" " * 2000] * 1000]]
    async with world.client():
        await wait_until(lambda: world.bridge.acks == [1, 1])


async def test_a_poll_without_end_is_given_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call for pokes is given up when its answer is longer than any, whatever its status."""
    monkeypatch.setattr(polling, "MAX_ANSWER_BYTES", 100_000)
    url = world.between.url.replace("http", "ws") + CONNECT
    poller = polling.Poller(world.between.url, None)
    for status in (b"200 OK", b"503 Service Unavailable"):
        head = b"HTTP/1.1 %s\r\n\r\n" % status
        world.between.answers[polling.POKES_PATH] = [[head, *[b" " * 20_000] * 1000]]
        with pytest.raises(polling.PollEndedError, match="more than 100000 bytes"):
            await poller.open(url, {}, "token")
    await poller.close()


async def test_what_no_bridge_says_ends_a_poll_and_nothing_else(world: World) -> None:
    """Neither an address that is none nor a frame that is no text is an unforeseen error."""
    poller = polling.Poller(world.between.url, None)
    for address in ("wss://[::1", "wss://\u2603.example", "wss:///x", "wss://h:x", "wss://a\0b"):
        with pytest.raises(polling.PollEndedError):
            await poller.open(address + CONNECT, {}, "token")
    said = b'{"session":"s","frames":["\xff",{"type":"poke"}]}'
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(said)
    world.between.answers[polling.POKES_PATH] = [[head + said]]
    polled = await poller.open(world.between.url.replace("http", "ws") + CONNECT, {}, "token")
    assert [await polled.recv("token") for _ in range(2)] == ['"\ufffd"', '{"type":"poke"}']
    await poller.close()


async def test_empty_answers_that_come_at_once_make_no_storm(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something answers polls without waiting: the next call comes after a pause."""
    monkeypatch.setattr(polling, "EMPTY_AFTER_S", 0.3)
    said = b'{"session":"s","frames":[]}'
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(said)
    world.between.answers[polling.POKES_PATH] = [[head + said]] * 3
    poller = polling.Poller(world.between.url, None)
    began_s = monotonic()
    polled = await poller.open(world.between.url.replace("http", "ws") + CONNECT, {}, "token")
    for _ in range(2):
        assert await polled.recv("token") == polling.NOTHING_NEW
    assert monotonic() - began_s >= 0.9
    await poller.close()


@pytest.mark.parametrize("address", ["wss:///x", "ws://127.0.0.1:9/x#y"])
async def test_no_error_of_a_handshake_shows_the_token(address: str) -> None:
    """Also where it is in the query, and the address that a move named is none."""
    with pytest.raises(InvalidURI) as refused:
        await Opener(None).open(address, {}, "secret", in_query=True)
    assert "secret" not in repr(refused.value)


@pytest.mark.parametrize("drip", ["status line", "header fields", "body", "chunk sizes"])
async def test_a_handshake_that_drips_is_given_up(world: World, drip: str) -> None:
    """The client reconnects after ``open_within_s``."""
    world.between.answers[CONNECT] = [DRIPS[drip]]
    async with world.client() as client:
        await client.wait_ready(30)


async def test_a_refusal_says_who_refused(world: World) -> None:
    """The reason names the address, the status, and whether it was the bridge."""
    world.between.answers[PULL] = [STRANGERS["407 page"], problem(503)]
    async with world.client():
        await wait_until(lambda: world.got)
    reasons = [step.reason for step in world.steps if isinstance(step, PullFailed)]
    assert reasons == [
        f"{world.between.url}/v1/messages answered 407, but not as an instance of pokebridge",
        f"{world.between.url}/v1/messages answered 503: as asked",
    ]


@pytest.mark.parametrize("kept", [0, 1])
async def test_sub_protocols_may_get_lost(serve: Serve, kept: int) -> None:
    """This client's token is in Authorization, and it needs no sub-protocol."""
    instance = serve(mailbox="memory://")
    async with FirstProtocolOnly(instance.port, kept=kept).run() as proxy:
        token = instance.token("urn:user:bob")
        async with PokeClient(proxy.url, token, on_poke=_nothing) as client:
            await client.wait_ready(30)
    assert proxy.handshakes


async def _nothing(cursor: int) -> None:
    """Pull nothing."""
