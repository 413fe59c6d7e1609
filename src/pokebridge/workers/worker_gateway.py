"""The gateway of a worker: the sockets of its sessions. The hub decides what happens to them.

HTTP upgrade → ``Entrance`` → ``Connection`` → ``Enter`` to the hub → ``Open`` or ``Refuse``
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from typing import Final, cast

from pokebridge.backoff import spread
from pokebridge.errors import RefusedError
from pokebridge.gateway.admission import retry_within
from pokebridge.gateway.audiences import SLICE
from pokebridge.gateway.config import GatewayConfig
from pokebridge.gateway.connection import Connection
from pokebridge.gateway.disconnects import Disconnects
from pokebridge.gateway.entrance import Entrance, Verifier
from pokebridge.gateway.handshake import Handshake, Network, refusal_response
from pokebridge.gateway.listening import Listening, listenings
from pokebridge.gateway.polling import PolledSession
from pokebridge.gateway.sockets import Sockets
from pokebridge.gateway.wheel import Wheel
from pokebridge.model import Ack
from pokebridge.supervisor import run_once
from pokebridge.wire import poke_frame
from pokebridge.workers.frames import (
    Acked,
    Answer,
    Close,
    Enter,
    Forgotten,
    Leave,
    Message,
    Move,
    Open,
    Poke,
    Refuse,
    Revoke,
    ToWorker,
    Wake,
)

MAX_UNANSWERED: Final = 10_000
"""The most handshakes that wait for the hub. Further ones are refused."""
ANSWER_WITHIN_S: Final = 10.0
"""A handshake that the hub does not answer within this time is refused, and its client tries
again."""
ACKS_WITHIN_S: Final = 0.1
"""The longest that acks wait for another message to be sent. A separate write for each would wake
the hub a third more often."""
_NO_NUMBER: Final = -1


class NumberedConnection(Connection):
    """The WebSocket of one session, with the number by which the hub knows it."""

    __slots__ = ("number",)

    number: int


class WorkerGateway:
    """All sessions of one worker.

    - ``instance``: the instance's id
    - ``entrance``: checks handshakes, and counts the sockets of this process
    - ``wheel``: the deadlines of all sockets
    - ``disconnects``: the revocations in force
    - ``merged``: pokes that were merged because their client did not read
    - ``sessions``: how many there are, those whose handshake is not answered included
    - ``all_gone``: set while there is none
    - ``_by_number``: the connections by their numbers, those whose handshake is not answered
      included, and what they listen to; ``None`` where there is none
    - ``_listening``: the numbers of what they listen to
    - ``_free``: numbers that may be given to the next ones
    - ``_acks``, ``_ack_timer``: those that wait for something else to be sent to the hub, and the
      end of the wait
    - ``_unanswered``: by number, the response that accepts a handshake which waits for the hub's
      answer. The oldest are first
    """

    def __init__(
        self,
        config: GatewayConfig,
        verifier: Verifier,
        send: Callable[[Message], None],
        *,
        takes_acks: bool,
    ) -> None:
        """``send`` sends to the hub. With ``takes_acks`` clients may ack over their sockets."""
        self.instance = config.instance
        self.entrance = Entrance(config, verifier, self, self._admitted)
        self.entrance.connection_type = NumberedConnection
        self.wheel = Wheel()
        self.disconnects = Disconnects()
        self.merged = self.sessions = 0
        self.all_gone = asyncio.Event()
        self.all_gone.set()
        self._config = config
        self._send = send
        self._takes_acks = takes_acks
        self._by_number: list[NumberedConnection | Listening | None] = []
        self._listening: dict[Listening, int] = {}
        self._free: list[int] = []
        self._unanswered: dict[int, bytes] = {}
        self._acks: list[Ack] = []
        self._ack_timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    def start(self, *, serves: bool) -> None:
        """Take sessions from now on, if this instance ``serves`` them at all."""
        self.entrance.serves = serves
        self.wheel.start(self._loop)

    def close(self) -> None:
        """Drop the connections that are still open, and stop."""
        self.entrance.close()
        for each in self.numbered():
            each.abort()
        self.wheel.stop()

    def numbered(self) -> Iterator[NumberedConnection | Listening]:
        """The connections whose handshake was passed to the hub, and what they listen to."""
        return (each for each in self._by_number if each is not None)

    @property
    def on_ack(self) -> Callable[[str, str, int], None] | None:
        """Takes the recipient, the device and the version of an ack; ``None`` without a mailbox."""
        return self._ack if self._takes_acks else None

    def _ack(self, recipient: str, device: str, version: int) -> None:
        self._acks.append(Ack(recipient, device, version))
        if self._ack_timer is None:
            self._ack_timer = self._loop.call_later(ACKS_WITHIN_S, self._send_last_acks)

    def _send_last_acks(self) -> None:
        self._ack_timer = None
        self.send_acks()

    def send_acks(self) -> None:
        """Send the hub the acks that have come; to be called whenever something else is sent."""
        if self._acks:
            acks, self._acks = self._acks, []
            self._send(Acked(acks))

    def now(self) -> float:
        """The time on the loop's clock in seconds."""
        return self._loop.time()

    @property
    def sockets(self) -> Sockets:
        """The HTTP connections, which become sessions here or stay what they are."""
        return self.entrance.sockets

    @property
    def trusted_proxies(self) -> Sequence[Network]:
        """The proxies whose forwarding fields are believed."""
        return self._config.trusted_proxies

    @property
    def path_prefix(self) -> str:
        """The beginning of every path that clients use, which a proxy may have removed."""
        return self._config.path_prefix

    # --- called by the entrance and by connections ------------------------------------------------

    def _admitted(self, admitted: Connection, handshake: Handshake) -> None:
        """Ask the hub for a place."""
        connection = cast("NumberedConnection", admitted)
        connection.number = _NO_NUMBER
        if len(self._unanswered) >= MAX_UNANSWERED:
            status, headers = HTTPStatus.SERVICE_UNAVAILABLE, retry_within(5, 15)
            self._refuse(connection, RefusedError(status, "too many handshakes just now", headers))
            return
        number = connection.number = self._number(connection)
        self._unanswered[number] = handshake.response
        self.sessions += 1
        self.all_gone.clear()
        connection.hold()
        self._send(
            Enter(
                number,
                connection.recipient,
                handshake.device,
                handshake.address,
                connection.began_at,
                handshake.moved,
            )
        )

    def hear(self, listening: Listening) -> None:
        """Ask the hub to hear what a session listens to."""
        number = self._listening[listening] = self._number(listening)
        of_session = (listening.device, listening.address, listening.began_at)
        self._send(Enter(number, listening.recipient, *of_session, moved=True, is_session=False))

    def remove(self, listening: Listening) -> None:
        """``listening`` has ended."""
        number = self._listening.pop(listening, _NO_NUMBER)
        if number != _NO_NUMBER:
            self._by_number[number] = None
            self._send(Leave(number))

    def _number(self, named: NumberedConnection | Listening) -> int:
        if not self._free:
            self._by_number.append(named)
            return len(self._by_number) - 1
        number = self._free.pop()
        self._by_number[number] = named
        return number

    def refuse_overdue(self, unix_s: float) -> None:
        """Refuse the handshakes that the hub has left without an answer; to be called every second.

        Otherwise their clients would wait until their own timeout.
        """
        for number in list(self._unanswered):
            connection = self._by_number[number]
            if (
                not isinstance(connection, Connection)
                or unix_s - connection.began_at < ANSWER_WITHIN_S
            ):
                return
            del self._unanswered[number]
            status, headers = HTTPStatus.SERVICE_UNAVAILABLE, retry_within(1, 5)
            self._refuse(connection, RefusedError(status, "this host does not answer", headers))

    def forget(self, connection: Connection | PolledSession) -> None:
        """The socket of ``connection`` is closed."""
        if isinstance(connection, PolledSession):
            return  # calls that wait are the hub's
        for listening in listenings(connection.session):
            listening.abort()
        self.wheel.cancel(connection)
        self.entrance.left(connection)
        number = cast("NumberedConnection", connection).number
        if number == _NO_NUMBER:
            return
        self._by_number[number] = None
        self._unanswered.pop(number, None)
        self._send(Leave(number))
        self.sessions -= 1
        if not self.sessions:
            self.all_gone.set()

    # --- what the hub says ------------------------------------------------------------------------

    def take(self, message: ToWorker) -> None:
        """Carry out a message of the hub about one session, or about all."""
        if isinstance(message, Poke):
            self._poke(message)
        elif isinstance(message, Open | Answer | Refuse):
            self._settle(message)
        elif isinstance(message, Move | Close):
            self._end(message)
        elif isinstance(message, Forgotten):
            self._free.append(message.session)
        elif isinstance(message, Revoke):
            self.revoke(message)
        elif isinstance(message, Wake):
            run_once("wake", self._wake(message.within_ms))

    def revoke(self, revoke: Revoke) -> None:
        """Refuse tokens from now on."""
        self.disconnects.note(revoke.disconnect, time.time())

    def _poke(self, poke: Poke) -> None:
        for number in poke.sessions:
            connection = self._by_number[number]
            if connection is not None and not connection.notify(poke.version, poke.frame):
                self.merged += connection.is_open

    def _settle(self, answer: Open | Answer | Refuse) -> None:
        connection = self._by_number[answer.session]
        if connection is None:
            return  # its client has gone meanwhile
        response = self._unanswered.pop(answer.session, b"")
        if isinstance(answer, Open):
            connection.open(self._first_ping_s(), response)
        elif isinstance(answer, Answer):
            connection.answer(response)
        elif isinstance(connection, Connection):
            refusal = RefusedError(HTTPStatus(answer.status), answer.detail, answer.headers)
            self._refuse(connection, refusal)

    def _refuse(self, connection: Connection, error: RefusedError) -> None:
        self.entrance.turned_away(error.status)
        connection.refuse(refusal_response(error.status, str(error), error.headers))

    def _end(self, message: Move | Close) -> None:
        connection = self._by_number[message.session]
        if connection is None:
            return
        if isinstance(message, Move):
            connection.move(message.url)
        else:
            connection.close(message.code, message.reason)

    def _first_ping_s(self) -> float:
        # Sessions that began together, as after a restart, must not be pinged together.
        return spread(self._config.timing.ping_interval_s, 0.5, 1.0)

    async def _wake(self, within_ms: int) -> None:
        connections, frame = list(self.numbered()), poke_frame(None, within_ms)
        for start in range(0, len(connections), SLICE):
            for connection in connections[start : start + SLICE]:
                connection.notify(None, frame)
            await asyncio.sleep(0)
