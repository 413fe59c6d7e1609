"""The channel between a hub and a worker: whole, in order, bounded, and broken for good."""

import asyncio
from http import HTTPStatus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pokebridge.errors import (
    MailboxFullError,
    NotPublishedError,
    PokebridgeError,
    RefusedError,
    SignalRefusedError,
    TransportError,
)
from pokebridge.model import Poke
from pokebridge.workers import channel as channel_module
from pokebridge.workers import frames
from pokebridge.workers.calls import Method
from pokebridge.workers.frames import ChannelError, Deframer, Framer, Wake, decode_to_worker
from pokebridge.workers.methods import HTTP, PUBLISH, HttpRequest, HttpResponse
from tests.support.waiting import wait_until
from tests.workers.ends import Ends


@given(st.lists(st.integers(0, 2**40), max_size=20), st.integers(1, 30))
def test_frames_arrive_whole_however_the_bytes_are_cut(numbers: list[int], size: int) -> None:
    """Whatever pieces the kernel makes, the messages come out as they went in, in order."""
    framer, deframer = Framer(), Deframer()
    for number in numbers:
        framer.add(Wake(number))
    data = framer.take()
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    frames_heard = [frame for piece in pieces for frame in deframer.feed(piece)]
    heard = [message for frame in frames_heard for message in decode_to_worker(frame)]
    assert heard == [Wake(number) for number in numbers]


def test_a_message_that_is_too_long_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused where it is made, and those before and after it are sent."""
    monkeypatch.setattr(frames, "MAX_MESSAGE_BYTES", 100)
    framer = Framer()
    framer.add(Wake(1))
    with pytest.raises(ChannelError, match="too long"):
        framer.add(frames.Poke([0], None, b"x" * 101))
    framer.add(Wake(2))
    (frame,) = Deframer().feed(framer.take())
    assert decode_to_worker(frame) == [Wake(1), Wake(2)]


def test_a_message_that_is_too_long_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent for it where it would have been the first of its frame."""
    monkeypatch.setattr(frames, "MAX_MESSAGE_BYTES", 100)
    framer = Framer()
    with pytest.raises(ChannelError, match="too long"):
        framer.add(frames.Poke([0], None, b"x" * 101))
    assert framer.take() == b""


def test_large_messages_share_no_frame() -> None:
    """However much one turn of the loop sends, a frame can be received."""
    sent = [frames.Poke([0], n, bytes(frames.MAX_MESSAGE_BYTES - 100)) for n in range(3)]
    framer = Framer()
    for message in sent:
        framer.add(Wake(1))
        framer.add(message)
    heard = [decode_to_worker(frame) for frame in Deframer().feed(framer.take())]
    assert heard == [[Wake(1), message] for message in sent]


def test_a_length_from_a_defect_allocates_nothing() -> None:
    """A frame that says it has gigabytes is an error at once."""
    with pytest.raises(ChannelError):
        list(Deframer().feed(b"\xff\xff\xff\xff"))


async def test_messages_arrive_in_order(ends: Ends) -> None:
    """Messages beyond the kernel's buffer arrive in the order of sending."""
    sent = [frames.Poke([0], version, b"x" * 1000) for version in range(3000)]
    for message in sent:
        ends.hub.send(message)
    await wait_until(lambda: len(ends.worker_heard) == len(sent))
    assert ends.worker_heard == sent


async def test_a_peer_that_reads_slowly_congests_it(ends: Ends) -> None:
    """The sender learns when too much is unsent, and when it has been sent."""
    drained: list[bool] = []
    ends.hub.on_drained = lambda: drained.append(True)
    ends.worker._transport.pause_reading()  # type: ignore[union-attr]
    for _ in range(3):
        ends.hub.send(frames.Poke([0], None, bytes(channel_module.CONGESTED_BYTES)))
    await wait_until(lambda: ends.hub.is_congested)
    ends.worker._transport.resume_reading()  # type: ignore[union-attr]
    await wait_until(lambda: bool(drained))
    assert not ends.hub.is_congested


async def test_it_breaks_when_too_much_is_unsent(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue is bounded: beyond it the channel breaks at both ends and accepts nothing."""
    monkeypatch.setattr(channel_module, "MAX_UNSENT_BYTES", 1000)
    ends.hub.send(frames.Poke([0], None, bytes(1001)))
    await wait_until(lambda: sorted(ends.broken) == ["hub", "worker"])
    ends.hub.send(Wake(1))
    ends.worker.send(frames.Ready())


async def test_any_number_of_long_calls_breaks_nothing(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one turn of the loop would send waits for room, on the way there and on the way back."""
    monkeypatch.setattr(channel_module, "MAX_UNSENT_BYTES", 3 * channel_module.CONGESTED_BYTES)
    echo: Method[[bytes], bytes] = Method("echo", tuple[bytes], bytes)

    async def answer(text: bytes) -> bytes:
        return text

    ends.answers.offer(echo, answer)
    texts = [b"%d" % number * channel_module.CONGESTED_BYTES for number in range(10)]
    assert await asyncio.gather(*(ends.calls.call(echo, text) for text in texts)) == texts
    assert ends.broken == []


async def test_what_is_no_message_breaks_it(ends: Ends) -> None:
    """A malformed message of the peer breaks the channel."""
    ends.hub._transport.write(b"\0\0\0\x01\xc1")  # type: ignore[union-attr]
    await wait_until(lambda: sorted(ends.broken) == ["hub", "worker"])


_ERRORS = (
    TransportError("the engine is away"),
    MailboxFullError("full"),
    NotPublishedError("one of 2", frozenset({"urn:user:bob"}), frozenset({"urn:user:eve"})),
    SignalRefusedError("too large", is_too_large=True),
    RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "busy", {"Retry-After": "3"}),
)


@pytest.mark.parametrize("error", _ERRORS, ids=lambda error: type(error).__name__)
async def test_an_error_is_raised_where_the_call_came_from(
    ends: Ends, error: PokebridgeError
) -> None:
    """Its class, its text and what it knows are those that the hub raised."""

    async def publish(_: object) -> None:
        raise error

    ends.answers.offer(PUBLISH, publish)
    with pytest.raises(type(error)) as caught:
        await ends.calls.call(PUBLISH, [Poke("urn:user:bob")])
    assert str(caught.value) == str(error)
    assert vars(caught.value) == vars(error)


async def test_a_defect_in_the_hub_is_answered(
    ends: Ends, caplog: pytest.LogCaptureFixture
) -> None:
    """After a defect in the hub the caller gets an error."""

    async def publish(_: object) -> None:
        raise ZeroDivisionError

    ends.answers.offer(PUBLISH, publish)
    with pytest.raises(PokebridgeError, match="a defect"):
        await ends.calls.call(PUBLISH, [])


async def test_a_request_with_too_long_an_answer_fails_alone(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller gets an error that the answer is too long. The channel continues."""

    async def http(_: HttpRequest) -> HttpResponse:
        return HttpResponse(200, [], bytes(1000))

    ends.answers.offer(HTTP, http)
    monkeypatch.setattr(frames, "MAX_MESSAGE_BYTES", 500)
    request = HttpRequest(1, "GET", "/", b"/", b"", "http", "1.1", [], None, None, has_body=False)
    with pytest.raises(PokebridgeError, match="too long"):
        await ends.calls.call(HTTP, request)
    assert not ends.broken
