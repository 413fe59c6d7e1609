"""Calls that wait: a pull for something new, and the frames of a session without a socket."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, ClassVar

import httpx
import pytest

from pokebridge.api.app import create_api
from pokebridge.api.waiting import Waiting
from pokebridge.asgi import ASGIApp
from pokebridge.durations import PULL
from pokebridge.gateway.audiences import LARGE
from pokebridge.gateway.gateway import Gateway
from pokebridge.gateway.polling import PolledSession
from pokebridge.model import NewMessage, Page
from pokebridge.session import Timing
from pokebridge.sharding import shard_of
from pokebridge.tokens import TokenVerifier
from pokebridge.transport.base import Feed
from tests.api import api_world
from tests.gateway.harness import BOB, QUICK, SECRET, Running, running, token
from tests.support.waiting import wait_until

EVE = "urn:user:eve"
LONG_S = 50


class World(api_world.World):
    """The API beside a gateway, over a socket."""

    commits = 0
    tokens: ClassVar[dict[str, str]] = {}
    server: Running
    http: httpx.AsyncClient
    on_read: Callable[[], Awaitable[None]] | None = None
    """Called during the next read of the mailbox, after it has seen what is there."""

    def create_app(self, gateway: Gateway) -> ASGIApp:
        """The API whose calls wait as sessions of ``gateway``."""
        read = self.mailbox.read

        async def read_and_more(*args: Any, **kwargs: Any) -> Page:
            page = await read(*args, **kwargs)
            on_read, self.on_read = self.on_read, None
            if on_read is not None:
                await on_read()
            return page

        self.mailbox.read = read_and_more  # type: ignore[method-assign]
        verifier = TokenVerifier(secret=SECRET)
        self.built = replace(self.parts(), verifier=verifier, waiting=Waiting(gateway))
        return create_api(self.built)

    async def commit(self, body: bytes = b'"hi"', recipient: str = BOB) -> int:
        """Store a message, and poke its recipient."""
        id_ = str(len(self.pulled) + self.commits)
        self.commits += 1
        receipt = await self.mailbox.append(NewMessage(recipient, EVE, id_, body, ttl_s=600))
        await self.server.poke(recipient, receipt.version)
        return receipt.version

    def call(
        self, path: str, subject: str = BOB, bearer: str = "", **headers: str
    ) -> "asyncio.Task[httpx.Response]":
        """A GET that is under way."""
        bearer = bearer or self.tokens.setdefault(subject, token(subject))
        headers = {"Authorization": f"Bearer {bearer}", **headers}
        return asyncio.create_task(self.http.get(path, headers=headers))

    async def waiting(self, path: str, subject: str = BOB, **headers: str) -> Any:
        """A GET that waits."""
        before = self.waits(subject)
        call = self.call(path, subject, **headers)
        await wait_until(lambda: self.waits(subject) - before)
        assert not call.done()
        return call

    def waits(self, subject: str = BOB) -> set[Any]:
        """The recipient's sessions in which a call waits."""
        sessions = self.server.gateway.sessions.find(subject)
        return {each for each in sessions if isinstance(each, PolledSession) and each.is_awaited}

    async def begin(self, subject: str = BOB, **query: Any) -> str:
        """A polled session that has heard ``ready``."""
        answer = (await self.call("/v1/pokes?wait_s=5", subject, **query)).json()
        assert [frame["type"] for frame in answer["frames"]] == ["ready"]
        return str(answer["session"])


@asynccontextmanager
async def serving(**config: Any) -> AsyncIterator[World]:
    """Serve the API and a gateway with ``config``."""
    world = World()
    async with running(create_app=world.create_app, **config) as world.server:
        url = f"http://127.0.0.1:{world.server.port}"
        async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as world.http:
            yield world


async def test_a_pull_waits_for_the_next_message_and_no_longer() -> None:
    """It returns existing messages at once, else the next commit, else an empty page in time."""
    async with serving() as world:
        first = await world.commit()
        page = await world.call(f"/v1/messages?wait_s={LONG_S}")
        assert [each["version"] for each in page.json()["messages"]] == [first]
        call = await world.waiting(f"/v1/messages?after={first}&wait_s={LONG_S}")
        second = await world.commit()
        assert [each["version"] for each in (await call).json()["messages"]] == [second]
        empty = await world.call(f"/v1/messages?after={second}&wait_s=0.3")
        assert empty.json() == {"messages": [], "version": second, "more": False}
        known = {"If-None-Match": empty.headers["etag"]}
        assert (
            await world.call(f"/v1/messages?after={second}&wait_s=0.3", **known)
        ).status_code == 304
        call = await world.waiting(f"/v1/messages?after={second}&wait_s={LONG_S}", **known)
        await world.commit()
        assert (await call).status_code == 200
        assert len(world.server.gateway.sessions) == world.server.gateway.entrance.sessions == 0
        quick = world.built.requests.by_labels
        assert (*PULL, "200") not in quick  # else waiting calls would skew the rate


