"""The asyncio client against a small bridge that misbehaves."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from websockets.protocol import State

from pokebridge.client import OnPoke, PokeClient, Policy, ReceivedMessage, core, opening, pulling
from pokebridge.client.events import Closed, Connect, Pull, Pulled, PullFailed, Refused, Text, Tick
from pokebridge.errors import ConfigError, ForbiddenError, InputError
from tests.client.faulty_bridge import Bad, FaultyBridge, problem
from tests.support import CutProxy, wait_until
from tests.support.mute import LIVE, MUTE, Names, mute_listener
from tests.support.silence import Silence
from tests.transport.certificates import make_certificates

# Short delays. Polling and pings happen only in tests that want them.
QUICK = Policy(base_s=0.01, cap_s=0.05, overload_base_s=0.01, overload_cap_s=0.05)


class Handler:
    """Keeps the messages it gets, and fails or waits where a test wants it to."""

    def __init__(self) -> None:
        self.got: list[ReceivedMessage] = []
        self.failures: list[Exception] = []
        self.calls = 0
        self.running = 0
        self.cancelled = False
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def __call__(self, messages: Sequence[ReceivedMessage]) -> None:
        """Deal with ``messages``."""
        self.calls += 1
        self.running += 1
        assert self.running == 1, "two calls at once"
        try:
            await self.go_on.wait()
            if self.failures:
                raise self.failures.pop(0)
            self.got += messages
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        finally:
            self.running -= 1

    @property
    def bodies(self) -> list[Any]:
        """What the messages said."""
        return [message.body for message in self.got]

    async def has(self, *bodies: Any) -> None:
        """Wait until exactly these have come."""
        await wait_until(lambda: len(self.got) >= len(bodies), what=f"{bodies}, not {self.bodies}")
        assert self.bodies == list(bodies)


class Tokens:
    """A token provider that numbers its tokens, and fails where a test wants it to."""

    def __init__(self) -> None:
        self.count = 0
        self.failures: list[Exception | Any] = []

    async def __call__(self) -> str:
        """The next token."""
        if self.failures:
            failure = self.failures.pop(0)
            if isinstance(failure, Exception):
                raise failure
            return failure  # type: ignore[no-any-return]  # a provider of a user's may return anything
        self.count += 1
        return f"token-{self.count}"


@pytest.fixture
async def bridge() -> AsyncIterator[FaultyBridge]:
    """A running bridge, without faults so far."""
    async with FaultyBridge().run() as bridge:
        yield bridge


@pytest.fixture
def handler() -> Handler:
    """What the client hands its messages to."""
    return Handler()


# --- messages -------------------------------------------------------------------------------


async def test_messages_come_in_order_and_are_acked(bridge: FaultyBridge, handler: Handler) -> None:
    """Old messages come in pages, new ones after a poke. The cursor and the acks follow."""
    bridge.page_size = 2
    bridge.commit("a", "b", "c", "d", "e")
    async with PokeClient(bridge.url, "token", handler, device="phone") as client:
        await client.wait_ready(5)
        assert client.connected
        await handler.has("a", "b", "c", "d", "e")
        await bridge.say(type="poke", version=bridge.commit({"rich": [1, None]}))
        await handler.has("a", "b", "c", "d", "e", {"rich": [1, None]})
        await wait_until(lambda: bridge.acks == [2, 4, 5, 6])
        await wait_until(lambda: client.cursor == 6)
    assert bridge.connects == [{"token": "token", "device": "phone"}]
    assert bridge.sockets[0].ws_protocol == "pokebridge.v1"
    assert "Sec-WebSocket-Extensions" not in bridge.requests[0].headers
    assert {pull["device"] for pull in bridge.pulls} == {"phone"}
    first = handler.got[0]
    assert (first.version, first.id, first.sender) == (1, "id-1", "urn:user:eve")
    assert first.sent_at.isoformat() == "2026-11-24T05:30:00.123000+00:00"


async def test_it_goes_on_from_a_cursor(bridge: FaultyBridge, handler: Handler) -> None:
    """A client with a given cursor pulls only newer messages, and acks nothing twice."""
    bridge.commit("a", "b", "c")
    async with PokeClient(bridge.url, "token", handler, cursor=2):
        await handler.has("c")
        await wait_until(lambda: bridge.acks == [3])


async def test_what_it_has_costs_no_pull_and_nothing_new_no_body(
    bridge: FaultyBridge, handler: Handler
) -> None:
    """A known version is not pulled; an unversioned poke is answered with 304 by the ETag."""
    bridge.commit("a")
    async with PokeClient(bridge.url, "token", handler):
        await handler.has("a")
        await wait_until(lambda: bridge.acks == [1])
        await bridge.say(type="poke", version=1)
        await bridge.say(type="poke")
        await wait_until(lambda: len(bridge.pulls) == 2)
        assert [pull["etag"] for pull in bridge.pulls] == ["", '"1"']
        await bridge.say(type="poke", version=bridge.commit("b"))
        await handler.has("a", "b")
        await wait_until(lambda: bridge.acks == [1, 2])


async def test_pokes_during_a_pull_cause_exactly_one_more(
    bridge: FaultyBridge, handler: Handler
) -> None:
    """A slow handler is never called twice at once, however much is heard meanwhile."""
    bridge.commit("a")
    handler.go_on.clear()
    events: list[object] = []
    async with PokeClient(bridge.url, "token", handler, on_event=events.append):
        await wait_until(lambda: handler.calls)
        bridge.commit("b", "c")
        for _ in range(20):
            await bridge.say(type="poke")
        await wait_until(lambda: sum(isinstance(event, Text) for event in events) == 21)
        handler.go_on.set()
        await handler.has("a", "b", "c")
        await wait_until(lambda: bridge.acks == [1, 3])
    assert len(bridge.pulls) == 2


async def test_a_page_comes_again_when_its_handler_fails(
    bridge: FaultyBridge, handler: Handler, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not acked, it is offered until it is dealt with, and the error is logged."""
    bridge.commit("a", "b")
    handler.failures = [ValueError("no such thing"), RuntimeError("not now")]
    async with PokeClient(bridge.url, "token", handler, policy=QUICK) as client:
        await handler.has("a", "b")
        await wait_until(lambda: bridge.acks == [2])
        await wait_until(lambda: client.cursor == 2)
    assert handler.calls == 3
    assert [pull["etag"] for pull in bridge.pulls] == ["", "", ""]
    assert "no such thing" in caplog.text


