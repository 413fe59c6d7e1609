"""Signals and WebSocket messages as JSON."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pokebridge import wire
from pokebridge.errors import FrameError, SignalError
from pokebridge.framing import Opcode, encode_frame
from pokebridge.model import MAX_VERSION, Poke

recipients = st.text(
    st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=256
)
pokes = st.builds(Poke, recipients, st.none() | st.integers(1, MAX_VERSION))


@given(st.lists(pokes, min_size=1, max_size=20))
def test_pokes_round_trip(sent: list[Poke]) -> None:
    """What encode_pokes writes, decode_signal reads, single and in batches."""
    assert wire.decode_signal(wire.encode_pokes(sent)) == sent


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"recipient": "urn:user:bob"}', [Poke("urn:user:bob")]),
        (b'{"recipient":"b","version":17}', [Poke("b", 17)]),
        (b'{"recipient":"b","version":null}', [Poke("b")]),
        (b'{"type":"poke","recipient":"b","more":{"x":1}}', [Poke("b")]),
        (
            b'{"pokes":[{"recipient":"b","version":17},{"recipient":"e"}]}',
            [Poke("b", 17), Poke("e")],
        ),
        (b'{"pokes":[]}', []),
        (b'{"type":"disconnect","recipient":"b"}', wire.Disconnect("b")),
        (b'{"type":"probe","id":"i:1"}', wire.Probe("i:1")),
    ],
)
def test_signals_made_by_hand_are_understood(body: bytes, expected: object) -> None:
    """Every form of protocol.md section 2 is read, with and without its optional parts."""
    assert wire.decode_signal(body) == expected


def test_a_beacon_round_trips() -> None:
    """What encode_beacon writes is a probe to is_probe, and the same beacon to decode_signal."""
    beacon = wire.Beacon(
        sender="one",
        incarnation="1f",
        number=MAX_VERSION,
        up_s=12.5,
        every_s=2.0,
        cluster="default",
        shard_count=100,
        carrier="filter",
        assignment="coordinator",
        group_prefixes="urn:doc:,urn:room:",
        last=True,
    )
    body = wire.encode_beacon(beacon)
    assert wire.is_probe(body)
    assert wire.decode_signal(body) == beacon


@pytest.mark.parametrize("sessions", [None, [], [wire.ListedSession("phone", "::1", 5, 17)]])
def test_a_lookup_round_trips(sessions: list[wire.ListedSession] | None) -> None:
    """A question and its answers are probes, which earlier releases drop."""
    lookup = wire.Lookup("1f", "one", "urn:user:bob", sessions)
    body = wire.encode_lookup(lookup)
    assert wire.is_probe(body)
    assert wire.decode_signal(body) == lookup


@pytest.mark.parametrize("recipient", ["", "a b", "b\n", "grüße", "x" * 257])
def test_a_malformed_recipient_spoils_no_batch(recipient: str) -> None:
    """A poke with a malformed recipient counts as noise. The signal's others are handled."""
    body = json.dumps({"pokes": [{"recipient": recipient}, {"recipient": "urn:user:bob"}]})
    assert wire.decode_signal(body.encode()) == [Poke(recipient), Poke("urn:user:bob")]