async def test_nothing_is_missed_between_the_read_and_the_wait() -> None:
    """A message that is committed while the call reads the mailbox ends its wait at once."""
    async with serving() as world:

        async def commit() -> None:
            await world.commit()

        world.on_read = commit
        async with asyncio.timeout(LONG_S / 2):
            page = await world.call(f"/v1/messages?wait_s={LONG_S}")
        assert len(page.json()["messages"]) == 1


async def test_a_pull_that_waits_finds_a_message_whose_poke_was_lost() -> None:
    """It looks again every ``verify_every_s``, as verification does for the sessions that last."""
    async with serving(verify_every_s=0.2) as world:
        call = await world.waiting(f"/v1/messages?wait_s={LONG_S}")
        await world.mailbox.append(NewMessage(BOB, EVE, "1", b'"hi"', ttl_s=600))
        async with asyncio.timeout(LONG_S / 2):
            assert len((await call).json()["messages"]) == 1


async def test_without_a_proven_subscription_a_pull_returns_what_is_there() -> None:
    """It waits for the proof for a moment, not for a poke that may never come."""
    async with serving() as world:
        world.server.transport.deaf = True
        await wait_until(lambda: not world.server.gateway.subscriptions.covers(BOB))
        async with asyncio.timeout(LONG_S / 2):
            page = await world.call(f"/v1/messages?wait_s={LONG_S}")
        assert page.json()["messages"] == []


@pytest.mark.parametrize("behind", [0, 3, 300], ids=["alone", "ahead of some", "ahead of many"])
@pytest.mark.parametrize("half", [True, False], ids=["half", "reset"])
@pytest.mark.parametrize("path", ["/v1/messages?wait_s=50", "/v1/pokes?wait_s=50&session={}"])
async def test_a_client_that_goes_away_frees_its_place(
    path: str, *, half: bool, behind: int
) -> None:
    """Its session is gone as soon as the kernel says so, also when only its side is closed.

    Requests behind the one that waits don't hide it.
    """
    async with serving(max_sessions=1) as world:
        session = await world.begin() if "{}" in path else ""
        client = await world.server.dial()
        request = f"GET {path.format(session)} HTTP/1.1\r\nHost: x\r\n"
        bearer = world.tokens.setdefault(BOB, token())
        client.send_raw(f"{request}Authorization: Bearer {bearer}\r\n\r\n".encode())
        await wait_until(world.waits)
        client.send_raw(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * behind)
        assert len(world.server.gateway.sessions) == 1
        if half:
            client.writer.write_eof()
        else:
            await client.close()
        await wait_until(lambda: not world.server.gateway.sessions)
        assert world.server.gateway.entrance.sessions == 0


async def test_a_waiting_call_counts_against_every_limit() -> None:
    """No room: 503, but news come. One too many of a recipient: the oldest goes with 409."""
    async with serving(max_sessions=2, max_sessions_per_recipient=1) as world:
        oldest = await world.waiting(f"/v1/messages?wait_s={LONG_S}")
        newest = await world.waiting(f"/v1/messages?wait_s={LONG_S}")
        assert (await oldest).status_code == 409
        other = await world.waiting(f"/v1/messages?wait_s={LONG_S}", EVE)
        for path in (f"/v1/messages?wait_s={LONG_S}", f"/v1/pokes?wait_s={LONG_S}"):
            refused = await world.call(path, "urn:user:new")
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0
        await world.commit(recipient="urn:user:new")
        page = await world.call(f"/v1/messages?wait_s={LONG_S}", "urn:user:new")
        assert len(page.json()["messages"]) == 1
        handshake = await world.server.dial()
        await handshake.handshake("/v1/connect", (f"Authorization: Bearer {token('urn:user:x')}",))
        assert handshake.status == 503
        for call in (newest, other):
            call.cancel()


async def test_a_drain_and_a_disconnect_end_what_waits() -> None:
    """A drain has it answer at once, and close its connection; a disconnect refuses it with 401."""
    async with serving() as world:
        call = await world.waiting(f"/v1/messages?wait_s={LONG_S}")
        await world.server.publish_raw(
            json.dumps({"type": "disconnect", "recipient": BOB}).encode()
        )
        assert (await call).status_code == 401
        call = await world.waiting(f"/v1/messages?wait_s={LONG_S}")
        session = await world.begin(EVE)
        frames = await world.waiting(f"/v1/pokes?wait_s={LONG_S}&session={session}", EVE)
        await world.server.gateway.drain(0.0)
        assert (await call).status_code == 200
        assert (await call).headers["connection"] == "close"
        assert (await frames).json()["close"]["code"] == 1012
        refused = await world.call(f"/v1/messages?wait_s={LONG_S}")
        assert refused.status_code == 503