async def test_an_ack_that_fails_is_repeated_without_its_messages(
    bridge: FaultyBridge, handler: Handler
) -> None:
    """The messages were dealt with, so only the ack is made up for."""
    bridge.commit("a")
    bridge.bad_acks = [Bad(503), Bad(500)]
    async with PokeClient(bridge.url, "token", handler, policy=QUICK) as client:
        await wait_until(lambda: bridge.acks == [1])
        await wait_until(lambda: client.cursor == 1)
    assert handler.bodies == ["a"]


async def test_acks_go_over_a_socket_that_takes_them(
    bridge: FaultyBridge, handler: Handler
) -> None:
    """No ack is a request, each comes after its messages, and those close together are merged."""
    bridge.ready["acks"] = True
    bridge.page_size = 2
    bridge.commit("a", "b", "c", "d", "e")
    async with PokeClient(bridge.url, "token", handler, policy=QUICK) as client:
        await handler.has("a", "b", "c", "d", "e")
        await wait_until(lambda: bridge.socket_acks[-1:] == [5])
        assert client.cursor == 5
        await bridge.say(type="poke", version=bridge.commit("f"))
        await wait_until(lambda: bridge.socket_acks[-1:] == [6])
    assert bridge.acks == []
    assert bridge.socket_acks == sorted(set(bridge.socket_acks))


async def test_an_ack_that_a_socket_lost_is_repeated_on_the_next(
    bridge: FaultyBridge, handler: Handler
) -> None:
    """Its fate is unknown, so each new socket carries the newest ack again."""
    bridge.ready["acks"] = True
    bridge.commit("a")
    async with PokeClient(bridge.url, "token", handler, policy=QUICK) as client:
        await wait_until(lambda: bridge.socket_acks == [1])
        bridge.cut()
        await wait_until(lambda: bridge.socket_acks == [1, 1])
        await bridge.say(type="poke", version=1)
        await bridge.say(type="poke", version=bridge.commit("b"))
        await wait_until(lambda: bridge.socket_acks == [1, 1, 2])
        assert client.cursor == 2
    assert bridge.acks == []
    assert handler.bodies == ["a", "b"]


async def test_without_its_socket_a_client_acks_over_http(
    bridge: FaultyBridge, handler: Handler
) -> None:
    """Without a socket, a lost ack and the acks of later pulls go by HTTP."""
    bridge.ready["acks"] = True
    bridge.commit("a")
    policy = Policy(base_s=600, cap_s=600, poll_after_s=0.05, poll_every_s=0.05)
    async with PokeClient(bridge.url, "token", handler, policy=policy) as client:
        await wait_until(lambda: bridge.socket_acks == [1])
        bridge.cut()
        await wait_until(lambda: bridge.acks == [1])
        bridge.commit("b")
        await wait_until(lambda: bridge.acks == [1, 2])
        assert not client.connected
    assert bridge.socket_acks == [1]