_LISTED = (
    b'{"id":"l","from":"i","recipient":"b","sessions":[{"device":"d","address":"","since":%b}]}'
)
_BEACON = (
    b'{"from":"i","incarnation":"x","n":1,"up_s":1,"every_s":1,"cluster":"c","shard_count":%b,'
    b'"carrier":"f","assignment":"r"}'
)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"urn:user:bob"',
        b"{}",
        b"\xff\xfe",
        b'{"recipient":',
        b'{"recipient":7}',
        b'{"recipient":"b","version":"17"}',
        b'{"recipient":"b","version":0}',
        b'{"recipient":"b","version":-1}',
        b'{"recipient":"b","version":1.5}',
        b'{"recipient":"b","version":99999999999999999999}',
        b'{"recipient":"b","pokes":[]}',
        b'{"pokes":[{"version":1}]}',
        b'{"pokes":{"recipient":"b"}}',
        b'{"type":"restart","recipient":"b"}',
        b'{"type":"disconnect"}',
        b'{"type":"probe","id":"i:1:1","beacon":{}}',
        b'{"type":"probe","id":"i:1:1","beacon":7}',
        b'{"type":"probe","id":"l","lookup":{"id":"l","from":"i"}}',
        b'{"type":"probe","id":"l","lookup":' + _LISTED % b"99999999999999999999" + b"}",
        b'{"type":"probe","id":"l","lookup":' + _LISTED % b"-1" + b"}",
        b'{"type":"probe","id":"i","beacon":' + _BEACON % (b"9" * 400) + b"}",
        b'{"type":"disconnect","recipient":"b","at_ms":-1}',
        b'{"type":"disconnect","recipient":"b","at_ms":1e3}',
        b'{"type":"disconnect","recipient":"b","until_ms":99999999999999999999}',
        b'{"type":"disconnect","recipient":"b","until_ms":' + b"9" * 400 + b"}",
        b'{"type":null,"recipient":"b"}',
        b"[" * 100_000,
        b'{"recipient":"b","x":' + b"[" * 3_000 + b"]" * 3_000 + b"}",
        b'{"recipient":"b","x":' + b'{"x":' * 3_000 + b"1" + b"}" * 3_000 + b"}",
        b'{"recipient":"b","version":' + b"9" * 10_000 + b"}",
        b'{"recipient":"b","version":NaN}',
        b'{"recipient":"b","version":1e999}',
        '{"recipient":"urn:user:josé"}'.encode(),
        b'{"recipient":"urn:user:jos\\u00e9"}',
        b'{"recipient":"\\ud800"}',
        b'{"recipient":"\xed\xa0\x80"}',
        '{"type":"disconnect","recipient":"josé"}'.encode(),
    ],
)
def test_anything_else_is_a_signal_error(body: bytes) -> None:
    """A foreign body is refused as a whole, and causes no other error."""
    with pytest.raises(SignalError):
        wire.decode_signal(body)


@pytest.mark.parametrize(
    ("bad", "count"),
    [
        ('{"recipient":7}', 2),
        ('{"recipient":"b","version":-1}', 2),
        ('{"recipient":"b","version":1e999}', 2),
        ('{"recipient":"\\ud800"}', 0),
        ("null", 2),
        ("[" * 2_000 + "]" * 2_000, 0),
    ],
)
def test_the_valid_pokes_of_a_batch_are_salvaged(bad: str, count: int) -> None:
    """One bad member silences no other, if the batch is JSON that can be read at all."""
    body = f'{{"pokes":[{{"recipient":"a","version":3}},{bad},{{"recipient":"c"}}]}}'.encode()
    with pytest.raises(SignalError):
        wire.decode_signal(body)
    assert wire.salvage_pokes(body) == [Poke("a", 3), Poke("c")][:count]


@given(st.binary(max_size=200))
def test_garbage_is_a_signal_error_or_a_signal(garbage: bytes) -> None:
    """No bytes make decode_signal raise anything but SignalError, and salvage_pokes anything."""
    try:
        wire.decode_signal(garbage)
    except SignalError:
        assert wire.salvage_pokes(garbage) == []


@given(st.none() | st.integers(1, MAX_VERSION), st.integers(0, 10**6))
def test_poke_frames_are_valid_frames(version: int | None, within_ms: int) -> None:
    """The frame built by hand equals what the general encoder writes."""
    message: dict[str, object] = {"type": "poke"}
    if within_ms:
        message["within_ms"] = within_ms
    if version is not None:
        message["version"] = version
    text = json.dumps(message, separators=(",", ":")).encode()
    assert wire.poke_frame(version, within_ms) == encode_frame(Opcode.TEXT, text)


def test_ready_names_the_session_and_its_instance() -> None:
    """``ready`` has the contract's fields, and ``version`` only when it is known."""
    frame = wire.ready_frame(session="s", instance="i", expires_in_s=900)
    assert json.loads(frame[2:]) == {
        "type": "ready",
        "session": "s",
        "instance": "i",
        "expires_in": 900,
    }


def test_client_messages() -> None:
    """A client may say ping and auth, with members that we do not know."""
    assert isinstance(wire.decode_client_message(b'{"type":"ping","x":1}'), wire.Ping)
    message = wire.decode_client_message(b'{"type":"auth","token":"t"}')
    assert isinstance(message, wire.Auth)
    assert message.token == "t"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"ping",
        b"{}",
        b"[]",
        b'{"type":"poke"}',
        b'{"type":"auth"}',
        b'{"type":"auth","token":1}',
    ],
)
def test_other_client_messages_close_1008(text: bytes) -> None:
    """Anything else is a policy violation."""
    with pytest.raises(FrameError) as error:
        wire.decode_client_message(text)
    assert error.value.close_code == 1008