async def test_a_polled_session_hears_what_a_socket_hears() -> None:
    """``ready`` first, then each poke; those that come between two calls are one."""
    async with serving() as world:
        session = await world.begin()
        path = f"/v1/pokes?session={session}&wait_s="
        for version in (3, 5, 4):
            await world.server.poke(BOB, version)
        answer = (await world.call(f"{path}{LONG_S}")).json()
        assert answer == {"session": session, "frames": [{"type": "poke", "version": 5}]}
        call = await world.waiting(f"{path}{LONG_S}")
        await world.server.poke(BOB, 6)
        assert (await call).json()["frames"] == [{"type": "poke", "version": 6}]
        assert (await world.call(f"{path}0.2")).json()["frames"] == []
        assert (await world.call(f"{path}0", EVE)).status_code == 404
        assert (await world.call("/v1/pokes?session=none&wait_s=1")).status_code == 404


async def test_a_session_that_is_ending_may_be_woken_before_its_time() -> None:
    """A deadline of its last call may come then. The next call still hears why it has ended."""
    async with serving() as world:
        session = await world.begin()
        (polled,) = world.server.gateway.sessions
        assert isinstance(polled, PolledSession)
        polled.close(1012, "drained")
        polled.wake(world.server.gateway.now())
        answer = await world.call(f"/v1/pokes?session={session}")
        assert answer.json()["close"] == {"code": 1012, "reason": "drained"}
        await wait_until(lambda: world.server.gateway.entrance.sessions == 0)


async def test_a_newer_call_takes_the_place_of_the_older() -> None:
    """The older one is answered with nothing. A newer token is told until when it is good."""
    async with serving() as world:
        session = await world.begin()
        path = f"/v1/pokes?session={session}&wait_s={LONG_S}"
        older = await world.waiting(path)
        newer = await world.call(path, bearer=token(ttl_s=1200))
        assert (await older).json()["frames"] == []
        (frame,) = newer.json()["frames"]
        assert frame["type"] == "auth"
        assert 1100 < frame["expires_in"] <= 1200


async def test_a_polled_session_ends_when_nobody_asks_for_its_frames() -> None:
    """It stays for ``pong_timeout_s`` between two calls. A waiting call outlives the pings."""
    async with serving(timing=QUICK) as world:
        session = await world.begin()
        path = f"/v1/pokes?session={session}&wait_s={QUICK.ping_interval_s * 4}"
        assert (await world.call(path)).json()["frames"] == []
        await wait_until(lambda: not world.server.gateway.sessions)
        assert (await world.call(path)).status_code == 404
        assert world.server.gateway.entrance.polled == 0


async def test_after_a_gap_the_answers_to_what_waits_are_spread() -> None:
    """Each call is answered within the time that a socket's client would wait, and with a poke."""
    async with serving() as world:
        sessions = [await world.begin(f"urn:user:{number}") for number in range(10)]
        calls = [
            await world.waiting(f"/v1/pokes?session={each}&wait_s={LONG_S}", f"urn:user:{number}")
            for number, each in enumerate(sessions)
        ]
        world.server.gateway.pulls_per_s = 10.0
        for receiver in world.server.transport.receivers:
            receiver.on_gap(Feed.ALL, "the test says so")
        async with asyncio.timeout(LONG_S / 2):
            for call in calls:
                assert (await call).json()["frames"] == [{"type": "poke"}]


async def test_in_partitioned_mode_a_waiting_call_is_an_interest() -> None:
    """A call has its shard subscribed to, as a session has, and it hears the poke of a commit."""
    async with serving(mode="partitioned") as world:
        call = await world.waiting(f"/v1/messages?wait_s={LONG_S}")
        await wait_until(lambda: world.server.gateway.subscriptions.covers(BOB))
        assert shard_of(BOB, 100) in world.server.gateway.shard_routing.interest
        await world.commit()
        assert len((await call).json()["messages"]) == 1
        assert not world.server.gateway.shard_routing.interest


async def test_sessions_and_calls_share_the_limit_of_a_user() -> None:
    """The oldest goes, whichever it is; a group has no such limit."""
    room = "urn:group:room"
    async with serving(max_sessions_per_recipient=2, group_prefixes=("urn:group:",)) as world:
        socket = await world.server.open()
        call = await world.waiting(f"/v1/messages?wait_s={LONG_S}")
        last = await world.waiting(f"/v1/messages?wait_s={LONG_S}")
        assert await socket.closed() == 4409
        await world.server.open()
        assert (await call).status_code == 409
        members = [await world.server.open(room) for _ in range(3)]
        calls = [await world.waiting(f"/v1/messages?wait_s={LONG_S}", room) for _ in range(3)]
        await world.commit(recipient=room)
        for member in members:
            assert (await member.message())["version"] == 1
        for each in calls:
            assert len((await each).json()["messages"]) == 1
        assert not last.done()


