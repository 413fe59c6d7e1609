"""A receiver of a recipient's pokes, as the gateway sees it, whichever process holds the socket."""

from typing import Protocol

from pokebridge.session import Session, State


class Listener(Protocol):
    """A session, or one of the recipients that a session listens to beside its own.

    It is in this process, or in a worker.

    - ``is_session``: which of the two it is
    - ``recipient``, ``device``: whose it is
    - ``address``: the address that it counts against; empty when there is no such limit
    - ``began_at``: when it began, in Unix seconds, rounded down
    - ``told``: the newest version that it was poked for, or ``UNKNOWN_VERSION``
    - ``is_open``: whether ``ready`` or ``listening`` is said and the end has not begun
    - ``is_closed``: whether the socket is gone, or about to be
    """

    @property
    def is_session(self) -> bool: ...  # noqa: D102 - see above, as for all of these

    @property
    def recipient(self) -> str: ...  # noqa: D102

    @property
    def device(self) -> str: ...  # noqa: D102

    @property
    def address(self) -> str: ...  # noqa: D102

    @property
    def began_at(self) -> int: ...  # noqa: D102

    @property
    def told(self) -> int: ...  # noqa: D102

    @property
    def is_open(self) -> bool: ...  # noqa: D102

    @property
    def is_closed(self) -> bool: ...  # noqa: D102

    def answer(self, response: bytes) -> None:
        """Accept the handshake; ``ready`` follows later."""

    def open(self, first_ping_s: float, response: bytes = b"") -> None:
        """Send ``ready`` or ``listening``, after ``response`` if that accepts the handshake."""

    def notify(self, version: int | None, frame: bytes) -> bool:
        """Send the poke ``frame``, or merge it. Returns whether it was sent."""

    def move(self, url: str) -> None:
        """Send the client to another instance."""

    def close(self, code: int, reason: str) -> None:
        """Start the closing handshake."""

    def abort(self) -> None:
        """Drop the socket without a closing handshake."""


class HasSession:
    """What a :class:`Listener` whose :class:`Session` is in this process knows from it."""

    __slots__ = ()

    is_session = True
    session: Session

    @property
    def recipient(self) -> str:
        """The recipient of the session."""
        return self.session.recipient

    @property
    def device(self) -> str:
        """The device of the session."""
        return self.session.device

    @property
    def is_open(self) -> bool:
        """Whether ``ready`` is said and the end has not begun."""
        return self.session.state is State.OPEN

    @property
    def is_closed(self) -> bool:
        """Whether the session has ended, or is about to."""
        return self.session.state in {State.CLOSING, State.CLOSED}

    @property
    def told(self) -> int:
        """The newest version that the client was poked for."""
        return self.session.told
