"""The publishers: what they merge, tag and batch, and what their callers hear of a failure."""

import asyncio
import gc
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from pokebridge import http_publisher, poke_merger
from pokebridge import publisher as publisher_module
from pokebridge.errors import (
    AuthError,
    ConfigError,
    ForbiddenError,
    InputError,
    NotPublishedError,
    SignalRefusedError,
    TransportError,
)
from pokebridge.model import MAX_VERSION, Poke
from pokebridge.publisher import HttpPublisher, Publisher
from pokebridge.sharding import shard_of
from pokebridge.transport.base import Feed, Selection, Signal
from pokebridge.transport.memory import MemoryTransport
from pokebridge.wire import Disconnect, decode_signal
from tests.client.between import DRIPS, STRANGERS, Between, answer
from tests.support import wait_until

BOB = "urn:user:bob"
EVE = "urn:user:eve"


class Spy(MemoryTransport):
    """The in-process transport, which also keeps what was published and can be held or broken."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Sequence[Signal]] = []
        self.open = asyncio.Event()
        self.open.set()
        self.error: Exception | None = None

    async def publish(self, signals: Sequence[Signal]) -> None:
        """Keep them, wait for the gate, and fail or deliver."""
        self.calls.append(signals)
        await self.open.wait()
        if self.error:
            raise self.error
        await super().publish(signals)

    @property
    def pokes(self) -> list[Poke]:
        """Every poke that was published, in order."""
        found: list[Poke] = []
        for signal in (signal for call in self.calls for signal in call):
            decoded = decode_signal(signal.body)
            assert isinstance(decoded, list)
            found += decoded
        return found


class Ear:
    """Keeps what a subscription brings."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    def on_signal(self, body: bytes, tag: str | None) -> None:
        """Keep it."""
        self.bodies.append(body)

    def on_gap(self, selection: Selection, reason: str) -> None:
        """The in-process transport has none."""
        raise AssertionError(reason)


async def test_a_poke_has_arrived_when_the_call_returns() -> None:
    """``poke`` returns after the transport took the signal, in the short form."""
    transport, ear = MemoryTransport(), Ear()
    await transport.subscribe(Feed.ALL, ear)
    async with Publisher(transport) as publisher:
        await publisher.poke(BOB, version=17)
        assert ear.bodies == [b'{"recipient":"urn:user:bob","version":17}']


async def test_a_signal_is_tagged_with_its_shard() -> None:
    """Only who subscribes to the recipient's shard hears it, and its untagged feed does not."""
    transport, right, wrong = MemoryTransport(), Ear(), Ear()
    await transport.subscribe(shard_of(BOB, 7), right)
    await transport.subscribe((shard_of(BOB, 7) + 1) % 7, wrong)
    await transport.subscribe(Feed.UNTAGGED, wrong)
    async with Publisher(transport, shard_count=7) as publisher:
        await publisher.poke(BOB)
        await publisher.disconnect(BOB)
    assert decode_signal(right.bodies[0]) == [Poke(BOB)]
    assert decode_signal(right.bodies[1]) == Disconnect(BOB)
    assert wrong.bodies == []


@pytest.mark.parametrize(
    ("versions", "merged"), [((3, 9, 5), 9), ((3, None, 5), None), ((None, 3), None)]
)
async def test_pokes_of_one_recipient_become_one(
    versions: Sequence[int | None], merged: int | None
) -> None:
    """The highest version wins, and an unknown one over all, since it may be newer."""
    transport = Spy()
    async with Publisher(transport) as publisher:
        await asyncio.gather(*(publisher.poke(BOB, version) for version in versions))
    assert transport.pokes == [Poke(BOB, merged)]


async def test_a_batch_is_one_call_with_one_signal_a_shard() -> None:
    """A thousand recipients cost one publish call; every signal holds its own shard's pokes."""
    transport = Spy()
    recipients = [f"urn:user:{number}" for number in range(1000)]
    async with Publisher(transport, shard_count=10) as publisher:
        await asyncio.gather(*map(publisher.poke, recipients))
    [signals] = transport.calls
    assert sorted(signal.shard or 0 for signal in signals) == list(range(10))
    assert sorted(poke.recipient for poke in transport.pokes) == sorted(recipients)
    for signal in signals:
        pokes = decode_signal(signal.body)
        assert isinstance(pokes, list)
        assert {shard_of(poke.recipient, 10) for poke in pokes} == {signal.shard}