async def test_the_answers_to_a_large_audience_are_spread() -> None:
    """They come within the time that its pulls need, and each with a poke."""
    room = "urn:group:room"
    async with serving(group_prefixes=("urn:group:",), audience_pulls_per_s=100) as world:
        sessions = [await world.begin(room) for _ in range(LARGE + 1)]
        calls = [
            await world.waiting(f"/v1/pokes?session={each}&wait_s={LONG_S}", room)
            for each in sessions[:20]
        ]
        await world.server.poke(room, 5)
        await wait_until(lambda: any(call.done() for call in calls))
        assert not all(call.done() for call in calls)
        async with asyncio.timeout(LONG_S / 2):
            for call in calls:
                assert (await call).json()["frames"] == [{"type": "poke"}]


class Polling:
    """The client of a polled session: sends frames, and fetches those for it."""

    def __init__(self, world: World, session: str) -> None:
        self.world = world
        self.path = f"/v1/pokes?session={session}"
        self.sending_path = f"/v1/pokes/frames?session={session}"

    async def send(self, *frames: dict[str, str], subject: str = BOB) -> int:
        """The status with which the ``frames`` are answered."""
        bearer = self.world.tokens.setdefault(subject, token(subject))
        headers = {"Authorization": f"Bearer {bearer}"}
        body = {"frames": frames}
        answer = await self.world.http.post(self.sending_path, json=body, headers=headers)
        return answer.status_code

    async def fetch(self) -> Any:
        """What is there for it, or comes next."""
        return (await self.world.call(f"{self.path}&wait_s={LONG_S}")).json()

    async def frames(self) -> Any:
        """The frames among that."""
        return (await self.fetch())["frames"]


def listen(recipient: str, bearer: str = "") -> dict[str, str]:
    """The frame that asks to hear ``recipient``."""
    return {"type": "listen", "recipient": recipient, "token": bearer or token(recipient)}


DOC = "urn:doc:7"
UNLISTEN = {"type": "unlisten", "recipient": DOC}


async def test_a_polled_session_listens_to_more() -> None:
    """Its client sends ``listen`` by another call; answers and pokes come as frames."""
    async with serving(timing=Timing(max_listened=2)) as world:
        client = Polling(world, await world.begin())
        assert await client.send(listen(DOC)) == 204
        (answer,) = await client.frames()
        assert (answer["type"], answer["recipient"]) == ("listening", DOC)
        call = await world.waiting(f"{client.path}&wait_s={LONG_S}")
        await world.server.poke(DOC, 3)
        assert (await call).json()["frames"] == [{"type": "poke", "recipient": DOC, "version": 3}]
        for version in (4, 6, 5):
            await world.server.poke(DOC, version)
        await world.server.poke(BOB, 1)
        assert await client.frames() == [
            {"type": "poke", "version": 1},
            {"type": "poke", "recipient": DOC, "version": 6},
        ]
        assert await client.send(listen("urn:doc:8", "x.y.z")) == 204
        (refusal,) = await client.frames()
        assert (refusal["type"], refusal["code"]) == ("unlistened", 4401)
        assert await client.send(UNLISTEN) == 204
        assert world.server.gateway.sessions.listened == 0
        assert await client.send(UNLISTEN, subject=EVE) == 404
        assert await client.send({"type": "auth", "token": "x"}) == 422


async def test_the_client_of_a_polled_session_sends_no_more_frames_than_another() -> None:
    """Beyond a thousand in a ping interval the session ends, and nothing is kept for it."""
    async with serving(timing=Timing(max_listened=2)) as world:
        client = Polling(world, await world.begin())
        for _ in range(10):
            assert await client.send(*[UNLISTEN] * 100) == 204
        assert await client.send(*[listen(DOC, "x.y.z")] * 100) == 204
        answer = await client.fetch()
        assert (answer["frames"], answer["close"]["code"]) == ([], 1008)


async def test_a_polled_session_may_renew_what_it_listens_to_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After each ping interval its ``listen``s count from zero, although it is never pinged."""
    async with serving(timing=Timing(max_listened=2)) as world:
        client, gateway = Polling(world, await world.begin()), world.server.gateway
        await client.send(*[listen(DOC)] * 100)
        await client.send(*[listen(DOC)] * 5)
        frames = await client.frames()
        assert [each["type"] for each in frames] == ["listening"] * 104 + ["unlistened"]
        assert frames[-1]["code"] == 1013
        later = gateway.now() + 25
        monkeypatch.setattr(gateway, "now", lambda: later)
        await client.send(listen(DOC))
        assert (await client.frames())[0]["type"] == "listening"
