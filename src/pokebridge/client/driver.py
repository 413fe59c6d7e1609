"""The common part of all clients around the core: events in, a timer, and actions out."""

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from time import monotonic
from typing import assert_never

from pokebridge.client.core import ClientCore
from pokebridge.client.events import (
    Abandon,
    Ack,
    AnyAction,
    AnyEvent,
    Authenticate,
    Connect,
    Disconnect,
    FetchToken,
    Ping,
    Pull,
    Stop,
    Tick,
    Try,
)


class Driver(ABC):
    """Drives a :class:`ClientCore` on the running asyncio loop.

    A subclass carries out the actions, each in the method named after it, and passes what happens
    to :meth:`_feed`. An action must not block: what takes time is a task or a callback, and ends in
    an event.
    """

    __slots__ = ("_core", "_random", "_timer", "_timer_at")

    def __init__(self, core: ClientCore, draw: Callable[[], float] = random.random) -> None:
        self._core = core
        self._random = draw  # it spreads clients, and keeps no secret
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None

    def _feed(self, event: AnyEvent) -> None:
        """Let the core handle ``event``, and do what it says."""
        was_ready = self._core.ready
        # uvloop's clock does not advance while the loop is busy. After many connections broke at
        # once, a delay that began at that time would already be over.
        actions = self._core.handle(event, now=monotonic(), random=self._random())
        if self._core.ready != was_ready:
            self._on_ready_changed()
        for action in actions:
            self._carry_out(action)
        self._set_timer(self._core.timer)

    def _set_timer(self, due_at: float | None) -> None:
        """Tick the core at ``due_at``, and at no other time."""
        if due_at == self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = due_at
        loop = asyncio.get_running_loop()
        self._timer = None if due_at is None else loop.call_at(due_at, self._tick)

    def _tick(self) -> None:
        self._timer = self._timer_at = None
        self._feed(Tick())

    def _carry_out(self, action: AnyAction) -> None:
        match action:
            case FetchToken():
                self._fetch_token()
            case Connect():
                self._connect(action)
            case Try() | Abandon():
                self._try(action)
            case Disconnect():
                self._disconnect()
            case Ping():
                self._ping()
            case Authenticate():
                self._authenticate()
            case Ack(version=version):
                self._ack(version)
            case Pull(after=after):
                self._pull(after)
            case Stop(code=code):
                self._stop(code)
            case _:
                assert_never(action)

    def _on_ready_changed(self) -> None:
        """The core has become ready, or no longer is; called before its actions are done."""
        raise NotImplementedError

    @abstractmethod
    def _fetch_token(self) -> None: ...

    @abstractmethod
    def _connect(self, action: Connect) -> None: ...

    @abstractmethod
    def _disconnect(self) -> None: ...

    @abstractmethod
    def _ping(self) -> None: ...

    @abstractmethod
    def _authenticate(self) -> None: ...

    @abstractmethod
    def _ack(self, version: int) -> None: ...

    @abstractmethod
    def _pull(self, after: int) -> None: ...

    def _try(self, action: Try | Abandon) -> None:
        """Only a core that may poll asks for this."""
        raise NotImplementedError

    def _on_unsent(self) -> None:  # noqa: B027 - most need not know
        """A message over a polled socket has not arrived."""

    def _stop(self, code: int) -> None:
        raise NotImplementedError
