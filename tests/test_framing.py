"""RFC 6455 framing, byte by byte."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame
from websockets.frames import Opcode as TheirOpcode

from pokebridge.errors import FrameError
from pokebridge.framing import (
    MAX_FRAMES_PER_MESSAGE,
    MAX_MESSAGE_BYTES,
    FrameEvent,
    FrameParser,
    Opcode,
    decode_close,
    encode_close,
    encode_frame,
    whole_text,
)


def client_frame(opcode: int, payload: bytes, *, fin: bool = True) -> bytes:
    """A masked frame as the `websockets` library writes it."""
    return Frame(TheirOpcode(opcode), payload, fin).serialize(mask=True)


def feed_in_chunks(data: bytes, chunk_bytes: int) -> int | None:
    """Feed ``data`` in chunks; the close code of the error that ends it, if one does."""
    parser = FrameParser()
    try:
        for start in range(0, len(data), chunk_bytes):
            parser.feed(data[start : start + chunk_bytes])
    except FrameError as error:
        return error.close_code
    return None


texts = st.text(max_size=400).map(str.encode)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[bytes, list[FrameEvent]]:
    """Valid client bytes, with fragments and control frames between, and what they mean."""
    data, events = b"", []
    for _ in range(draw(st.integers(1, 4))):
        payload = draw(texts)
        cuts = sorted(draw(st.lists(st.integers(0, len(payload)), max_size=3)))
        parts = [payload[a:b] for a, b in zip([0, *cuts], [*cuts, len(payload)], strict=True)]
        for number, part in enumerate(parts):
            opcode = Opcode.TEXT if number == 0 else Opcode.CONTINUATION
            data += client_frame(opcode, part, fin=number == len(parts) - 1)
            if number < len(parts) - 1 and draw(st.booleans()):
                ping = draw(st.binary(max_size=125))
                data += client_frame(Opcode.PING, ping)
                events.append(FrameEvent(Opcode.PING, ping))
        events.append(FrameEvent(Opcode.TEXT, payload))
    return data, events


@given(conversations(), st.data())
def test_any_split_of_valid_bytes_means_the_same(
    conversation: tuple[bytes, list[FrameEvent]], data: st.DataObject
) -> None:
    """Fragments and control frames come out whole and in order however TCP cuts the bytes."""
    stream, expected = conversation
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    parser, events = FrameParser(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        events += parser.feed(stream[start:end])
    assert events == expected
    assert parser.idle


@given(st.binary(max_size=300))
def test_garbage_never_does_worse_than_a_frame_error(garbage: bytes) -> None:
    """Whatever bytes come, the parser returns events, waits, or raises FrameError with a code."""
    code = feed_in_chunks(garbage, 1)
    assert code in {None, 1002, 1003, 1007, 1008, 1009}


MASK = b"\x00\x00\x00\x00"
BROKEN = {
    "unmasked": (b"\x81\x02{}", 1002),
    "rsv1": (b"\xc1\x82" + MASK + b"{}", 1002),
    "rsv2": (b"\xa1\x82" + MASK + b"{}", 1002),
    "rsv3": (b"\x91\x82" + MASK + b"{}", 1002),
    "reserved data opcode": (b"\x83\x80" + MASK, 1002),
    "reserved control opcode": (b"\x8b\x80" + MASK, 1002),
    "binary": (b"\x82\x82" + MASK + b"{}", 1003),
    "binary, first fragment": (b"\x02\x82" + MASK + b"{}", 1003),
    "continuation of nothing": (b"\x80\x82" + MASK + b"{}", 1002),
    "text inside a fragmented text": (
        client_frame(1, b"{", fin=False) + client_frame(1, b"}"),
        1002,
    ),
    "fragmented ping": (b"\x09\x80" + MASK, 1002),
    "long ping": (b"\x89\xfe\x00\x7e" + MASK + b"x" * 126, 1002),
    "length not shortest": (b"\x81\xfe\x00\x02" + MASK + b"{}", 1002),
    "9 KiB and one": (client_frame(1, b"x" * (MAX_MESSAGE_BYTES + 1)), 1009),
    "64-bit length": (b"\x81\xff" + struct.pack("!Q", 1 << 40), 1009),
    "9 KiB and one in fragments": (
        client_frame(1, b"x" * 9000, fin=False) + client_frame(0, b"x" * 217),
        1009,
    ),
    "not UTF-8": (client_frame(1, b"\xff\xfe"), 1007),
    "not UTF-8 across fragments": (
        client_frame(1, b"\xe2\x98", fin=False) + client_frame(0, b"x"),
        1007,
    ),
}


@pytest.mark.parametrize(("data", "code"), BROKEN.values(), ids=BROKEN.keys())
def test_each_broken_rule_has_its_close_code(data: bytes, code: int) -> None:
    """Every way to break the frame rules is refused with the code that the contract names."""
    with pytest.raises(FrameError) as error:
        FrameParser().feed(data)
    assert error.value.close_code == code


@pytest.mark.parametrize(("data", "code"), BROKEN.values(), ids=BROKEN.keys())
def test_each_broken_rule_is_seen_byte_by_byte_too(data: bytes, code: int) -> None:
    """The same when the bytes trickle in one at a time."""
    assert feed_in_chunks(data, 1) == code


def parsed(data: bytes) -> list[FrameEvent] | int:
    """What a parser makes of ``data``: events, or a close code."""
    try:
        return FrameParser().feed(data)
    except FrameError as error:
        return error.close_code


@given(
    st.one_of(
        st.builds(client_frame, st.sampled_from([1, 1, 9]), st.binary(max_size=130)),
        st.builds(client_frame, st.just(1), texts, fin=st.booleans()),
        conversations().map(lambda conversation: conversation[0]),
        st.binary(max_size=20),
        st.binary(max_size=140).map(lambda rest: b"\x81" + rest),
    )
)
def test_a_whole_short_text_is_what_a_parser_finds(data: bytes) -> None:
    """The short way reads one frame as the parser does, errors included, or leaves it to it."""
    counted: list[bool] = []

    def count() -> bool:
        counted.append(True)
        return True

    expected = parsed(data)
    try:
        text = whole_text(data, count)
    except FrameError as error:
        found: list[FrameEvent] | int = error.close_code
    else:
        assert len(counted) == (text is not None)
        found = expected if text is None else [FrameEvent(Opcode.TEXT, text)]
    assert found == expected


@pytest.mark.parametrize("size", [0, 1, 125])
def test_a_whole_short_text_takes_the_short_way(size: int) -> None:
    """One of up to 125 bytes does. More bytes than a frame, or fewer, are left to a parser."""
    data = client_frame(1, b"x" * size)
    assert whole_text(data) == b"x" * size
    assert whole_text(data + b"\x81") is None
    assert whole_text(data[:-1]) is None
    assert whole_text(client_frame(1, b"x" * 126)) is None
    with pytest.raises(FrameError) as refused:
        whole_text(data, lambda: False)
    assert refused.value.close_code == 1008


def test_an_oversize_message_is_refused_by_its_header() -> None:
    """A length over the limit is refused before any of its payload is buffered."""
    with pytest.raises(FrameError):
        FrameParser().feed(b"\x81\xfe\xff\xff")


def test_a_message_of_exactly_the_limit_passes() -> None:
    """The limit itself is allowed, whole or in fragments."""
    payload = b"x" * MAX_MESSAGE_BYTES
    assert FrameParser().feed(client_frame(1, payload)) == [FrameEvent(Opcode.TEXT, payload)]
    pieces = client_frame(1, payload[:1000], fin=False) + client_frame(0, payload[1000:])
    assert FrameParser().feed(pieces) == [FrameEvent(Opcode.TEXT, payload)]


@pytest.mark.parametrize("chunk_bytes", [1, 6, 7, 100_000])
@pytest.mark.parametrize(
    "between",
    [client_frame(0, b"", fin=False), client_frame(0, b"x", fin=False), client_frame(9, b"")],
    ids=["empty fragments", "fragments of a byte", "pings"],
)
def test_a_message_of_endless_frames_is_refused(between: bytes, chunk_bytes: int) -> None:
    """However a message is drawn out, and however TCP cuts it, its frames are bounded."""
    stream = client_frame(1, b"x", fin=False) + between * MAX_FRAMES_PER_MESSAGE
    assert feed_in_chunks(stream, chunk_bytes) == 1008


def test_each_frame_is_counted() -> None:
    """Fragments and control frames count like messages, and the first one too many ends it."""
    counted = []

    def count() -> bool:
        counted.append(1)
        return len(counted) <= 4

    frames = [client_frame(1, b"{", fin=False), client_frame(9, b""), client_frame(0, b"}")]
    parser = FrameParser()
    assert len(parser.feed(b"".join(frames), count)) == 2
    assert len(counted) == 3
    with pytest.raises(FrameError) as error:
        parser.feed(b"".join(frames), count)
    assert error.value.close_code == 1008
    assert len(counted) == 5


def test_a_parser_is_idle_only_between_messages() -> None:
    """It may be dropped only when no bytes and no fragments are pending."""
    parser = FrameParser()
    assert parser.idle
    frame = client_frame(1, b"{}")
    parser.feed(frame[:3])
    assert not parser.idle
    parser.feed(frame[3:])
    assert parser.idle
    parser.feed(client_frame(1, b"", fin=False))
    assert not parser.idle


@given(st.binary(max_size=70_000))
def test_frames_are_as_another_library_writes_them(payload: bytes) -> None:
    """encode_frame writes the bytes that `websockets` does, at every length form."""
    assert encode_frame(Opcode.TEXT, payload) == Frame(TheirOpcode.TEXT, payload).serialize(
        mask=False
    )


@pytest.mark.parametrize("code", [1000, 1001, 1003, 1011, 3000, 4307, 4999])
def test_close_codes_round_trip(code: int) -> None:
    """A close frame that we write is read as its code."""
    assert decode_close(encode_close(code, "why")[2:]) == code


@pytest.mark.parametrize(
    "payload",
    [
        b"x",
        b"\x00\x00",
        *(struct.pack("!H", c) for c in (999, 1004, 1005, 1006, 1015, 1016, 2999, 5000)),
    ],
)
def test_invalid_close_payloads_are_protocol_errors(payload: bytes) -> None:
    """Codes that must not be sent, and a half code, are 1002 (RFC 6455, section 7.4)."""
    with pytest.raises(FrameError) as error:
        decode_close(payload)
    assert error.value.close_code == 1002


def test_a_close_without_a_code_is_fine() -> None:
    """An empty close frame is valid and has no code."""
    assert decode_close(b"") is None


def test_a_long_close_reason_is_cut_at_a_character() -> None:
    """A reason too long for a control frame is cut, and stays UTF-8."""
    frame = encode_close(4403, "☃" * 100)
    assert len(frame) - 2 <= 125
    assert decode_close(frame[2:]) == 4403