async def test_a_large_shard_is_cut_into_signals() -> None:
    """No signal carries more than ``max_pokes_per_signal``."""
    transport = Spy()
    async with Publisher(transport, shard_count=1, max_pokes_per_signal=4) as publisher:
        await publisher.publish([Poke(f"u{number}") for number in range(10)])
    sizes = []
    for signal in transport.calls[0]:
        pokes = decode_signal(signal.body)
        assert isinstance(pokes, list)
        sizes.append(len(pokes))
    assert sizes == [4, 4, 2]


async def test_a_failed_batch_fails_all_its_callers_and_no_others() -> None:
    """Everyone merged into it gets the error; the next batch is sent afresh."""
    transport = Spy()
    transport.error = TransportError("the engine is down")
    async with Publisher(transport) as publisher:
        results = await asyncio.gather(
            publisher.poke(BOB), publisher.poke(BOB), publisher.poke(EVE), return_exceptions=True
        )
        assert [type(result) for result in results] == [TransportError] * 3
        transport.error = None
        await publisher.poke(BOB)


async def test_an_error_of_the_engine_s_own_is_not_lost() -> None:
    """Even what no adapter should raise reaches the caller instead of leaving it waiting."""
    transport = Spy()
    transport.error = RuntimeError("a bug in an adapter")
    async with Publisher(transport) as publisher:
        with pytest.raises(RuntimeError, match="a bug"):
            await publisher.poke(BOB)


@pytest.mark.parametrize(
    "poke", [Poke(""), Poke("two words"), Poke(BOB, 0), Poke(BOB, MAX_VERSION + 1)]
)
async def test_a_bad_poke_harms_only_its_caller(poke: Poke) -> None:
    """It is refused before it can spoil the signal that it would share with others."""
    transport = Spy()
    async with Publisher(transport) as publisher:
        results = await asyncio.gather(
            publisher.publish([Poke(EVE), poke]), publisher.poke(BOB), return_exceptions=True
        )
        assert isinstance(results[0], InputError)
        with pytest.raises(InputError):
            await publisher.disconnect("two words")
    assert transport.pokes == [Poke(BOB)]


async def test_a_cancelled_caller_takes_nobody_along() -> None:
    """A cancelled caller leaves the batch to the others. A later failure does not reach it."""
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    transport = Spy()
    transport.open.clear()
    async with Publisher(transport) as publisher:
        impatient = asyncio.create_task(publisher.poke(BOB))
        patient = asyncio.create_task(publisher.poke(EVE))
        await wait_until(lambda: transport.calls)
        impatient.cancel()
        with suppress(asyncio.CancelledError):
            await impatient
        transport.open.set()
        await patient
        transport.open.clear()
        transport.error = TransportError("the engine is down")
        impatient = asyncio.create_task(publisher.poke(BOB))
        await wait_until(lambda: len(transport.calls) == 2)
        impatient.cancel()
        transport.open.set()
    assert transport.pokes == [Poke(BOB), Poke(EVE), Poke(BOB)]
    del impatient, transport.error  # their tracebacks hold the batch
    gc.collect()
    assert complaints == []


async def test_a_slow_send_does_not_hold_up_the_next() -> None:
    """Batches are sent side by side, up to a limit; beyond it they merge into a larger one."""
    transport = Spy()
    transport.open.clear()
    async with Publisher(transport, linger_s=0) as publisher:
        callers: list[asyncio.Task[None]] = []
        limit = poke_merger.MAX_CONCURRENT_SENDS
        for number in range(limit):
            callers.append(asyncio.create_task(publisher.poke(f"u{number}")))
            await wait_until(lambda: len(transport.calls) == len(callers))
        for number in range(5):
            callers.append(asyncio.create_task(publisher.poke(f"late{number}")))
            for _ in range(5):  # turns of the loop, in which a send would start
                await asyncio.sleep(0)
        assert len(transport.calls) == limit
        transport.open.set()
        await asyncio.gather(*callers)
    assert len(transport.calls) == limit + 1
    assert len(transport.pokes) == limit + 5


