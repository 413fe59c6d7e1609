"""Sessions that listen to more than their own recipient.

In the session map each recipient that a session listens to is a separate :class:`Listener`. So
pokes, gaps, disconnects, verification and interest in its shard treat it like a session.
"""

import functools
import time
from collections.abc import Sequence
from typing import Protocol

from pokebridge.gateway.wheel import Wheel
from pokebridge.session import UNKNOWN_VERSION, ListenedRecipient, Session
from pokebridge.wire import address_poke

# A poke for a room goes to all that listen to it, and the frame is the same for all.
_address_poke = functools.lru_cache(maxsize=16)(address_poke)


class ListeningHost(Protocol):
    """What is needed from the gateway."""

    wheel: Wheel
    """Where the deadline is kept."""

    def now(self) -> float:
        """The time on the event loop's clock, in seconds."""

    def hear(self, listening: "Listening") -> None:
        """Add ``listening`` to the session map, and ``open`` it once its shard is live."""

    def remove(self, listening: "Listening") -> None:
        """``listening`` has ended."""


class ListeningSession(Protocol):
    """The session that listens, with a socket or without."""

    session: Session
    address: str

    def send(self, frame: bytes) -> None:
        """Write ``frame``."""


class Listening(ListenedRecipient):
    """One recipient that a session listens to beside its own, as a ``Listener`` of the gateway.

    - ``began_at``: when it began, in Unix seconds, rounded down
    - ``wheel_slot``: a note of the wheel's
    - ``_host``: the gateway
    - ``_connection``: the session
    """

    __slots__ = ("_connection", "_host", "began_at", "wheel_slot")

    is_session = False

    def __init__(
        self, host: ListeningHost, connection: ListeningSession, recipient: str, expires_at: float
    ) -> None:
        """``expires_at`` is on the loop's clock."""
        super().__init__(connection.session, recipient, expires_at=expires_at, now=host.now())
        self.began_at = int(time.time())
        self.wheel_slot = 0
        self._host = host
        self._connection = connection
        self._follow()

    @property
    def device(self) -> str:
        """The device of the session."""
        return self.session.device

    @property
    def address(self) -> str:
        """The address of the session."""
        return self._connection.address

    def answer(self, response: bytes) -> None:
        """There is no handshake."""

    def open(self, first_ping_s: float, response: bytes = b"") -> None:  # noqa: ARG002 - that of a Listener
        """Say ``listening``: the subscription is live."""
        self._say(self.begin(self._host.now()))
        self._follow()

    def notify(self, version: int | None, frame: bytes) -> bool:
        """Send the poke ``frame`` with its recipient, or merge it. Returns whether it was sent."""
        if version is None:
            self.told = UNKNOWN_VERSION
        elif version > self.told:
            self.told = version
        if not self.poke(version):
            return False
        self._connection.send(_address_poke(frame, self.recipient))
        return True

    def move(self, url: str) -> None:
        """Only a session is moved, after its own recipient."""

    def extend(self, expires_at: float) -> None:
        """A new token was accepted. It expires at ``expires_at`` on the loop's clock."""
        self._say(self.renew(expires_at, self._host.now()))
        self._follow()

    def close(self, code: int, reason: str) -> None:
        """Say ``unlistened``, and end."""
        self._say(self.end(code, reason))
        self._leave()

    def abort(self) -> None:
        """End without a frame: the session has ended, or its client has sent ``unlisten``."""
        self.end(0, "")
        self._leave()

    def wake(self, now: float) -> None:
        """A deadline has passed."""
        self._say(self.tick(now))
        if self.is_closed:
            self._leave()
        else:
            self._follow()

    def _say(self, frame: bytes) -> None:
        if frame:
            self._connection.send(frame)

    def _follow(self) -> None:
        self._host.wheel.schedule(self, self.due_at)

    def _leave(self) -> None:
        self._host.wheel.cancel(self)
        self._host.remove(self)


def listenings(session: Session) -> Sequence[Listening]:
    """What ``session`` listens to beside its own recipient."""
    listened = session.listened
    return [each for each in listened.values() if isinstance(each, Listening)] if listened else ()
