"""What a client listens to beside its own recipient.

Each further recipient is a client of its own, with a core, a token and a cursor. It shares the
client's socket, or has its own if the instance supports no further recipients.
"""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from pokebridge.client.driver import Driver
from pokebridge.client.events import (
    Abandon,
    AnyEvent,
    Closed,
    Connect,
    Opened,
    Text,
    Try,
    TryFailed,
    Upgraded,
    Wake,
)
from pokebridge.client.frames import parse_frame
from pokebridge.client.listens import SOCKET_LOST, Given, Listens
from pokebridge.client.polling import NOTHING_NEW
from pokebridge.client.shell import Setup, Shell


class ListeningShell(Shell):
    """The core of one further recipient, and what carries out its actions."""

    def __init__(self, setup: Setup, recipient: str, shared: "SharedSocket") -> None:
        super().__init__(setup)
        self._recipient = recipient
        self._shared = shared
        self._is_carried = False

    def begin(self) -> None:
        """Start. ``close`` must follow."""
        self._begin()

    def attach(self) -> None:
        """The client has a new socket: use it, unless this has one of its own."""
        if not self._core.ready:
            self._feed(Wake())

    def hear(self, event: Text | Closed) -> None:
        """Something came for this recipient over the client's socket, or that is gone."""
        if self._is_carried:
            self._is_carried = isinstance(event, Text)
            self._feed(event)

    def stop(self, code: int) -> None:
        """The client was stopped for good."""
        if self._stopped is not None and not self._stopped.done():
            self._leaving = True
            self._stop(code)

    async def close(self) -> None:
        """Stop. A running handler is cancelled, and its page is not acked."""
        self._shared.forget(self._recipient)
        self._is_carried = False
        await self.__aexit__(None, None, None)

    def _connect(self, action: Connect) -> None:
        self._is_carried = self._shared.carry(self._recipient)
        if self._is_carried:
            self._connecting = self._tasks.create_task(self._hold_part())
        elif self._shared.is_absent:
            self._connecting = self._tasks.create_task(self._miss_socket())
        else:
            super()._connect(action)

    async def _hold_part(self) -> None:
        self._feed(Opened())
        self._ask()

    async def _miss_socket(self) -> None:
        # The core tries again later, and ``attach`` makes it do so at once.
        self._feed(Closed(SOCKET_LOST, "the client has no socket"))

    def _ask(self) -> None:
        frame = {"type": "listen", "recipient": self._recipient, "token": self._token}
        self._shared.say(frame)

    def _disconnect(self) -> None:
        super()._disconnect()
        if self._is_carried:
            self._is_carried = False
            self._shared.drop(self._recipient)

    async def _send(self, message: dict[str, Any]) -> None:
        if not self._is_carried:
            await super()._send(message)
        elif message["type"] == "auth":
            self._ask()
        elif message["type"] == "ping":
            self._feed(Text(NOTHING_NEW))  # the client watches over the socket

    def _try(self, action: Try | Abandon) -> None:
        if not self._is_carried:
            super()._try(action)
        elif isinstance(action, Try):
            self._trying = self._tasks.create_task(self._try_nothing())

    async def _try_nothing(self) -> None:
        self._feed(TryFailed(reason="the client's socket carries this recipient"))


class Part(Protocol):
    """What listens to one recipient, and may use a part of the client's socket."""

    def attach(self) -> None:
        """The client has a new socket: use it, unless this has one of its own."""

    def hear(self, event: Text | Closed) -> None:
        """Something came for this recipient over the client's socket, or that is gone."""

    def wake(self) -> None:
        """Retry at once instead of after a delay."""

    def stop(self, code: int) -> None:
        """The client was stopped for good."""

    async def close(self) -> None:
        """Stop."""