async def test_a_server_that_takes_no_acks_any_more_gets_requests(
    bridge: FaultyBridge, handler: Handler
) -> None:
    """A session after a rollback to an earlier release has no acks: they go over HTTP again."""
    bridge.ready["acks"] = True
    bridge.commit("a")
    async with PokeClient(bridge.url, "token", handler, policy=QUICK):
        await wait_until(lambda: bridge.socket_acks == [1])
        del bridge.ready["acks"]
        bridge.cut()
        await wait_until(lambda: bridge.acks == [1])
        await bridge.say(type="poke", version=bridge.commit("b"))
        await wait_until(lambda: bridge.acks == [1, 2])
    assert bridge.socket_acks == [1]


async def test_who_leaves_sends_the_ack_that_waits(bridge: FaultyBridge, handler: Handler) -> None:
    """A client that is closed before the time of its next ack has sent it when it is closed."""
    bridge.ready["acks"] = True
    bridge.commit("a")
    policy = Policy(ack_every_s=600)
    async with PokeClient(bridge.url, "token", handler, policy=policy) as client:
        await wait_until(lambda: bridge.socket_acks == [1])
        await bridge.say(type="poke", version=bridge.commit("b"))
        await wait_until(lambda: client.cursor == 2)
        assert bridge.socket_acks == [1]
    await wait_until(lambda: bridge.socket_acks == [1, 2])


async def test_own_data_is_not_acked(bridge: FaultyBridge) -> None:
    """A client that pulls for itself has nothing to ack in the mailbox."""
    bridge.ready["acks"] = True
    calls = 0

    async def pull(_: int) -> int:
        nonlocal calls
        calls += 1
        return calls

    async with PokeClient(bridge.url, "token", on_poke=pull) as client:
        await wait_until(lambda: client.cursor == 1)
        await bridge.say(type="poke")
        await wait_until(lambda: client.cursor == 2)
    assert bridge.heard == []


@pytest.mark.parametrize(
    "answer",
    [
        Bad(500),
        Bad(503, {"Retry-After": "0"}),
        Bad(429, {"Retry-After": "Tue, 24 Nov 2026 05:30:00 GMT"}),
        Bad(302, {"Location": "/elsewhere"}),
        Bad(200, body=b"no JSON"),
        Bad(200, body=b'{"messages": 3}'),
        Bad(200, body=b'{"messages":[{"version":"x"}],"version":1,"more":false}'),
        Bad(200, body=b'{"messages":[{"body":' + b"[" * 100_000),
        Bad(200, body=b'{"messages":[{"id":"\xff"}],"version":1,"more":false}'),
        Bad(200, {"Content-Encoding": "gzip"}, body=b"no gzip"),
    ],
    ids=lambda answer: f"{answer.status} {answer.body[:20]!r}",
)
async def test_a_pull_that_fails_is_retried(
    bridge: FaultyBridge, handler: Handler, answer: Bad
) -> None:
    """Whatever the server answers in place of a page, the page is had in the end."""
    bridge.commit("a")
    bridge.bad_pulls = [answer]
    async with PokeClient(bridge.url, "token", handler, policy=QUICK):
        await handler.has("a")


async def test_a_slow_line_gets_through(
    bridge: FaultyBridge, handler: Handler, monkeypatch: pytest.MonkeyPatch, silence: Silence
) -> None:
    """A page that takes longer than the deadline is pulled once: the deadline is between bytes."""
    bodies = [f"{number:02}" + "x" * 60_000 for number in range(16)]
    bridge.commit(*bodies)
    monkeypatch.setattr(pulling, "PROGRESS_WITHIN_S", 1)
    bridge.bytes_per_s = 500_000
    pulled = silence("a page of 960 KB on a line of 500 kB/s: Python client")
    async with PokeClient(bridge.url, "token", handler, policy=QUICK):
        await handler.has(*bodies)
    pulled()
    assert [pull["limit"] for pull in bridge.pulls] == ["50"]


@pytest.mark.parametrize("stall", ["silence", "drip", "cut"])
async def test_after_an_incomplete_page_a_smaller_one(
    bridge: FaultyBridge, handler: Handler, monkeypatch: pytest.MonkeyPatch, stall: str
) -> None:
    """An answer that stands still, drips or breaks off is given up; the next page is smaller."""
    bridge.commit(*"abcdefghij")
    bridge.stalls = [stall, stall]
    monkeypatch.setattr(pulling, "PROGRESS_WITHIN_S", 0.5)
    async with PokeClient(bridge.url, "token", handler, policy=QUICK):
        await handler.has(*"abcdefghij")
    assert [pull["limit"] for pull in bridge.pulls] == ["50", "12", "3", "6", "12"]


async def test_a_mailbox_that_was_begun_anew_is_read_from_its_start(
    bridge: FaultyBridge, handler: Handler, caplog: pytest.LogCaptureFixture
) -> None:
    """A client whose cursor is ahead of the head reads the new mailbox from its start."""
    bridge.commit("a", "b")
    async with PokeClient(bridge.url, "token", handler, cursor=17) as client:
        await handler.has("a", "b")
        await wait_until(lambda: bridge.acks == [2])
        await wait_until(lambda: client.cursor == 2)
    assert "started anew" in caplog.text


