"""The server's half of the protocol against the scenarios of ``tests/vectors/server``."""

import json
from math import inf
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pokebridge import wire
from pokebridge.client.core import ClientCore
from pokebridge.client.events import Opened, Start, Text, Token
from pokebridge.client.policy import Policy
from pokebridge.errors import FrameError
from pokebridge.framing import Opcode
from pokebridge.session import ListenedRecipient, Session, Timing
from pokebridge.wire import Ack, Auth, Ping, address_poke, decode_client_message, poke_frame

# A client that takes no action by itself for a while.
UNHURRIED = Policy(open_within_s=1e6, ready_within_s=1e6, poll_after_s=1e6, ping_after_s=1e6)
VECTORS = Path(__file__).parent / "vectors" / "server"


class Event(msgspec.Struct, frozen=True, tag_field="type", forbid_unknown_fields=True):
    """Something happened to a session."""


class Open(Event, frozen=True, tag="open"):
    """The subscription is live."""

    instance: str
    first_ping_s: float
    takes_acks: bool = False


class Listen(Event, frozen=True, tag="listen"):
    """A ``listen`` message brought a token that is good until ``expires_at``."""

    recipient: str
    expires_at: float


class Live(Event, frozen=True, tag="live"):
    """The subscription of a recipient that is listened to is live."""

    recipient: str


class Poke(Event, frozen=True, tag="poke"):
    """A poke came, for the session's recipient or for one that it listens to."""

    version: int | None = None
    recipient: str | None = None


class Block(Event, frozen=True, tag="block"):
    """The peer does not take what was written."""


class Drain(Event, frozen=True, tag="drain"):
    """The peer has taken everything."""


class Pong(Event, frozen=True, tag="pong"):
    """The peer answered a ping (RFC 6455, section 5.5.3)."""


class Renew(Event, frozen=True, tag="renew"):
    """An ``auth`` or a ``listen`` message brought a token that is good until ``expires_at``."""

    expires_at: float
    recipient: str | None = None


class Close(Event, frozen=True, tag="close"):
    """The session, or what it listens to, is to end."""

    code: int
    reason: str
    recipient: str | None = None


class Tick(Event, frozen=True, tag="tick"):
    """The time is ``due_at``, or later."""

    recipient: str | None = None


class Step(msgspec.Struct, forbid_unknown_fields=True):
    """An event, and what must come of it."""

    at: float
    event: Open | Listen | Live | Poke | Block | Drain | Pong | Renew | Close | Tick
    sent: list[dict[str, Any]]
    state: str
    due_at: float


class Scenario(msgspec.Struct, forbid_unknown_fields=True):
    """A session's life from its handshake at 0."""

    name: str
    expires_at: float
    steps: list[Step]
    ends_at: float | None = None
    listens: int = 0


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """What a client says, and what it is."""

    text: str
    message: str | None


class Sessions(msgspec.Struct, forbid_unknown_fields=True):
    """The file of sessions."""

    about: str
    scenarios: list[Scenario]


class Messages(msgspec.Struct, forbid_unknown_fields=True):
    """The file of messages."""

    about: str
    messages: list[Message]


ALONE, LISTENING = (
    msgspec.json.decode((VECTORS / name).read_bytes(), type=Sessions).scenarios
    for name in ("session.json", "listening.json")
)
MESSAGES = msgspec.json.decode((VECTORS / "messages.json").read_bytes(), type=Messages).messages


def carry_out(session: Session, event: Event, now: float) -> bytes:
    """Tell the session what happened; what it wants written."""
    if (recipient := getattr(event, "recipient", None)) is not None:
        return carry_out_for(session, recipient, event, now)
    sent = b""
    match event:
        case Open(instance=instance, first_ping_s=first_ping_s, takes_acks=takes_acks):
            sent = session.open(
                instance=instance, now=now, first_ping_s=first_ping_s, takes_acks=takes_acks
            )
        case Poke(version=version):
            sent = poke_frame(version) if session.poke(version) else b""
        case Block():
            session.block(now)
        case Drain():
            sent = session.drain(now) + b"".join(session.drain_listened())
        case Pong():
            session.pong(now)
        case Renew(expires_at=expires_at):
            sent = session.renew(expires_at=expires_at, now=now)
        case Close(code=code, reason=reason):
            sent = session.close(code, reason, now)
        case Tick():
            sent = session.tick(now)
    return sent