async def test_callers_wait_when_too_much_is_pending() -> None:
    """At ``max_pending`` recipients a new one waits, a known one merges; all arrive in the end."""
    transport = Spy()
    transport.open.clear()
    async with Publisher(transport, max_pending=2, shard_count=1) as publisher:
        first = asyncio.create_task(publisher.publish([Poke("a"), Poke("b"), Poke("c"), Poke("a")]))
        merging = asyncio.create_task(publisher.poke("b", 1))
        await wait_until(lambda: transport.calls)
        assert len(transport.pokes) == 2
        assert not first.done()
        transport.open.set()
        await asyncio.gather(first, merging)
    assert {poke.recipient for poke in transport.pokes} == {"a", "b", "c"}


async def test_a_poke_waits_for_no_others_while_nothing_is_sent() -> None:
    """A first poke is sent at once. The linger applies only while other pokes are being sent."""
    transport = Spy()
    async with Publisher(transport, linger_s=3600) as publisher:
        await publisher.poke(BOB)
        await publisher.poke(EVE)
    assert transport.pokes == [Poke(BOB), Poke(EVE)]


async def test_pokes_merge_while_others_are_sent() -> None:
    """Pokes during a send share one batch, which is sent when that send has ended."""
    transport = Spy()
    transport.open.clear()
    async with Publisher(transport, linger_s=3600, shard_count=1) as publisher:
        callers = [asyncio.create_task(publisher.poke(BOB))]
        await wait_until(lambda: transport.calls)
        for version in (1, 2, 3):
            callers += [asyncio.create_task(publisher.poke(each, version)) for each in (BOB, EVE)]
            for _ in range(5):  # turns of the loop, in which a send would start
                await asyncio.sleep(0)
        assert len(transport.calls) == 1
        transport.open.set()
        await asyncio.gather(*callers)
    assert transport.pokes == [Poke(BOB), Poke(BOB, 3), Poke(EVE, 3)]
    assert len(transport.calls) == 2


async def test_close_sends_what_has_gathered() -> None:
    """Closing flushes at once, however long the linger, and refuses what comes after."""
    transport = Spy()
    transport.open.clear()
    publisher = Publisher(transport, linger_s=3600)
    callers = [asyncio.create_task(publisher.poke(BOB))]
    await wait_until(lambda: transport.calls)
    callers.append(asyncio.create_task(publisher.poke(EVE)))
    await asyncio.sleep(0)
    closing = asyncio.create_task(publisher.close())
    await wait_until(lambda: len(transport.calls) == 2)  # beside the one that hangs
    transport.open.set()
    await asyncio.gather(closing, *callers)
    assert transport.pokes == [Poke(BOB), Poke(EVE)]
    with pytest.raises(TransportError, match="closed"):
        await publisher.poke(BOB)
    await publisher.close()


async def test_who_waits_for_room_hears_of_the_close() -> None:
    """A caller whose pokes never got in is told so, since nothing may be lost silently."""
    transport = Spy()
    transport.open.clear()
    publisher = Publisher(transport, max_pending=1)
    sent = asyncio.create_task(publisher.poke(BOB))
    await wait_until(lambda: transport.calls)
    waiting = asyncio.create_task(publisher.poke(EVE))
    await asyncio.sleep(0)
    closing = asyncio.create_task(publisher.close())
    with pytest.raises(TransportError, match="closed"):
        await waiting
    transport.open.set()
    await asyncio.gather(sent, closing)
    assert transport.pokes == [Poke(BOB)]


async def test_an_empty_publish_is_nothing() -> None:
    """No pokes, no signal, no waiting."""
    transport = Spy()
    async with Publisher(transport) as publisher:
        await publisher.publish([])
    assert transport.calls == []


# --- over HTTP ------------------------------------------------------------------------------


class Endpoint:
    """A server that answers ``POST /v1/pokes`` as it is told to and keeps what it got."""

    def __init__(self) -> None:
        self.url = ""
        self.status = 202
        self.requests: list[tuple[str, list[str]]] = []

    async def answer(self, request: web.Request) -> web.Response:
        """Keep the request and say what the test wants."""
        body = await request.json()
        self.requests.append((request.headers["Authorization"], body["recipients"]))
        if self.status == 202:
            return web.json_response({"accepted": len(body["recipients"])}, status=202)
        told = {"type": "about:blank", "title": "No", "status": self.status, "detail": "as asked"}
        return web.json_response(told, status=self.status, content_type="application/problem+json")