# --- the connection -------------------------------------------------------------------------


async def test_a_lost_connection_is_had_again(bridge: FaultyBridge, handler: Handler) -> None:
    """Messages committed during the outage are pulled on reconnect, without a poke."""
    async with PokeClient(bridge.url, "token", handler, policy=QUICK) as client:
        await client.wait_ready(5)
        for number, lose in enumerate([1001, 1012, 1013, 1008, 4307, None]):
            bridge.commit(number)
            if lose is None:
                bridge.cut()
            else:
                await bridge.close(lose)
            await wait_until(lambda: len(bridge.connects) == number + 2)  # noqa: B023 - called here
            await handler.has(*range(number + 1))
    assert all(connect == {"token": "token", "device": "default"} for connect in bridge.connects)


async def test_a_message_that_is_no_message_is_survived(
    bridge: FaultyBridge, handler: Handler
) -> None:
    """Unknown, broken and binary ones are ignored; one that is too large costs the connection."""
    seen: list[object] = []
    async with PokeClient(
        bridge.url, "token", handler, on_event=seen.append, policy=QUICK
    ) as client:
        await client.wait_ready(5)
        await bridge.sockets[-1].send_str("not JSON")
        await bridge.sockets[-1].send_bytes(b'{"type":"binary"}')
        await bridge.say(type="news")
        await bridge.say(type="poke", version=bridge.commit("a"))
        await handler.has("a")
        assert "binary" not in repr(seen)
        assert len(bridge.connects) == 1
        await bridge.say(type="news", text="x" * 17_000)
        await wait_until(lambda: len(bridge.connects) == 2)
        await wait_until(lambda: client.connected)


@pytest.mark.parametrize("status", [429, 500, 502, 503])
async def test_a_refused_handshake_is_tried_again(
    bridge: FaultyBridge, handler: Handler, status: int
) -> None:
    """A bridge that can't have the client now is asked again."""
    bridge.refusals = [Bad(status, {"Retry-After": "0"})] * 3
    async with PokeClient(bridge.url, "token", handler, policy=QUICK) as client:
        await client.wait_ready(5)
    assert len(bridge.connects) == 4


async def test_a_move_is_followed(bridge: FaultyBridge, handler: Handler) -> None:
    """After 4307 it connects where the bridge said, and says that it was moved."""
    async with FaultyBridge().run() as other:
        async with PokeClient(bridge.url, "token", handler, device="phone") as client:
            await client.wait_ready(5)
            await bridge.say(type="move", url=f"{other.url.replace('http', 'ws')}/v1/connect?x=1")
            await bridge.close(4307)
            await wait_until(lambda: other.sockets)
            await other.say(type="poke", version=bridge.commit("a"))
            await handler.has("a")
        assert other.connects == [{"token": "token", "device": "phone", "moved": "1", "x": "1"}]
        assert other.pulls == []


@pytest.mark.parametrize("url", ["ws://[", "ws://", "ws://127.0.0.1:1/", "ws://nowhere.invalid/"])
async def test_a_move_to_nowhere_leads_home(
    bridge: FaultyBridge, handler: Handler, url: str
) -> None:
    """An unreachable address costs one attempt."""
    async with PokeClient(bridge.url, "token", handler, policy=QUICK) as client:
        await client.wait_ready(5)
        await bridge.say(type="move", url=url)
        await bridge.close(4307)
        await wait_until(lambda: len(bridge.connects) == 2)


@pytest.mark.parametrize("code", [4403, 4409, 4499])
async def test_it_stops_when_it_is_told_to(
    bridge: FaultyBridge, handler: Handler, code: int
) -> None:
    """The code is reported, nothing is tried again, and a page that was handed over is finished."""
    bridge.commit("a")
    handler.go_on.clear()
    async with PokeClient(bridge.url, "token", handler, policy=QUICK) as client:
        await wait_until(lambda: handler.calls)
        await bridge.close(code)
        await wait_until(lambda: not client.connected)
        handler.go_on.set()
        assert await client.wait_stopped() == code
        with pytest.raises(ForbiddenError, match=str(code)):
            await client.wait_ready(5)
        client.wake()
    assert bridge.acks == [1]
    assert len(bridge.connects) == 1


async def test_a_forbidden_handshake_stops_it(bridge: FaultyBridge, handler: Handler) -> None:
    """403 is for good."""
    bridge.refusals = [problem(403)]
    async with PokeClient(bridge.url, "token", handler) as client:
        with pytest.raises(ForbiddenError, match="4403"):
            await client.wait_ready(5)


