"""The hub's end of one worker: the worker's sessions, as the hub's gateway holds them.

To the gateway a worker's session is a session like any other. So readiness, gaps, limits, drains
and redirects are decided once per host, by the same code as in a single process. A poke for a
recipient without a session here costs one look-up, however many workers there are.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import msgspec

from pokebridge.errors import RefusedError
from pokebridge.gateway.connection import whole_second
from pokebridge.gateway.gateway import Gateway
from pokebridge.model import DEFAULT_DEVICE, Ack
from pokebridge.session import UNKNOWN_VERSION, State
from pokebridge.workers.calls import Answers
from pokebridge.workers.channel import Channel
from pokebridge.workers.frames import (
    Acked,
    Answer,
    Body,
    Call,
    Close,
    Enter,
    Forgotten,
    Gone,
    Leave,
    Message,
    Move,
    Open,
    Poke,
    Pulled,
    Ready,
    Refuse,
    Report,
    ToHub,
    Wake,
    decode_to_hub,
)


class RemoteSession(msgspec.Struct, gc=False, eq=False):
    """A session whose socket is a worker's. A :class:`~pokebridge.gateway.listener.Listener`.

    A struct takes less memory than an object, and the garbage collector need not look at it. The
    cycle with its link is broken when the session or the worker ends.

    - ``link``: the worker
    - ``number``: its name on that worker
    - ``recipient``, ``device``, ``address``, ``began_at``, ``told``: as the protocol says
    - ``state``: what the worker was told
    """

    is_session: ClassVar[bool] = True

    link: "WorkerLink"
    number: int
    recipient: str
    device: str
    address: str
    began_at: int
    told: int = UNKNOWN_VERSION
    state: State = State.WAITING

    @property
    def is_open(self) -> bool:
        """Whether the worker was told to say ``ready``, and not to close it."""
        return self.state is State.OPEN

    @property
    def is_closed(self) -> bool:
        """Whether it is gone, or about to be."""
        return self.state in {State.CLOSING, State.CLOSED}

    def answer(self, response: bytes) -> None:  # noqa: ARG002 - the worker has made it
        """Accept the handshake."""
        self.link.send(Answer(self.number))

    def open(self, first_ping_s: float, response: bytes = b"") -> None:  # noqa: ARG002 - the worker's
        """Send ``ready``."""
        if self.state is State.WAITING:
            self.state = State.OPEN
            self.link.send(Open(self.number))

    def notify(self, version: int | None, frame: bytes) -> bool:
        """Make the worker send a poke. None is needed before ``ready``, nor for a known version.

        The session was told that before the signal came back from the engine.
        """
        if version is None:
            self.told = UNKNOWN_VERSION
        elif version == self.told and self.state is State.OPEN:
            return False
        elif version > self.told:
            self.told = version
        return self.state is State.OPEN and self.link.poke(self.number, version, frame)

    def move(self, url: str) -> None:
        """Send the client to another instance."""
        self._end(Move(self.number, url))

    def close(self, code: int, reason: str) -> None:
        """Start the closing handshake."""
        self._end(Close(self.number, code, reason))

    def abort(self) -> None:
        """Forget the socket, which ends with its worker."""
        self.state = State.CLOSED

    def _end(self, message: Message) -> None:
        if not self.is_closed:
            self.state = State.CLOSING
            self.link.send(message)


class RemoteListening(RemoteSession, gc=False, eq=False):
    """A further recipient that a worker's session listens to."""

    is_session: ClassVar[bool] = False


