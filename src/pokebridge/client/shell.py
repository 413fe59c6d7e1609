"""The core's driver for asyncio: a WebSocket, HTTP calls and a clock."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from ssl import SSLContext, create_default_context
from types import TracebackType
from typing import Any, Self

import msgspec
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.http11 import Response

from pokebridge.client.core import ClientCore
from pokebridge.client.driver import Driver
from pokebridge.client.events import (
    Abandon,
    AnyAction,
    AnyEvent,
    Closed,
    Connect,
    Opened,
    PullFailed,
    Refused,
    Start,
    Text,
    Tick,
    Token,
    TokenFailed,
    Try,
    TryFailed,
    Upgraded,
    Wake,
)
from pokebridge.client.frames import parse_frame
from pokebridge.client.opening import CLOSE_TIMEOUT_S, Opener
from pokebridge.client.policy import Policy
from pokebridge.client.polling import (
    ABNORMAL_CLOSURE,
    SENT_OVER_HTTP,
    PolledSocket,
    PollEndedError,
    Poller,
    refused,
)
from pokebridge.client.pulling import (
    MailboxPuller,
    OnMessages,
    OnPoke,
    OwnPuller,
    Puller,
)
from pokebridge.client.transports import Transport
from pokebridge.errors import ConfigError, ForbiddenError
from pokebridge.model import check_device
from pokebridge.outgoing import Answer, check_token, proxy_for
from pokebridge.urls import check_bridge_url
from pokebridge.wire import CONNECT_PATH

TOKEN_TIMEOUT_S = 30.0

_OPENING_ERRORS = (OSError, WebSocketException, ValueError, ConfigError)

TokenProvider = str | Callable[[], Awaitable[str]]
"""A token that does not expire, or a coroutine function that returns a new one."""

OnEvent = Callable[[AnyEvent | AnyAction], None]
"""Called with every event and every action of the core."""

_log = logging.getLogger("pokebridge.client")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a client is made of: the arguments of :class:`~pokebridge.client.PokeClient`."""

    url: str
    token: TokenProvider
    on_messages: OnMessages | None
    on_poke: OnPoke | None
    device: str
    cursor: int
    on_event: OnEvent | None
    policy: Policy | None
    transport: Transport
    tls: SSLContext | None

    def puller(self, *, leaves_acks: Callable[[], bool]) -> Puller:
        """What makes the core's pulls."""
        if self.on_messages is not None and self.on_poke is None:
            return MailboxPuller(
                self.url,
                self.on_messages,
                device=self.device,
                cursor=self.cursor,
                tls=self.tls,
                leaves_acks=leaves_acks,
            )
        if self.on_poke is not None and self.on_messages is None:
            return OwnPuller(self.on_poke)
        raise TypeError("a client takes either on_messages or on_poke")