async def test_stopping_waits_for_no_token(bridge: FaultyBridge, handler: Handler) -> None:
    """A provider that never answers does not keep a stopped client from ending."""
    calls = 0

    async def once() -> str:
        nonlocal calls
        calls += 1
        if calls > 1:
            await asyncio.Event().wait()
        return "token"

    bridge.bad_pulls = [problem(401)]
    async with PokeClient(bridge.url, once, handler) as client:
        await wait_until(lambda: calls == 2)
        await bridge.close(4403)
        assert await asyncio.wait_for(client.wait_stopped(), 5) == 4403


async def test_what_can_t_be_sent_any_more_is_dropped(
    bridge: FaultyBridge, handler: Handler
) -> None:
    """A send on a socket that has just closed is ignored. The close is handled as usual."""
    async with PokeClient(bridge.url, "token", handler) as client:
        await client.wait_ready(5)
        bridge.refusals = [Bad(503, {"Retry-After": "200"})]
        await bridge.close(1012)
        await wait_until(lambda: not client.connected)
        await client._send({"type": "ping"})
    assert bridge.heard == []


async def test_half_open_connections_are_noticed(bridge: FaultyBridge, handler: Handler) -> None:
    """When nothing comes through any more it pings, gives up, and gets through elsewhere."""
    policy = Policy(base_s=0.01, cap_s=0.05, ping_after_s=0.1, pong_within_s=0.1)
    async with (
        CutProxy("127.0.0.1", int(bridge.url.rpartition(":")[2])) as proxy,
        PokeClient(f"http://{proxy.address}", "token", handler, policy=policy) as client,
    ):
        await client.wait_ready(5)
        await wait_until(lambda: {"type": "ping"} in bridge.heard)
        assert len(bridge.connects) == 1
        proxy.cut()
        await wait_until(lambda: not client.connected)
        with pytest.raises(TimeoutError):
            await client.wait_ready(0.05)
        bridge.commit("a")
        proxy.heal()
        await handler.has("a")
        assert len(bridge.connects) >= 2


@pytest.mark.parametrize("stage", ["handshake", "ready"])
async def test_a_bridge_that_never_gets_ready_is_left(
    bridge: FaultyBridge, handler: Handler, stage: str
) -> None:
    """The waits for the handshake and for ``ready`` are limited."""
    bridge.silent = stage == "handshake"
    bridge.ready = {"type": "later"}
    policy = Policy(base_s=0.01, cap_s=0.05, open_within_s=0.1, ready_within_s=0.1)
    async with PokeClient(bridge.url, "token", handler, policy=policy) as client:
        await wait_until(lambda: len(bridge.connects) == 2)
        bridge.silent = False
        bridge.ready = {"type": "ready"}
        await client.wait_ready(5)
        await wait_until(lambda: sum(not socket.closed for socket in bridge.sockets) == 1)


async def test_it_polls_slowly_while_it_can_t_connect(
    bridge: FaultyBridge, handler: Handler
) -> None:
    """Where no WebSocket gets through, polling brings the messages. It ends with a WebSocket."""
    bridge.refusals = [Bad(502)] * 10_000
    bridge.commit("a")
    policy = Policy(base_s=0.01, cap_s=0.05, poll_after_s=0.05, poll_every_s=0.05)
    async with PokeClient(bridge.url, "token", handler, policy=policy) as client:
        await handler.has("a")
        bridge.commit("b")
        await handler.has("a", "b")
        assert not client.connected
        bridge.refusals.clear()
        await client.wait_ready(5)


async def test_wake_ends_a_delay(bridge: FaultyBridge, handler: Handler) -> None:
    """After a long outage a wake makes the next attempt at once."""
    bridge.refusals = [Bad(503, {"Retry-After": "200"})]
    async with PokeClient(bridge.url, "token", handler) as client:
        await wait_until(lambda: bridge.connects)
        with pytest.raises(TimeoutError, match=r"0\.05 s"):
            await client.wait_ready(0.05)
        client.wake()
        await client.wait_ready(5)


async def test_tls(tmp_path: Path, handler: Handler) -> None:
    """HTTPS and WSS work with a private authority. Without it the bridge is not trusted."""
    files = make_certificates(tmp_path)
    client_tls = files.client_tls()
    async with FaultyBridge().run(files.server_tls()) as bridge:
        bridge.commit("a")
        async with PokeClient(bridge.url, "token", handler, tls=client_tls) as client:
            await client.wait_ready(5)
            await handler.has("a")
        seen: list[object] = []
        async with PokeClient(bridge.url, "token", handler, on_event=seen.append) as client:
            await wait_until(lambda: any(isinstance(event, Closed) for event in seen))
    assert "CERTIFICATE_VERIFY_FAILED" in repr(seen)
    assert len(bridge.connects) == 1


# --- addresses ------------------------------------------------------------------------------