class SharedSocket:
    """A client's socket, as far as it carries further recipients.

    - ``say``: sends a message over the socket, if there is one
    - ``_listens``: what the socket carries
    - ``_parts``: by recipient, all that the client listens to
    """

    def __init__(self, say: Callable[[dict[str, Any]], None]) -> None:
        self.say = say
        self._listens = Listens()
        self._parts: dict[str, Part] = {}

    def listen(self, setup: Setup, recipient: str) -> "Listening":
        """Begin to listen to ``recipient``.

        Raises:
            ValueError: it is listened to already.
        """
        shell = ListeningShell(setup, recipient, self)
        self.enter(recipient, shell)
        shell.begin()
        return Listening(shell)

    def enter(self, recipient: str, part: Part) -> None:
        """Have ``part`` use the socket for ``recipient``, until ``forget``.

        Raises:
            ValueError: another one does.
        """
        if recipient in self._parts:
            raise ValueError(f"this client listens to {recipient} already: close that first")
        self._parts[recipient] = part

    async def close(self) -> None:
        """End all of it."""
        for part in list(self._parts.values()):
            await part.close()

    # --- what happens to the socket ---------------------------------------------------------------

    def hear(self, text: str) -> bool:
        """Take a frame. Returns whether it was for a recipient that the client listens to."""
        given = self._listens.hear(text)
        if given is not None:
            self._give([given])
        return given is not None

    def ready(self, text: str) -> None:
        """There is a new socket, whose first frame is ``text``."""
        self._give(self._listens.ready(text))
        for part in list(self._parts.values()):
            part.attach()

    def lose(self) -> None:
        """The socket is gone."""
        self._give(self._listens.lose())

    def refuse(self) -> None:
        """The socket does not take what is sent."""
        self._give(self._listens.refuse())

    def stop(self, code: int) -> None:
        """The bridge has stopped the client for good."""
        for part in self._parts.values():
            part.stop(code)

    def wake(self) -> None:
        """The network is back, or the machine woke up."""
        for part in list(self._parts.values()):
            part.wake()

    def _give(self, given: Sequence[Given]) -> None:
        for recipient, event in given:
            if (part := self._parts.get(recipient)) is not None:
                part.hear(event)

    # --- called by what listens -------------------------------------------------------------------

    @property
    def is_absent(self) -> bool:
        """Whether there is no socket now, so that it is unknown which recipients it would carry."""
        return self._listens.at_most is None

    def carry(self, recipient: str) -> bool:
        """Whether the socket takes ``recipient``. Then ``listen`` is to be sent."""
        return self._listens.carry(recipient)

    def drop(self, recipient: str) -> None:
        """``recipient`` no longer needs the shared socket."""
        if self._listens.drop(recipient):
            self.say({"type": "unlisten", "recipient": recipient})

    def forget(self, recipient: str) -> None:
        """Nobody listens to ``recipient`` any more."""
        self.drop(recipient)
        self._parts.pop(recipient, None)


class SharingDriver(Driver):
    """Tells what a client listens to what happens to the client's socket.

    A base of the client, before the one that has the socket.
    """

    _shared: SharedSocket

    def _feed(self, event: AnyEvent) -> None:
        if isinstance(event, Text) and self._shared.hear(event.text):
            return
        super()._feed(event)
        if isinstance(event, Text | Upgraded) and parse_frame(event.text).get("type") == "ready":
            self._shared.ready(event.text)

    def _on_ready_changed(self) -> None:
        super()._on_ready_changed()
        if not self._core.ready:
            self._shared.lose()

    def _on_unsent(self) -> None:
        self._shared.refuse()

    def _stop(self, code: int) -> None:
        super()._stop(code)
        self._shared.stop(code)


class Listening:
    """What a client listens to beside its own recipient, until it is closed.

    It ends with the client, too. It is an async context manager, which closes it.
    """

    def __init__(self, shell: ListeningShell) -> None:
        self._shell = shell

    @property
    def cursor(self) -> int:
        """The version up to which all messages of the recipient are handled."""
        return self._shell.cursor

    @property
    def connected(self) -> bool:
        """Whether pokes of the recipient arrive now."""
        return self._shell.connected

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        """Wait until :attr:`connected` is true.

        Raises:
            TimeoutError: it took longer than ``timeout_s`` seconds.
            ForbiddenError: the bridge has refused this recipient for good.
        """
        await self._shell.wait_ready(timeout_s)

    async def wait_stopped(self) -> int:
        """Wait until the bridge refuses this recipient for good; returns the code.

        The code is 4403 (not allowed), or that with which the whole client was stopped.
        """
        return await self._shell.wait_stopped()

    async def close(self) -> None:
        """Stop listening to this recipient. A running handler is cancelled."""
        await self._shell.close()

    async def __aenter__(self) -> Self:
        """It has begun already."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it."""
        await self.close()