class WorkerLink:
    """The hub's end of one worker.

    - ``number``: the worker's number on this host, from 1
    - ``channel``, ``answers``: to the worker, and what does its calls
    - ``sessions``: how many it has, those that are closing included, and what they listen to
    - ``on_ready``, ``on_report``, ``on_broken``, ``on_pulled``: called with what the worker says
    - ``on_gone``, ``on_body``: the same, of the HTTP requests that it passes on
    - ``_gateway``: holds the sessions
    - ``_by_number``: the same sessions by their numbers; ``None`` where there is none
    - ``_has_missed``: whether pokes were dropped since the channel became congested
    - ``_poke``: the poke that is being put together
    """

    def __init__(self, number: int, gateway: Gateway) -> None:
        self.number = number
        self.channel: Channel[ToHub] = Channel(decode_to_hub, self._take, self._break)
        self.channel.on_drained = self._make_up
        self.channel.on_flush = self._send_poke
        self.answers = Answers(self.send, self.channel.room)
        self.sessions = 0
        self.on_ready: Callable[[], None] = lambda: None
        self.on_report: Callable[[Report], None] = lambda _: None
        self.on_broken: Callable[[], None] = lambda: None
        self.on_gone: Callable[[int], None] = lambda _: None
        self.on_body: Callable[[int, bytes], None] = lambda _number, _body: None
        self.on_pulled: Callable[[str, int], None] = lambda _recipient, _version: None
        self._gateway = gateway
        self._by_number: list[RemoteSession | None] = []
        self._has_missed = False
        self._poke: Poke | None = None

    def send(self, message: Message) -> None:
        """Send ``message`` after all that was sent before.

        Raises:
            ChannelError: the message is too long.
        """
        self._send_poke()
        self.channel.send(message)

    def poke(self, session: int, version: int | None, frame: bytes) -> bool:
        """Make the worker poke a session. Returns False if it is poked later.

        One message pokes all sessions that get the same frame in a turn of the loop.
        """
        if self.channel.is_congested:
            self._has_missed = True
            return False
        poke = self._poke
        if poke is None or poke.frame is not frame:
            self._send_poke()
            poke = self._poke = Poke([], version, frame)
            self.channel.flush_soon()
        poke.sessions.append(session)
        return True

    def _send_poke(self) -> None:
        poke, self._poke = self._poke, None
        if poke is not None:
            self.channel.send(poke)

    def _make_up(self) -> None:
        """The worker reads again: poke all of its sessions for what was dropped."""
        if self._has_missed:
            self._has_missed = False
            for session in self._own():
                session.told = UNKNOWN_VERSION
            self.send(Wake(int(self.sessions / self._gateway.pulls_per_s * 1000)))

    # --- what the worker says ---------------------------------------------------------------------

    def _take(self, message: ToHub) -> None:
        if isinstance(message, Call):
            self.answers.answer(message)
        elif isinstance(message, Enter):
            self._enter(message)
        elif isinstance(message, Leave):
            self._leave(message)
        elif isinstance(message, Acked):
            self._note_acks(message.acks)
        elif isinstance(message, Pulled):
            self.on_pulled(message.recipient, message.version)
        elif isinstance(message, Gone):
            self.on_gone(message.number)
        elif isinstance(message, Body):
            self.on_body(message.number, message.body)
        elif isinstance(message, Ready):
            self.on_ready()
        else:
            self.on_report(message)

    def _note_acks(self, acks: Sequence[Ack]) -> None:
        on_ack = self._gateway.on_ack
        if on_ack is not None:
            for ack in acks:
                on_ack(*ack)

    def _enter(self, enter: Enter) -> None:
        by_number, number = self._by_number, enter.session
        by_number.extend([None] * (number + 1 - len(by_number)))
        address = enter.address
        try:
            if enter.is_session:
                address = self._gateway.entrance.admit(address)
        except RefusedError as error:
            self.send(Refuse(number, int(error.status), str(error), error.headers))
            return
        # Sessions with equal texts share one object: separate ones would take 32 to 64 bytes each.
        device = DEFAULT_DEVICE if enter.device == DEFAULT_DEVICE else enter.device
        kind = RemoteSession if enter.is_session else RemoteListening
        session = kind(self, number, enter.recipient, device, address, whole_second(enter.began_at))
        by_number[number] = session
        self.sessions += 1
        if session.is_session:
            self._gateway.add(session, moved=enter.moved)
        else:
            self._gateway.hear(session)

    def _leave(self, leave: Leave) -> None:
        session = self._by_number[leave.session]
        self._by_number[leave.session] = None
        if session is not None:  # its handshake was not refused
            self._remove(session)
        self.send(Forgotten(leave.session))

    def _remove(self, session: RemoteSession) -> None:
        session.abort()
        self.sessions -= 1
        self._gateway.remove(session)

    def _own(self) -> Iterator[RemoteSession]:
        return (session for session in self._by_number if session is not None)

    def _break(self) -> None:
        """The worker is gone, and so are its sockets."""
        for session in self._own():
            self._remove(session)
        self._by_number.clear()
        self.on_broken()