class Shell(Driver):
    """A core with a WebSocket, HTTP calls and a clock, from ``async with`` to its end."""

    def __init__(self, setup: Setup) -> None:
        url = check_bridge_url("the client's url", setup.url)
        tls = setup.tls
        if tls is None and url.startswith("https:"):
            tls = create_default_context()
        proxy_for(url)
        self._setup = setup = replace(setup, url=url, tls=tls, device=check_device(setup.device))
        self._puller = setup.puller(leaves_acks=lambda: self._core.acks_by_socket)
        self._opener = Opener(tls)
        self._poller = Poller(url, tls)
        self._polled: PolledSocket | None = None
        ws_url = f"ws{url.removeprefix('http')}{CONNECT_PATH}"
        super().__init__(
            ClientCore(ws_url, cursor=setup.cursor, policy=setup.policy, transport=setup.transport)
        )
        self._token = ""
        self._main: asyncio.Task[int] | None = None
        self._tasks = asyncio.TaskGroup()
        self._fetching: asyncio.Task[None] | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._trying: asyncio.Task[None] | None = None
        self._socket: ClientConnection | None = None
        self._stopped: asyncio.Future[int] | None = None
        self._leaving = False
        self._ready = asyncio.Event()

    @property
    def cursor(self) -> int:
        """The version up to which all messages are handled."""
        return self._core.cursor

    @property
    def connected(self) -> bool:
        """Whether pokes arrive now: the socket is open and the bridge has sent ``ready``."""
        return self._core.ready

    @property
    def polls(self) -> bool:
        """Whether pokes are polled over HTTP, because no WebSocket gets through."""
        return self._core.polls

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        """Wait until :attr:`connected` is true.

        Raises:
            TimeoutError: it took longer than ``timeout_s`` seconds.
            ForbiddenError: the bridge has stopped this client for good.
        """
        main = self._entered()
        ready = asyncio.create_task(self._ready.wait())
        try:
            await asyncio.wait(
                {ready, main}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            ready.cancel()
        if main.done():
            raise ForbiddenError(f"the bridge stopped this client with {main.result()}")
        if not ready.done():
            raise TimeoutError(f"not connected within {timeout_s} s")

    async def wait_stopped(self) -> int:
        """Wait until the bridge stops this client for good; returns the close code.

        The code is 4403 (not allowed) or 4409 (replaced: the recipient has too many sessions).
        """
        return await asyncio.shield(self._entered())

    def wake(self) -> None:
        """Retry at once instead of after a delay: the network is back, or the machine woke up."""
        self._entered()
        self._feed(Wake())

    async def __aenter__(self) -> Self:
        """Start the client; this does not wait for the connection."""
        self._begin()
        return self

    def _begin(self) -> None:
        if self._main is not None:
            raise RuntimeError("a client runs once: make a new one")
        self._main = asyncio.create_task(self._run())

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close everything. A running handler is cancelled, and its page is not acked."""
        main = self._entered()
        self._leaving = True
        main.cancel()
        try:
            await asyncio.wait({main})
        finally:
            await self._puller.close()
            await self._poller.close()
        if error is None and not main.cancelled():
            main.result()  # raises the error that broke the client, if there is one

    def _entered(self) -> asyncio.Task[int]:
        if self._main is None:
            raise RuntimeError("enter the client first: async with PokeClient(...) as client")
        return self._main

    # --- between the core and the world ---

    async def _run(self) -> int:
        self._stopped = asyncio.get_running_loop().create_future()
        try:
            async with self._tasks:
                self._feed(Start())
                code = await self._stopped
                # A running pull may end: its messages are with the handler already.
                for task in (self._fetching, self._connecting, self._trying):
                    if task is not None:
                        task.cancel()
        finally:
            self._set_timer(None)
        return code

    def _tick(self) -> None:
        try:
            super()._tick()
        except Exception as error:  # noqa: BLE001 - a defect of the client: it ends the client and is raised
            if self._stopped is not None and not self._stopped.done():
                self._stopped.set_exception(error)

    def _feed(self, event: AnyEvent) -> None:
        # Before the start, as by a `wake`; or from a handler that swallowed its cancellation.
        if self._stopped is None or self._leaving:
            return
        self._show(event)
        super()._feed(event)

    def _carry_out(self, action: AnyAction) -> None:
        self._show(action)
        super()._carry_out(action)

    def _show(self, step: AnyEvent | AnyAction) -> None:
        if self._setup.on_event is not None and not isinstance(step, Tick):
            try:
                self._setup.on_event(step)
            except Exception:  # noqa: BLE001 - a user's code may raise anything
                _log.exception("on_event failed")

    def _on_ready_changed(self) -> None:
        if self._core.ready:
            self._ready.set()
        else:
            self._ready.clear()

    def _stop(self, code: int) -> None:
        _log.warning("the bridge has stopped this client for good: %d", code)
        if self._stopped is not None:
            self._stopped.set_result(code)

    # --- tokens and pulls ---

    def _fetch_token(self) -> None:
        self._fetching = self._tasks.create_task(self._get_token())

    async def _get_token(self) -> None:
        try:
            async with asyncio.timeout(TOKEN_TIMEOUT_S):
                self._token = await self._new_token()
        except Exception as error:  # noqa: BLE001 - a user's code may raise anything
            _log.warning("token provider failed and will be called again: %r", error)
            self._feed(TokenFailed(repr(error)))
        else:
            self._feed(Token())

    async def _new_token(self) -> str:
        provider = self._setup.token
        return check_token(provider if isinstance(provider, str) else await provider())

    def _pull(self, after: int) -> None:
        self._tasks.create_task(self._pull_newer(after))

    async def _pull_newer(self, after: int) -> None:
        event = await self._puller.pull(after, self._token)
        if isinstance(event, PullFailed):
            _log.warning("a pull failed and will be tried again: %s", event.reason)
        self._feed(event)

    # --- the socket ---

    def _connect(self, action: Connect) -> None:
        query = {"device": self._setup.device} | ({"moved": "1"} if action.moved else {})
        hold = self._hold_polled(action.url, query) if action.poll else self._hold(action, query)
        self._connecting = self._tasks.create_task(hold)

    def _disconnect(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()

    def _ping(self) -> None:
        self._tasks.create_task(self._send({"type": "ping"}))

    def _authenticate(self) -> None:
        self._tasks.create_task(self._send({"type": "auth", "token": self._token}))

    def _ack(self, version: int) -> None:
        self._tasks.create_task(self._send({"type": "ack", "version": version}))

    async def _hold(self, action: Connect, query: dict[str, str]) -> None:
        try:
            socket = await self._opener.open(
                action.url, query, self._token, in_query=action.in_query
            )
        except InvalidStatus as answered:
            event = _refused(action.url, answered.response)
            _log.warning("%s", event.reason)
            self._feed(event)
        except _OPENING_ERRORS as error:
            self._feed(Closed(ABNORMAL_CLOSURE, repr(error)))
        else:
            self._feed(Opened())
            await self._listen(socket)

    async def _hold_polled(self, url: str, query: dict[str, str]) -> None:
        try:
            polled = self._polled = await self._poller.open(url, query, self._token)
            self._feed(Opened())
            while True:
                self._feed(Text(await polled.recv(self._token)))
        except PollEndedError as ended:
            _log.warning("polling has ended: %s", ended)
            self._feed(ended.event)
        finally:
            self._polled = None

    def _try(self, action: Try | Abandon) -> None:
        if isinstance(action, Try):
            self._trying = self._tasks.create_task(self._try_socket(action))
        elif self._trying is not None:
            self._trying.cancel()

    async def _try_socket(self, action: Try) -> None:
        """Open a WebSocket beside what polls, and change over to it when it is ``ready``."""
        try:
            query = {"device": self._setup.device}
            socket = await self._opener.open(
                action.url, query, self._token, in_query=action.in_query
            )
        except (InvalidStatus, *_OPENING_ERRORS) as error:
            self._feed(TryFailed(reason=repr(error)))
            return
        try:
            first = await socket.recv()
        except ConnectionClosed as closed:
            self._feed(TryFailed(opened=True, reason=str(closed)))
            return
        except asyncio.CancelledError:
            socket.transport.abort()
            raise
        if not isinstance(first, str) or parse_frame(first).get("type") != "ready":
            self._feed(TryFailed(opened=True, reason="its first frame is not `ready`"))
            await socket.close()
            return
        self._disconnect()
        self._connecting, self._trying = self._trying, None
        self._socket = socket
        self._feed(Upgraded(first))
        await self._listen(socket)

    async def _listen(self, socket: ClientConnection) -> None:
        self._socket = socket
        try:
            while True:
                message = await socket.recv()
                if isinstance(message, str):
                    self._feed(Text(message))
        except ConnectionClosed as closed:
            close = closed.rcvd
            if close is None:
                self._feed(Closed(ABNORMAL_CLOSURE, str(closed)))
            else:
                self._feed(Closed(close.code, close.reason))
        finally:
            await self._hang_up(socket)
            if self._socket is socket:
                self._socket = None

    async def _hang_up(self, socket: ClientConnection) -> None:
        """Close the socket, after the ack that waits, if this client leaves."""
        try:
            if (version := self._core.waiting_ack) is not None:
                with suppress(TimeoutError):
                    async with asyncio.timeout(CLOSE_TIMEOUT_S):
                        await self._send({"type": "ack", "version": version})
            await socket.close()
        finally:
            socket.transport.abort()  # a second cancellation would leave it open

    def _say(self, message: dict[str, Any]) -> None:
        """Send ``message`` soon, if there is a socket."""
        if self._socket is not None or self._polled is not None:
            self._tasks.create_task(self._send(message))

    async def _send(self, message: dict[str, Any]) -> None:
        if self._socket is not None:
            with suppress(ConnectionClosed):
                await self._socket.send(msgspec.json.encode(message).decode())
        elif self._polled is not None and message["type"] in SENT_OVER_HTTP:
            try:
                await self._polled.send(message, self._token)
            except PollEndedError as failed:
                _log.warning("a frame could not be sent: %s", failed)
                self._on_unsent()


def _refused(url: str, response: Response) -> Refused | Closed:
    types, waits = (response.headers.get_all(name) for name in ("Content-Type", "Retry-After"))
    media_type, retry_after = types[0] if types else None, waits[0] if waits else None
    status, body = response.status_code, bytes(response.body)
    return refused(Answer(url, status, media_type, retry_after, body))
