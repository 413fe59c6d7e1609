"""The hub's end of one worker: the worker's sessions, as the hub's gateway holds them.

To the gateway a session of a worker is one like any other. So readiness, gaps, limits, drains and
redirects are decided once on a host, by the code that decides them in a single process. A poke for
a recipient without a session here costs one look-up, however many workers there are.
"""

from collections.abc import Callable, Iterator

from pokebridge.errors import RefusedError
from pokebridge.gateway.gateway import Gateway
from pokebridge.session import UNKNOWN_VERSION, State
from pokebridge.workers.calls import Answers
from pokebridge.workers.channel import Channel
from pokebridge.workers.frames import (
    Acked,
    Answer,
    Call,
    Close,
    Enter,
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


class RemoteSession:
    """A session whose socket is a worker's. A :class:`~pokebridge.gateway.listener.Listener`.

    - ``recipient``, ``serial``: its name on that worker
    - ``device``, ``address``, ``began_at``, ``told``: as the protocol says
    - ``link``: the worker
    - ``_state``: what the worker was told
    """

    __slots__ = ("_state", "address", "began_at", "device", "link", "recipient", "serial", "told")

    def __init__(self, link: "WorkerLink", enter: Enter, address: str) -> None:
        self.link = link
        self.recipient = enter.recipient
        self.serial = enter.serial
        self.device = enter.device
        self.address = address
        self.began_at = enter.began_at
        self.told = UNKNOWN_VERSION
        self._state = State.WAITING

    @property
    def is_open(self) -> bool:
        """Whether the worker was told to say ``ready``, and not to close it."""
        return self._state is State.OPEN

    @property
    def is_closed(self) -> bool:
        """Whether it is gone, or about to be."""
        return self._state in {State.CLOSING, State.CLOSED}

    def answer(self, response: bytes) -> None:  # noqa: ARG002 - the worker has made it
        """Accept the handshake."""
        self.link.send(Answer(self.recipient, self.serial))

    def open(self, first_ping_s: float, response: bytes = b"") -> None:  # noqa: ARG002 - the worker's
        """Send ``ready``."""
        if self._state is State.WAITING:
            self._state = State.OPEN
            self.link.send(Open(self.recipient, self.serial))

    def notify(self, version: int | None, frame: bytes) -> bool:
        """Have the worker send a poke. None is needed before ``ready``, nor for a known version.

        The session was told that before the signal came back from the engine.
        """
        if version is None:
            self.told = UNKNOWN_VERSION
        elif version == self.told and self._state is State.OPEN:
            return False
        elif version > self.told:
            self.told = version
        return self._state is State.OPEN and self.link.poke(self, version, frame)

    def move(self, url: str) -> None:
        """Send the client to another instance."""
        self._end(Move(self.recipient, self.serial, url))

    def close(self, code: int, reason: str) -> None:
        """Start the closing handshake."""
        self._end(Close(self.recipient, self.serial, code, reason))

    def abort(self) -> None:
        """Forget the socket, which ends with its worker."""
        self._state = State.CLOSED

    def _end(self, message: Message) -> None:
        if not self.is_closed:
            self._state = State.CLOSING
            self.link.closing[self.recipient, self.serial] = self
            self.link.send(message)


class WorkerLink:
    """The hub's end of one worker.

    - ``number``: the worker's number on this host, from 1
    - ``channel``, ``answers``: to the worker, and what does its calls
    - ``closing``: its sessions that were told to close, by their name
    - ``sessions``: how many it has, those included
    - ``on_ready``, ``on_report``, ``on_broken``, ``on_gone``, ``on_pulled``: called with what the
      worker says
    - ``_gateway``: holds the sessions
    - ``_has_missed``: whether pokes were dropped since the channel is congested
    - ``_later``: by name, its sessions that were not the first of their recipient on this worker
    - ``_poke``: the poke that is being put together
    """

    def __init__(self, number: int, gateway: Gateway) -> None:
        self.number = number
        self.channel: Channel[ToHub] = Channel(decode_to_hub, self._take, self._break)
        self.channel.on_drained = self._make_up
        self.channel.on_flush = self._send_poke
        self.send = self.channel.send
        self.answers = Answers(self.send)
        self.closing: dict[tuple[str, int], RemoteSession] = {}
        self.sessions = 0
        self.on_ready: Callable[[], None] = lambda: None
        self.on_report: Callable[[Report], None] = lambda _: None
        self.on_broken: Callable[[], None] = lambda: None
        self.on_gone: Callable[[int], None] = lambda _: None
        self.on_pulled: Callable[[str, int], None] = lambda _recipient, _version: None
        self._gateway = gateway
        self._has_missed = False
        self._later: dict[tuple[str, int], RemoteSession] = {}
        self._poke: Poke | None = None

    def poke(self, session: RemoteSession, version: int | None, frame: bytes) -> bool:
        """Have the worker poke ``session``. False: it is poked later.

        One message pokes all sessions of a recipient that get the same frame in a turn of the loop.
        """
        if self.channel.is_congested:
            self._has_missed = True
            return False
        poke = self._poke
        if poke is None or poke.frame is not frame or poke.recipient != session.recipient:
            self._send_poke()
            poke = self._poke = Poke(session.recipient, version, frame, [])
            self.channel.flush_soon()
        poke.serials.append(session.serial)
        return True

    def _send_poke(self) -> None:
        poke, self._poke = self._poke, None
        if poke is not None:
            self.send(poke)

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
            if self._gateway.on_ack is not None:
                self._gateway.on_ack(message.recipient, message.device, message.version)
        elif isinstance(message, Pulled):
            self.on_pulled(message.recipient, message.version)
        elif isinstance(message, Gone):
            self.on_gone(message.number)
        elif isinstance(message, Ready):
            self.on_ready()
        else:
            self.on_report(message)

    def _enter(self, enter: Enter) -> None:
        try:
            address = self._gateway.entrance.admit(enter.address)
        except RefusedError as error:
            refusal = (int(error.status), str(error), error.headers)
            self.send(Refuse(enter.recipient, enter.serial, *refusal))
            return
        self.sessions += 1
        session = RemoteSession(self, enter, address)
        if session.serial:
            self._later[session.recipient, session.serial] = session
        self._gateway.add(session, moved=enter.moved)

    def _leave(self, leave: Leave) -> None:
        session = self.closing.pop((leave.recipient, leave.serial), None)
        if session is None:
            session = self._find(leave.recipient, leave.serial)
        if session is not None:
            self._remove(session)

    def _find(self, recipient: str, serial: int) -> RemoteSession | None:
        """The session of this name; ``None`` if its handshake was refused."""
        if serial:
            return self._later.get((recipient, serial))
        for session in self._gateway.sessions.find(recipient):
            if isinstance(session, RemoteSession) and session.link is self and not session.serial:
                return session
        return None

    def _remove(self, session: RemoteSession) -> None:
        session.abort()
        self._later.pop((session.recipient, session.serial), None)
        self.sessions -= 1
        self._gateway.remove(session)

    def _own(self) -> Iterator[RemoteSession]:
        for session in self._gateway.sessions:
            if isinstance(session, RemoteSession) and session.link is self:
                yield session

    def _break(self) -> None:
        """The worker is gone, and so are its sockets."""
        for session in {*self.closing.values(), *self._own()}:
            self._remove(session)
        self.closing.clear()
        self.on_broken()
