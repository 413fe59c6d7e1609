"""A worker process: it serves connections that its hub accepts (docs/cores.md).

It answers the calls about messages and pokes. All other HTTP requests concern the whole instance,
and the hub answers them. A worker ends with its hub, however the hub ends, and when its hub hangs.
Otherwise it would answer the pings of clients that get no pokes.
"""

import asyncio
import contextlib
import math
import os
import pickle
import resource
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any, cast

import structlog
import uvicorn
import uvloop

from pokebridge.api.exchange import Route
from pokebridge.api.messages import MessageCalls
from pokebridge.api.pokes import PokeCalls
from pokebridge.border import unforeseen
from pokebridge.cluster.load import memory_bytes
from pokebridge.durations import RequestDurations
from pokebridge.mailbox.base import Inbox
from pokebridge.mailbox.devices import KnownDevices
from pokebridge.model import NewMessage, Poke, Receipt, SendMessage
from pokebridge.processor import Processor
from pokebridge.server import descriptors
from pokebridge.server.from_settings import (
    gateway_config,
    has_own_mailbox,
    open_mailbox,
    open_reader,
)
from pokebridge.server.garbage import keep_what_exists
from pokebridge.server.token_keys import token_verifier
from pokebridge.server.uvicorn_server import http_config
from pokebridge.server.worker_http import App
from pokebridge.settings import Settings
from pokebridge.supervisor import failing_tasks, supervise, task_failures
from pokebridge.telemetry import configure_logging
from pokebridge.tokens import Claims, TokenVerifier
from pokebridge.workers import methods
from pokebridge.workers.calls import Calls
from pokebridge.workers.channel import Channel
from pokebridge.workers.frames import (
    Ask,
    Failure,
    Pulled,
    Ready,
    Report,
    Result,
    Revoke,
    Stop,
    ToWorker,
    Want,
    Welcome,
    decode_to_worker,
)
from pokebridge.workers.inbox import HubInbox
from pokebridge.workers.worker_gateway import WorkerGateway

HUB_STALLED_AFTER = 10
"""A hub that has sent nothing for so many seconds hangs. It asks for a report in each second."""
_AT_ONCE = 64
_FAMILIES = {b"4": socket.AF_INET, b"6": socket.AF_INET6}

log = structlog.get_logger(__name__)