def carry_out_for(session: Session, recipient: str, event: Event, now: float) -> bytes:
    """The same for a recipient that the session listens to."""
    if isinstance(event, Listen):
        ListenedRecipient(session, recipient, expires_at=event.expires_at, now=now)
        return b""
    assert session.listened is not None
    listened = session.listened[recipient]
    sent = b""
    match event:
        case Live():
            sent = listened.begin(now)
        case Poke(version=version):
            poke = poke_frame(version)
            sent = address_poke(poke, recipient) if listened.poke(version) else b""
        case Renew(expires_at=expires_at):
            sent = listened.renew(expires_at, now)
        case Close(code=code, reason=reason):
            sent = listened.end(code, reason)
        case Tick():
            sent = listened.tick(now)
    return sent


def frames(data: bytes) -> list[dict[str, Any]]:
    """Short unmasked frames in the scenarios' words."""
    if not data:
        return []
    opcode, size = data[0] & 0x0F, data[1]
    assert data[0] & 0x80
    assert size < 126
    payload, rest = data[2 : 2 + size], data[2 + size :]
    match opcode:
        case Opcode.TEXT:
            frame = {"text": json.loads(payload)}
        case Opcode.PING:
            frame = {"ping": payload.decode()}
        case Opcode.CLOSE:
            code = int.from_bytes(payload[:2], "big")
            frame = {"close": code, "reason": payload[2:].decode()}
        case _:
            raise AssertionError(f"opcode {opcode}")
    return [frame, *frames(rest)]


@pytest.mark.parametrize("scenario", [pytest.param(s, id=s.name) for s in ALONE + LISTENING])
def test_the_session_does_what_the_scenario_says(scenario: Scenario) -> None:
    """Every event sends exactly the frames, and leaves the state and the timer, that it has."""
    session = Session(
        "urn:user:bob",
        "default",
        "s",
        expires_at=scenario.expires_at,
        ends_at=inf if scenario.ends_at is None else scenario.ends_at,
        now=0,
        timing=Timing(max_listened=scenario.listens),
    )
    for number, step in enumerate(scenario.steps, 1):
        sent = frames(carry_out(session, step.event, step.at))
        listened = (session.listened or {}).values()
        due_at = min([session.due_at, *(each.due_at for each in listened)])
        got = Step(step.at, step.event, sent, session.state.name.lower(), due_at)
        assert got == step, f"step {number}"


@pytest.mark.parametrize("message", [pytest.param(m, id=m.text[:40]) for m in MESSAGES])
def test_what_a_client_may_say(message: Message) -> None:
    """Messages of docs/protocol.md, also with added keys, are accepted. Others close with 1008."""
    kinds = {
        "ping": Ping,
        "auth": Auth,
        "ack": Ack,
        "listen": wire.Listen,
        "unlisten": wire.Unlisten,
    }
    if message.message is None:
        with pytest.raises(FrameError) as refused:
            decode_client_message(message.text.encode())
        assert refused.value.close_code == 1008
    else:
        assert type(decode_client_message(message.text.encode())) is kinds[message.message]


def test_a_client_understands_what_a_session_says() -> None:
    """Every frame of these scenarios makes a client pull or renew its token, or ends a session."""
    texts = {
        json.dumps(frame["text"])
        for scenario in ALONE
        for step in scenario.steps
        for frame in step.sent
        if "text" in frame
    }
    assert {json.loads(text)["type"] for text in texts} == {"ready", "poke", "auth"}
    for text in sorted(texts):
        core = ClientCore("ws://bridge.example/v1/connect", policy=UNHURRIED)
        for event in (Start(), Token(), Opened()):
            core.handle(event, now=0, random=0)
        before = core.timer
        actions = core.handle(Text(text), now=0, random=0)
        assert actions or core.timer != before
