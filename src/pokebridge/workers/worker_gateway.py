"""The gateway of a worker: the sockets of its sessions. What becomes of them the hub decides.

HTTP upgrade → ``Entrance`` → ``Connection`` → ``Enter`` to the hub → ``Open`` or ``Refuse``
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from itertools import count
from typing import Final

from pokebridge.backoff import spread
from pokebridge.errors import RefusedError
from pokebridge.gateway.admission import retry_within
from pokebridge.gateway.audiences import SLICE
from pokebridge.gateway.config import GatewayConfig
from pokebridge.gateway.connection import Connection
from pokebridge.gateway.disconnects import Disconnects
from pokebridge.gateway.entrance import Entrance, Verifier
from pokebridge.gateway.handshake import Handshake, Network, refusal_response
from pokebridge.gateway.polling import PolledSession
from pokebridge.gateway.session_map import SessionMap
from pokebridge.gateway.sockets import Sockets
from pokebridge.gateway.wheel import Wheel
from pokebridge.supervisor import run_once
from pokebridge.wire import Disconnect, poke_frame
from pokebridge.workers.frames import (
    Acked,
    Answer,
    Close,
    Enter,
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
"""Handshakes that wait for the hub at most. Further ones are refused."""
_NO_LIMIT: Final = 2**31  # the hub's limits count for the host

_Name = tuple[str, int]


class WorkerGateway:
    """All sessions of one worker.

    - ``instance``: the instance's id
    - ``sessions``: the sessions by recipient, those whose handshake is not answered included
    - ``entrance``: checks handshakes, and counts the sockets of this process
    - ``wheel``: the deadlines of all sockets
    - ``disconnects``: the revocations in force
    - ``merged``: pokes that were merged because their client did not read
    - ``all_gone``: set while there is no session
    - ``_unanswered``: by name, what waits for the hub's answer: the connection and the response
      that accepts its handshake, or ``None`` if its client has gone meanwhile
    - ``_serials``, ``_later``: of the sessions whose serial is not 0, the serials and, by name, the
      sessions
    - ``_next_serial``: counts from 1
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
        self.sessions: SessionMap[Connection] = SessionMap(_NO_LIMIT)
        self.entrance = Entrance(config, verifier, self, self._admitted)
        self.wheel = Wheel()
        self.disconnects = Disconnects()
        self.merged = 0
        self.all_gone = asyncio.Event()
        self.all_gone.set()
        self._config = config
        self._send = send
        self._takes_acks = takes_acks
        self._unanswered: dict[_Name, tuple[Connection, bytes] | None] = {}
        self._serials: dict[Connection, int] = {}
        self._later: dict[_Name, Connection] = {}
        self._next_serial = count(1)
        self._loop = asyncio.get_running_loop()

    def start(self, *, serves: bool) -> None:
        """Take sessions from now on, if this instance ``serves`` them at all."""
        self.entrance.serves = serves
        self.wheel.start(self._loop)

    def close(self) -> None:
        """Drop the connections that are still open, and stop."""
        self.entrance.close()
        for connection in self.sessions:
            connection.abort()
        self.wheel.stop()

    @property
    def on_ack(self) -> Callable[[str, str, int], None] | None:
        """Takes the recipient, the device and the version of an ack; ``None`` without a mailbox."""
        return self._ack if self._takes_acks else None

    def _ack(self, recipient: str, device: str, version: int) -> None:
        self._send(Acked(recipient, device, version))

    def now(self) -> float:
        """The time on the loop's clock in seconds."""
        return self._loop.time()

    @property
    def sockets(self) -> Sockets:
        """The HTTP connections, which become sessions here or stay what they are."""
        return self.entrance.sockets

    @property
    def trusted_proxies(self) -> Sequence[Network]:
        """The proxies whose ``X-Forwarded-For`` is believed."""
        return self._config.trusted_proxies

    @property
    def path_prefix(self) -> str:
        """The beginning of every path that clients use, which a proxy may have removed."""
        return self._config.path_prefix

    # --- called by the entrance and by connections ------------------------------------------------

    def _admitted(self, connection: Connection, handshake: Handshake) -> None:
        """Ask the hub for a place."""
        recipient = connection.recipient
        self.all_gone.clear()
        if len(self._unanswered) >= MAX_UNANSWERED:
            status, headers = HTTPStatus.SERVICE_UNAVAILABLE, retry_within(5, 15)
            self._refuse(connection, RefusedError(status, "too many handshakes just now", headers))
            return
        serial = 0
        if self.sessions.find(recipient) or (recipient, 0) in self._unanswered:
            serial = next(self._next_serial)
            self._serials[connection] = serial
            self._later[recipient, serial] = connection
        self.sessions.add(connection)
        self._unanswered[recipient, serial] = (connection, handshake.response)
        connection.hold()
        began_at = connection.began_at
        self._send(
            Enter(recipient, serial, handshake.device, handshake.address, began_at, handshake.moved)
        )

    def renew(self, connection: Connection, token: str) -> None:
        """The client of ``connection`` has sent a new token."""
        self.entrance.renew(connection, token)

    def forget(self, connection: Connection | PolledSession) -> None:
        """The socket of ``connection`` is closed."""
        if isinstance(connection, PolledSession):
            return  # calls that wait are the hub's
        self.wheel.cancel(connection)
        self.entrance.left(connection)
        serial = self._serials.pop(connection, 0)
        self._later.pop((connection.recipient, serial), None)
        if self.sessions.remove(connection):
            name = (connection.recipient, serial)
            if name in self._unanswered:  # the name is not used again before the answer
                self._unanswered[name] = None
            self._send(Leave(*name))
        if not self.sessions:
            self.all_gone.set()

    # --- what the hub says ------------------------------------------------------------------------

    def take(self, message: ToWorker) -> None:
        """Do what the hub says of a session, or of all."""
        if isinstance(message, Poke):
            self._poke(message)
        elif isinstance(message, Open | Answer | Refuse):
            self._settle(message)
        elif isinstance(message, Move | Close):
            self._end(message)
        elif isinstance(message, Revoke):
            self.revoke(message)
        elif isinstance(message, Wake):
            run_once("wake", self._wake(message.within_ms))

    def revoke(self, revoke: Revoke) -> None:
        """Refuse tokens from now on."""
        disconnect = Disconnect(revoke.recipient, revoke.at_ms, revoke.until_ms)
        self.disconnects.note(disconnect, time.time())

    def _poke(self, poke: Poke) -> None:
        for serial in poke.serials:
            connection = self._find(poke.recipient, serial)
            if connection is not None and not connection.notify(poke.version, poke.frame):
                self.merged += connection.is_open

    def _settle(self, answer: Open | Answer | Refuse) -> None:
        name = (answer.recipient, answer.serial)
        if name not in self._unanswered:  # it was answered, and is ready now
            connection = self._find(*name)
            if connection is not None and isinstance(answer, Open):
                connection.open(self._first_ping_s())
            return
        waiting = self._unanswered.pop(name)
        if waiting is None:
            return
        connection, response = waiting
        if isinstance(answer, Open):
            connection.open(self._first_ping_s(), response)
        elif isinstance(answer, Answer):
            connection.answer(response)
        else:
            refusal = RefusedError(HTTPStatus(answer.status), answer.detail, answer.headers)
            self._refuse(connection, refusal)

    def _refuse(self, connection: Connection, error: RefusedError) -> None:
        self.entrance.turned_away(error.status)
        connection.refuse(refusal_response(error.status, str(error), error.headers))

    def _end(self, message: Move | Close) -> None:
        name = (message.recipient, message.serial)
        connection = None if name in self._unanswered else self._find(*name)
        if connection is None:
            return  # it has gone, or it is a newer one that the hub does not know yet
        if isinstance(message, Move):
            connection.move(message.url)
        else:
            connection.close(message.code, message.reason)

    def _find(self, recipient: str, serial: int) -> Connection | None:
        if serial:
            return self._later.get((recipient, serial))
        # It is the oldest: with another session there its serial would not be 0.
        oldest = next(iter(self.sessions.find(recipient)), None)
        return None if oldest in self._serials else oldest

    def _first_ping_s(self) -> float:
        # Sessions that began together, as after a restart, must not be pinged together.
        return spread(self._config.timing.ping_interval_s, 0.5, 1.0)

    async def _wake(self, within_ms: int) -> None:
        connections, frame = list(self.sessions), poke_frame(None, within_ms)
        for start in range(0, len(connections), SLICE):
            for connection in connections[start : start + SLICE]:
                connection.notify(None, frame)
            await asyncio.sleep(0)