class Worker:
    """One worker.

    - ``settings``, ``gateway``, ``verifier``: set by the hub's welcome
    - ``calls``, ``tell``: calls and messages to the hub
    - ``requests``: how long the requests that are answered here take
    - ``processor``: commits messages, where this process has a mailbox of its own
    - ``accepted``: connections that the hub has passed
    - ``server``: serves the connections, once it is made
    - ``_app``: answers HTTP requests, once it is made
    - ``_channel``: to the hub
    - ``_revoked``: the revocations that come before the welcome
    - ``_welcomed``: set by the welcome
    - ``_unheard``: for how many seconds the hub has said nothing, while this process ran
    - ``_is_done``: whether the worker has stopped as it was told
    """

    settings: Settings
    gateway: WorkerGateway
    verifier: TokenVerifier

    def __init__(self) -> None:
        self.requests = RequestDurations()
        self.processor: Processor | None = None
        self.accepted = 0
        self.server: _Server | None = None
        self._app: App | None = None
        self._channel: Channel[ToWorker] = Channel(decode_to_worker, self._take, self._orphaned)
        self.tell = self._channel.send
        self.calls = Calls(self.tell, self._channel.room)
        self._revoked: list[Revoke] = []
        self._welcomed = asyncio.Event()
        self._unheard = 0
        self._is_done = False

    async def run(self, channel: socket.socket, door: socket.socket) -> None:
        """Serve until the hub says stop. The connections come through ``door``."""
        await self._channel.connect(channel)
        await self._welcomed.wait()
        async with AsyncExitStack() as opened:
            self._app = App(
                await self._routes(opened),
                self.verifier,
                self.requests,
                self.calls,
                self._channel,
                allowed_origins=self.settings.allowed_origins,
            )
            config = http_config(self._app, self.gateway, grace_s=self.settings.grace_s)
            self.server = _Server(config, self, door)
            self.gateway.start(serves="gateway" in self.settings.roles)
            opened.callback(self.gateway.close)
            opened.push_async_callback(self.verifier.close)
            pacer = supervise("worker_clock", self._keep_time)
            opened.callback(pacer.cancel)
            await self.server.serve(sockets=[])
        self._is_done = True
        self._channel.close()

    def serves(self) -> None:
        """Tell the hub that connections may be passed."""
        self.tell(Ready())

    async def _routes(self, opened: AsyncExitStack) -> Sequence[Route]:
        if "api" not in self.settings.roles:
            return []
        routes = [*PokeCalls(self._publish).routes()]
        if self.settings.no_mailbox:
            return routes
        inbox, send = await self._open_inbox(opened)
        devices = KnownDevices(inbox)
        opened.push_async_callback(devices.close)
        return [*routes, *MessageCalls(inbox, devices, send, self._note_pulled).routes()]

    async def _open_inbox(self, opened: AsyncExitStack) -> tuple[Inbox, SendMessage]:
        """Where pulls are answered, and what commits a message."""
        if has_own_mailbox(self.settings):
            mailbox = await open_mailbox(self.settings)
            opened.push_async_callback(mailbox.close)
            self.processor = Processor(mailbox, self, does_upkeep=False)
            await opened.enter_async_context(self.processor)
            return mailbox, self.processor.send
        inbox = HubInbox(self.calls, await open_reader(self.settings))
        opened.push_async_callback(inbox.close)
        return inbox, self._send

    async def publish_now(self, pokes: Sequence[Poke]) -> None:
        """Publish through the hub, as :class:`~pokebridge.processor.PokePublisher` says."""
        await self.calls.call(methods.PUBLISH_NOW, pokes)

    async def _publish(self, pokes: Sequence[Poke]) -> None:
        await self.calls.call(methods.PUBLISH, pokes)

    async def _send(self, message: NewMessage) -> Receipt:
        return await self.calls.call(methods.SEND, message)

    def _note_pulled(self, recipient: str, version: int) -> None:
        if self.settings.push_webhook_url is not None:
            self.tell(Pulled(recipient, version))

    async def _keep_time(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self._watch_hub()
            self.gateway.refuse_overdue(time.time())
            descriptors.relieve(self.gateway.sockets)

    def _watch_hub(self) -> None:
        self._unheard += 1
        if self._unheard > HUB_STALLED_AFTER:
            log.error("hub_stalled", silent_s=HUB_STALLED_AFTER)
            self._orphaned()

    # --- what the hub says ------------------------------------------------------------------------

    def _take(self, message: ToWorker) -> None:
        self._unheard = 0
        if isinstance(message, Result):
            self.calls.settle(message)
        elif isinstance(message, Ask):
            self.tell(self._report(message.number))
        elif isinstance(message, Failure):
            self.calls.settle(message)
        elif isinstance(message, Stop):
            if self.server is not None:
                self.server.should_exit = True
        elif isinstance(message, Welcome):
            self._welcome(message)
        elif isinstance(message, Want):
            if self._app is not None:
                self._app.bring(message.number)
        elif isinstance(message, Revoke) and not self._welcomed.is_set():
            self._revoked.append(message)
        else:
            self.gateway.take(message)

    def _welcome(self, welcome: Welcome) -> None:
        # It is the hub's, which is the parent of this process.
        settings: Settings = pickle.loads(welcome.settings)  # noqa: S301
        structlog.contextvars.bind_contextvars(worker=welcome.worker)
        configure_logging(settings.log_format, settings.log_level)
        room = descriptors.make_room(processes=settings.worker_count)
        of_address = settings.max_connections_per_address
        config = replace(
            gateway_config(settings, room),
            # The hub counts the handshakes and the sessions of the host, and passes connections
            # evenly, so that a share of them may be counted here.
            handshakes_per_s=None,
            max_sessions=room.sessions,
            max_connections_per_address=of_address
            and math.ceil(of_address / settings.worker_count),
        )
        self.settings = settings
        self.verifier = token_verifier(settings)
        self.gateway = WorkerGateway(
            config, SessionVerifier(self.verifier), self.tell, takes_acks=welcome.takes_acks
        )
        self._channel.on_flush = self.gateway.send_acks
        disconnects = self.gateway.disconnects
        self.verifier.refuses = lambda recipient, issued_at: disconnects.refuses(
            recipient, issued_at, time.time()
        )
        for revoke in self._revoked:
            self.gateway.revoke(revoke)
        self._revoked.clear()
        self._welcomed.set()

    def _report(self, number: int) -> Report:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        stats = None if self.processor is None else self.processor.stats
        gateway = self.gateway
        return Report(
            number=number,
            accepted=self.accepted,
            connections=len(gateway.sockets),
            sessions=gateway.entrance.sessions,
            cpu_s=usage.ru_utime + usage.ru_stime,
            memory_bytes=memory_bytes(),
            merged=gateway.merged,
            limited=gateway.sockets.limited,
            committed=0 if stats is None else stats.messages_committed,
            refused=0 if stats is None else stats.messages_refused,
            handshakes=gateway.entrance.handshakes,
            unforeseen=unforeseen,
            failures=task_failures,
            failing=failing_tasks(),
            durations=[
                (labels, each.counts, each.sum_s)
                for labels, each in self.requests.by_labels.items()
            ],
        )

    def _orphaned(self) -> None:
        """The hub is gone or hangs: clients must find another instance."""
        if not self._is_done:
            os._exit(1)


class SessionVerifier:
    """Verifies the tokens that come over sessions, and caches none of them.

    A session sends its token once. The client's HTTP calls with the same token may reach any
    worker. Only the workers that such a call reaches cache it.
    """

    def __init__(self, verifier: TokenVerifier) -> None:
        self._verifier = verifier

    def verify_now(self, token: str) -> Claims:
        """As :meth:`TokenVerifier.verify_now`."""
        return self._verifier.verify_now(token, remember=False)

    async def verify(self, token: str) -> Claims:
        """As :meth:`TokenVerifier.verify`."""
        return await self._verifier.verify(token, remember=False)


class _ShownSocket:
    """The socket that uvloop is shown for each connection that the hub passes: one for all of them.

    uvloop keeps it until the connection closes, but asks it only at first. A socket object for each
    connection would take 100 bytes of every session.
    """

    type = socket.SOCK_STREAM

    def __init__(self) -> None:
        self.family = int(socket.AF_INET)
        self.fd = -1

    def fileno(self) -> int:
        """The descriptor, which uvloop takes over."""
        return self.fd

    def close(self) -> None:
        """Nothing is left to close: uvloop has closed the descriptor."""


class _Server(uvicorn.Server):
    """uvicorn that serves the connections which the hub accepts."""

    def __init__(self, config: uvicorn.Config, worker: Worker, door: socket.socket) -> None:
        super().__init__(config)
        self._worker = worker
        self._door = door
        self._arriving: set[asyncio.Task[None]] = set()
        self._shown = _ShownSocket()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The hub decides when this process ends."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the door."""
        await super().startup(sockets)
        keep_what_exists()
        self._door.settimeout(0)
        asyncio.get_running_loop().add_reader(self._door.fileno(), self._let_in)
        self._worker.serves()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the door, let the last sessions say goodbye, and finish the requests."""
        while self._let_in():
            pass
        asyncio.get_running_loop().remove_reader(self._door.fileno())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GOODBYE_S):
                await self._worker.gateway.all_gone.wait()
        await super().shutdown(sockets)

    def _let_in(self) -> bool:
        """Take connections from the hub. Returns whether there may be more."""
        for _ in range(_AT_ONCE):
            try:
                family, fds, _, _ = socket.recv_fds(self._door, 1, 1)
            except OSError:  # no more for now
                return False
            if not family:
                return False
            self._worker.accepted += 1
            if not fds:  # the kernel has closed the connection
                log.warning("connection_not_taken", reason="no file descriptor is left")
            for fd in fds:
                task = asyncio.ensure_future(self._connect(_FAMILIES[family], fd))
                self._arriving.add(task)
                task.add_done_callback(self._arriving.discard)
        return True

    async def _connect(self, family: int, fd: int) -> None:
        shown, loop = self._shown, asyncio.get_running_loop()
        shown.family, shown.fd = family, fd
        try:
            await loop.connect_accepted_socket(self._protocol, cast("socket.socket", shown))
        except OSError as error:  # uvloop has not taken the descriptor
            log.warning("connection_not_taken", reason=str(error))
            os.close(fd)

    def _protocol(self) -> asyncio.Protocol:
        make: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = make(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol


_GOODBYE_S = 2.0


def run(channel: socket.socket, door: socket.socket) -> None:
    """Run a worker until its hub says stop, or is gone."""

    async def serve() -> None:
        await Worker().run(channel, door)

    uvloop.run(serve())