async def test_a_mute_first_address_is_no_outage(
    bridge: FaultyBridge, handler: Handler, names: Names, silence: Silence
) -> None:
    """It does not accept: the socket and the pull go to the second address of the name."""
    names("bridge.test", [MUTE, LIVE])
    bridge.commit("a")
    port = urlsplit(bridge.url).port or 0
    with mute_listener(accepts=False, port=port):
        pulled = silence("the first address of the bridge's name is mute: Python client")
        async with PokeClient(f"http://bridge.test:{port}", "token", handler) as client:
            await client.wait_ready(30)
            await handler.has("a")
        pulled()
    assert len(bridge.connects) == 1


async def test_an_address_that_accepts_and_is_mute_is_left(
    bridge: FaultyBridge, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next is tried in the same attempt, and first from then on."""
    monkeypatch.setattr(opening, "UNANSWERED_S", 0.1)
    names("bridge.test", [MUTE, LIVE])
    port = urlsplit(bridge.url).port or 0
    events: list[object] = []
    url = f"http://bridge.test:{port}"
    with mute_listener(accepts=True, port=port):
        async with PokeClient(url, "token", on_poke=nothing, on_event=events.append) as client:
            await client.wait_ready(30)
            assert not [event for event in events if isinstance(event, Closed)]
            monkeypatch.setattr(opening, "UNANSWERED_S", 600.0)
            await bridge.close(1001)
            await wait_until(lambda: len(bridge.connects) == 2 and client.connected)


async def test_a_refusal_at_one_address_is_not_carried_to_the_next(
    bridge: FaultyBridge, handler: Handler, names: Names
) -> None:
    """It is an answer: a server that has no room must not be asked twice as often."""
    names("bridge.test", [LIVE, MUTE])
    bridge.refusals.append(Bad(503, {"Retry-After": "300"}))
    events: list[object] = []
    url = bridge.url.replace(LIVE, "bridge.test")
    async with PokeClient(url, "token", handler, on_event=events.append):
        await wait_until(lambda: any(isinstance(event, Refused) for event in events))
    assert len(bridge.connects) == 1


async def test_a_name_s_certificate_is_asked_for_at_each_address(
    tmp_path: Path, handler: Handler, names: Names
) -> None:
    """The certificate is the name's: that an address was dialled makes no difference to TLS."""
    files = make_certificates(tmp_path)
    client_tls = files.client_tls()
    names("localhost", [MUTE, LIVE])
    names("other.test", [MUTE, LIVE])
    async with FaultyBridge().run(files.server_tls()) as bridge:
        port = urlsplit(bridge.url).port or 0
        with mute_listener(accepts=False, port=port):
            url = f"https://localhost:{port}"
            async with PokeClient(url, "token", handler, tls=client_tls) as client:
                await client.wait_ready(30)
            seen: list[object] = []
            url = f"https://other.test:{port}"
            async with PokeClient(url, "token", handler, tls=client_tls, on_event=seen.append):
                await wait_until(lambda: any(isinstance(event, Closed) for event in seen))
    assert "CERTIFICATE_VERIFY_FAILED" in repr(seen)


async def test_a_pull_that_nobody_answers_goes_to_the_next_address(
    bridge: FaultyBridge, handler: Handler, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first accepts and never answers."""
    monkeypatch.setattr(opening, "UNANSWERED_S", 0.1)
    monkeypatch.setattr(pulling, "PROGRESS_WITHIN_S", 1.0)
    names("bridge.test", [MUTE, LIVE])
    bridge.commit("a")
    port = urlsplit(bridge.url).port or 0
    with mute_listener(accepts=True, port=port):
        url = f"http://bridge.test:{port}"
        async with PokeClient(url, "token", handler, policy=QUICK):
            await handler.has("a")
    assert bridge.requests[0].host == f"bridge.test:{port}"


async def test_a_pull_at_another_address_wants_the_name_s_certificate(
    tmp_path: Path, handler: Handler, names: Names
) -> None:
    """The certificate is for localhost and 127.0.0.1, and the name asked for is another."""
    files = make_certificates(tmp_path)
    tls = files.client_tls()
    names("localhost", [MUTE, LIVE])
    names("other.test", [MUTE, LIVE])
    async with FaultyBridge().run(files.server_tls()) as bridge:
        bridge.commit("a")
        port = urlsplit(bridge.url).port or 0
        for name, outcome in (("localhost", Pulled), ("other.test", PullFailed)):
            puller = pulling.MailboxPuller(
                f"https://{name}:{port}", handler, device="d", cursor=0, tls=tls
            )
            puller._http._transport._unanswered = 1  # type: ignore[attr-defined]
            assert isinstance(await puller.pull(0, "token"), outcome)
            await puller.close()


async def nothing(_: int) -> None:
    """A pull that finds nothing."""


# --- tokens ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["handshake", "close"])
async def test_a_refused_token_is_replaced(
    bridge: FaultyBridge, handler: Handler, how: str
) -> None:
    """401 and 4401 get a new token first; a provider that keeps giving bad ones is not hurried."""
    if how == "handshake":
        bridge.refusals = [problem(401)] * 3
    async with PokeClient(bridge.url, Tokens(), handler, policy=QUICK) as client:
        await client.wait_ready(5)
        if how == "close":
            while len(bridge.sockets) < 4:
                had = len(bridge.sockets)
                await bridge.close(4401)
                await wait_until(lambda: len(bridge.sockets) > had)  # noqa: B023 - called here
    assert [connect["token"] for connect in bridge.connects] == [
        "token-1",
        "token-2",
        "token-3",
        "token-4",
    ]


async def test_a_token_is_renewed_before_it_runs_out(
    bridge: FaultyBridge, handler: Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one goes to the bridge on the open socket, and with the next pulls."""
    monkeypatch.setattr(core, "MIN_TOKEN_REST_S", 0)
    bridge.ready["expires_in"] = 0.2
    async with PokeClient(bridge.url, Tokens(), handler):
        await wait_until(lambda: bridge.heard)
        assert bridge.heard == [{"type": "auth", "token": "token-2"}]
        await bridge.say(type="poke")
        await wait_until(lambda: len(bridge.pulls) == 2)
    assert bridge.pulls[-1]["token"] == "token-2"
    assert len(bridge.connects) == 1


async def test_a_pull_s_refused_token_is_replaced(bridge: FaultyBridge, handler: Handler) -> None:
    """A pull that is answered with 401 is made again with a new token, which the socket gets."""
    bridge.commit("a")
    bridge.bad_pulls = [problem(401)]
    async with PokeClient(bridge.url, Tokens(), handler):
        await handler.has("a")
        await wait_until(lambda: bridge.heard == [{"type": "auth", "token": "token-2"}])
    assert [pull["token"] for pull in bridge.pulls] == ["token-1", "token-2"]


async def test_a_token_that_can_t_be_had_is_asked_for_again(
    bridge: FaultyBridge, handler: Handler
) -> None:
    """The provider is called again after any exception and any value that is not a token."""
    tokens = Tokens()
    tokens.failures = [OSError("down"), "", "two words", "a\r\nHost: evil", "é", None, 7]
    async with PokeClient(bridge.url, tokens, handler, policy=QUICK) as client:
        await client.wait_ready(5)
    assert [connect["token"] for connect in bridge.connects] == ["token-1"]


# --- the end, and the user's part -------------------------------------------------------------


async def test_leaving_closes_everything(bridge: FaultyBridge, handler: Handler) -> None:
    """The socket is closed in good order, a running handler is cancelled, no task is left."""
    bridge.commit("a")
    handler.go_on.clear()
    async with PokeClient(bridge.url, "token", handler) as client:
        await client.wait_ready(5)
        await wait_until(lambda: handler.running)
        assert any("Shell" in repr(task) for task in asyncio.all_tasks())
    assert handler.cancelled
    assert not any("Shell" in repr(task) for task in asyncio.all_tasks())
    await wait_until(lambda: bridge.closes == [1000])
    assert bridge.acks == []


async def test_leaving_before_anything_happened(bridge: FaultyBridge, handler: Handler) -> None:
    """A client may be left at once, and while nothing answers."""
    async with PokeClient(bridge.url, "token", handler):
        pass
    bridge.silent = True
    bridge.connects.clear()
    async with PokeClient(bridge.url, "token", handler) as client:
        await wait_until(lambda: bridge.connects)
        before = asyncio.all_tasks()
        with pytest.raises(TimeoutError):
            await client.wait_ready(0)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() <= before


async def test_leaving_in_a_hurry_drops_the_socket(bridge: FaultyBridge, handler: Handler) -> None:
    """A task that is cancelled while the close is unanswered leaves no socket open."""
    async with CutProxy("127.0.0.1", int(bridge.url.rpartition(":")[2])) as proxy:
        entered = AsyncExitStack()
        client = PokeClient(f"http://{proxy.address}", "token", handler)
        await entered.enter_async_context(client)
        await client.wait_ready(5)
        socket, connecting = client._socket, client._connecting
        assert socket is not None
        assert connecting is not None
        proxy.cut()
        leaving = asyncio.create_task(entered.aclose())
        await wait_until(lambda: socket.state is State.CLOSING)
        connecting.cancel()
        await leaving
        assert socket.transport.is_closing()


async def test_a_handler_that_ignores_its_cancellation_does_no_harm(
    bridge: FaultyBridge,
) -> None:
    """Leaving waits for it and raises nothing."""
    bridge.commit("a")
    started = asyncio.Event()
    seen: list[object] = []

    async def stubborn(_: Sequence[ReceivedMessage]) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return

    async with PokeClient(bridge.url, "token", stubborn, on_event=seen.append):
        await started.wait()
        await bridge.say(type="poke")
        await wait_until(lambda: '"poke"' in repr(seen))


async def test_the_user_s_own_error_comes_through_as_it_is(
    bridge: FaultyBridge, handler: Handler
) -> None:
    """An exception of the ``async with`` body is not wrapped in a group."""
    with pytest.raises(KeyError, match="mine"):
        async with PokeClient(bridge.url, "token", handler):
            raise KeyError("mine")


async def test_a_fault_of_the_client_s_own_is_not_silent(
    bridge: FaultyBridge, handler: Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is raised in pending waits and when the client is left."""

    def broken(*_: object, **__: object) -> list[Any]:
        raise ZeroDivisionError

    client = PokeClient(bridge.url, "token", handler)
    monkeypatch.setattr(client._core, "handle", broken)
    await client.__aenter__()
    with pytest.raises(ExceptionGroup, match="TaskGroup"):
        await client.wait_ready(5)
    with pytest.raises(ExceptionGroup, match="TaskGroup"):
        await client.wait_stopped()
    with pytest.raises(ExceptionGroup, match="TaskGroup"):
        await client.__aexit__(None, None, None)


async def test_own_pulls(bridge: FaultyBridge) -> None:
    """``on_poke`` replaces the mailbox's pulls: it gets the cursor, and is retried."""
    asked: list[int] = []
    errors = [OSError("my database is down")]

    async def pull(after: int) -> int:
        asked.append(after)
        if errors:
            raise errors.pop()
        return 5

    async with PokeClient(bridge.url, "token", on_poke=pull, cursor=3, policy=QUICK) as client:
        await wait_until(lambda: client.cursor == 5)
        assert asked == [3, 3]
        await bridge.say(type="poke", version=5)
        await bridge.say(type="poke", version=6)
        await wait_until(lambda: len(asked) == 3)
    assert asked == [3, 3, 5]
    assert bridge.pulls == []


async def test_own_pulls_need_no_cursor(bridge: FaultyBridge) -> None:
    """Data without versions: every poke is a call."""
    calls = 0

    async def pull(_: int) -> None:
        nonlocal calls
        calls += 1

    async with PokeClient(bridge.url, "token", on_poke=pull, cursor=3) as client:
        await wait_until(lambda: calls == 1)
        await bridge.say(type="poke")
        await wait_until(lambda: calls == 2)
        await wait_until(lambda: client.cursor == 3)


async def test_an_observer_is_shown_what_happens(
    bridge: FaultyBridge, handler: Handler, caplog: pytest.LogCaptureFixture
) -> None:
    """The observer gets every step without tokens. Its exceptions are only logged."""
    seen: list[object] = []

    def observe(event: object) -> None:
        seen.append(event)
        raise ValueError("an observer's own fault")

    bridge.commit("a")
    async with PokeClient(bridge.url, "s3cret", handler, on_event=observe, policy=QUICK):
        await wait_until(lambda: Pulled(1) in seen)
        await bridge.close(1012, "deploy")
        await wait_until(lambda: Closed(1012, "deploy") in seen)
        url = f"{bridge.url.replace('http', 'ws')}/v1/connect"
        await wait_until(lambda: seen.count(Connect(url)) == 2)
    assert Tick() not in seen
    assert Pull(0) in seen
    assert "s3cret" not in repr(seen)
    assert "s3cret" not in caplog.text
    assert "own fault" in caplog.text


async def test_no_token_is_logged(
    bridge: FaultyBridge, handler: Handler, caplog: pytest.LogCaptureFixture
) -> None:
    """Not in the client's own log, whatever goes wrong."""
    caplog.set_level(logging.DEBUG, "pokebridge.client")
    bridge.refusals = [problem(401), Bad(503)]
    bridge.bad_pulls = [problem(401), Bad(500)]
    async with PokeClient(bridge.url, "s3cret", handler, policy=QUICK) as client:
        await client.wait_ready(5)
        await wait_until(lambda: len(bridge.pulls) >= 3)
    own = [record for record in caplog.records if record.name == "pokebridge.client"]
    assert own
    assert "s3cret" not in "".join(record.getMessage() for record in own)


async def test_what_is_wrong_from_the_start_is_said_at_once(handler: Handler) -> None:
    """A wrong argument, or a call out of order, is refused without the network."""
    with pytest.raises(ConfigError, match="http"):
        PokeClient("ws://127.0.0.1", "token", handler)
    with pytest.raises(InputError, match="device"):
        PokeClient("http://127.0.0.1", "token", handler, device="my phone")
    no_pull: OnPoke | None = None
    with pytest.raises(TypeError, match="either"):
        PokeClient("http://127.0.0.1", "token", on_poke=no_pull)
    client = PokeClient("http://127.0.0.1:1", "token", handler)
    with pytest.raises(RuntimeError, match="async with"):
        await client.wait_ready()
    async with client:
        with pytest.raises(RuntimeError, match="once"):
            await client.__aenter__()