def accepted(count: int) -> list[bytes]:
    """The bridge's answer to so many pokes."""
    body = f'{{"accepted":{count}}}'
    return answer(202, body=body, media_type="application/json")


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    """A running endpoint."""
    endpoint = Endpoint()
    app = web.Application()
    app.router.add_post("/v1/pokes", endpoint.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    endpoint.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield endpoint
    await runner.cleanup()


async def test_http_pokes_are_merged_and_authorised(endpoint: Endpoint) -> None:
    """Concurrent pokes make one request, with the token that the provider gave for it."""

    async def fresh_token() -> str:
        return f"token-{len(endpoint.requests)}"

    async with HttpPublisher(endpoint.url, fresh_token) as publisher:
        await asyncio.gather(publisher.poke(BOB, 3), publisher.poke(BOB, 4), publisher.poke(EVE))
        await publisher.poke(BOB)
    assert endpoint.requests == [("Bearer token-0", [BOB, EVE]), ("Bearer token-1", [BOB])]


async def test_http_requests_keep_to_the_limit(endpoint: Endpoint) -> None:
    """2,500 recipients make three requests of at most 1,000."""
    async with HttpPublisher(endpoint.url, "token") as publisher:
        await publisher.publish([Poke(f"u{number}") for number in range(2500)])
    assert [len(recipients) for _, recipients in endpoint.requests] == [1000, 1000, 500]


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, AuthError),
        (403, ForbiddenError),
        (422, InputError),
        (429, TransportError),
        (503, TransportError),
        (302, TransportError),
    ],
)
async def test_http_answers_become_errors(
    endpoint: Endpoint, status: int, error: type[Exception]
) -> None:
    """Each kind of refusal has its own error, with the server's reason."""
    endpoint.status = status
    async with HttpPublisher(endpoint.url, "token") as publisher:
        with pytest.raises(error, match=f"{status}: as asked") as caught:
            await publisher.poke(BOB)
    assert type(caught.value) is error


@pytest.mark.parametrize("stranger", STRANGERS)
async def test_http_strangers_have_accepted_nothing(endpoint: Endpoint, stranger: str) -> None:
    """What stands between answers: the poke may not have been accepted, and a retry is right."""
    async with Between(urlsplit(endpoint.url).port or 0).run() as between:
        between.answers["/v1/pokes"] = [STRANGERS[stranger]]
        async with HttpPublisher(between.url, "token") as publisher:
            with pytest.raises(TransportError):
                await publisher.poke(BOB)
            await publisher.poke(BOB)
    assert endpoint.requests == [("Bearer token", [BOB])]


@pytest.mark.parametrize("drip", DRIPS)
async def test_http_answers_that_drip_hold_up_nobody(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, drip: str
) -> None:
    """Eight such answers are given up, the pokes behind them are sent, and closing ends."""
    monkeypatch.setattr(http_publisher, "HTTP_TIMEOUT_S", 0.5)
    async with Between(urlsplit(endpoint.url).port or 0).run() as between:
        between.answers["/v1/pokes"] = [DRIPS[drip]] * 8
        async with HttpPublisher(between.url, "token", linger_s=0) as publisher:
            stuck: list[asyncio.Task[None]] = []

            async def add_one() -> None:
                before = len(between.asked)
                stuck.append(asyncio.create_task(publisher.poke(f"u{len(stuck)}")))
                # On a busy machine one is given up before it has got to the endpoint.
                await wait_until(lambda: len(between.asked) > before or stuck[-1].done())

            while between.answers["/v1/pokes"]:
                await add_one()
            monkeypatch.undo()  # this one has its time, also on a busy machine
            await publisher.poke(BOB)
            outcomes = await asyncio.gather(*stuck, return_exceptions=True)
    assert all(isinstance(outcome, TransportError) for outcome in outcomes)
    assert endpoint.requests == [("Bearer token", [BOB])]


async def test_http_closing_does_not_wait_for_ever(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who still waits for a token or an answer gets an error soon after ``close``."""
    monkeypatch.setattr(poke_merger, "CLOSE_TIMEOUT_S", 0.3)

    async def never() -> str:
        await asyncio.Event().wait()
        return ""

    publisher = HttpPublisher(endpoint.url, never, linger_s=0, max_pending=10)
    calls = [asyncio.create_task(publisher.poke(f"u{number}")) for number in range(20)]
    await asyncio.sleep(0)
    await publisher.close()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, TransportError) for outcome in outcomes)


async def test_http_a_slow_line_has_its_time(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large request may take as long as 16 kB a second take."""
    monkeypatch.setattr(http_publisher, "HTTP_TIMEOUT_S", 0.2)
    answer = [*[b""] * 20, *accepted(1000)]  # a second later
    async with Between(urlsplit(endpoint.url).port or 0).run() as between:
        between.answers["/v1/pokes"] = [answer]
        async with HttpPublisher(between.url, "token") as publisher:
            await publisher.publish([Poke(f"u{n}".ljust(200, "x")) for n in range(1000)])


async def test_http_nobody_there() -> None:
    """An address where nobody listens is a TransportError, and a wrong one a ConfigError."""
    async with HttpPublisher("http://127.0.0.1:1", "token") as publisher:
        with pytest.raises(TransportError, match="can't be reached"):
            await publisher.poke(BOB)
    with pytest.raises(ConfigError, match="http"):
        HttpPublisher("ws://127.0.0.1", "token")


# --- one bad poke harms only itself ---------------------------------------------------------------


class Limited(Spy):
    """A transport that tells its limit, and refuses some shards."""

    max_signal_bytes = 250

    def __init__(self) -> None:
        super().__init__()
        self.accepted: set[str] = set()
        self.forbidden: set[int | None] = set()
        self.failure: Exception = SignalRefusedError("not permitted")

    async def publish(self, signals: Sequence[Signal]) -> None:
        """Accept what fits and is permitted, in whole calls only."""
        await super().publish(signals)
        assert all(len(signal.body) <= self.max_signal_bytes for signal in signals)
        if any(signal.shard in self.forbidden for signal in signals):
            raise self.failure
        for signal in signals:
            decoded = decode_signal(signal.body)
            assert isinstance(decoded, list)
            self.accepted.update(poke.recipient for poke in decoded)


@pytest.fixture
async def limited() -> Limited:
    """Such a transport."""
    return Limited()


async def test_signals_stay_below_the_engines_limit(limited: Limited) -> None:
    """Pokes of one shard go into as many signals as it takes, in one publish."""
    recipients = [f"{n:0100}" for n in range(20)]
    publisher = Publisher(limited, shard_count=1)
    await publisher.publish_now([Poke(recipient) for recipient in recipients])
    assert limited.accepted == set(recipients)
    assert len(limited.calls) == 1


async def test_a_poke_that_fits_in_no_signal_is_named_alone(limited: Limited) -> None:
    """The others are published, and the error says that this one never will be."""
    publisher = Publisher(limited, shard_count=1)
    with pytest.raises(NotPublishedError, match="accepts 250") as caught:
        await publisher.publish_now([Poke(BOB), Poke("x" * 256, 2**53 - 1), Poke(EVE)])
    assert caught.value.recipients == caught.value.too_large == {"x" * 256}
    assert limited.accepted == {BOB, EVE}
    assert publisher.published == 2


@pytest.mark.parametrize(
    "failure", [SignalRefusedError("no"), TransportError("no"), TypeError("a defect")], ids=repr
)
async def test_a_shard_that_is_refused_keeps_no_other_back(
    limited: Limited, failure: Exception
) -> None:
    """Whatever the adapter raises, the signals are tried one by one."""
    recipients = [f"urn:user:{n}" for n in range(50)]
    limited.failure, limited.forbidden = failure, {3}
    with pytest.raises(NotPublishedError) as caught:
        await Publisher(limited, shard_count=10).publish_now([Poke(r) for r in recipients])
    bad = {each for each in recipients if shard_of(each, 10) == 3}
    assert caught.value.recipients == bad
    assert not caught.value.too_large
    assert limited.accepted == set(recipients) - bad


async def test_an_engine_that_is_away_is_not_asked_for_each_signal(limited: Limited) -> None:
    """After a few failures the publish fails as a whole."""
    limited.error = TransportError("away")
    with pytest.raises(TransportError, match="away") as caught:
        await Publisher(limited, shard_count=100).publish_now([Poke(f"{n}") for n in range(100)])
    assert not isinstance(caught.value, NotPublishedError)
    assert len(limited.calls) <= 2 + publisher_module.MAX_ERRORS


async def test_callers_hear_of_their_own_pokes_alone(limited: Limited) -> None:
    """Of two that were merged, the one whose poke was refused hears so."""
    limited.forbidden = {shard_of(EVE)}
    publisher = Publisher(limited)
    outcomes = await asyncio.gather(
        publisher.poke(BOB), publisher.poke(EVE), return_exceptions=True
    )
    assert outcomes[0] is None
    assert isinstance(outcomes[1], NotPublishedError)
    assert outcomes[1].recipients == {EVE}
