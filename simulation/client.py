"""A client: the real, pure :class:`ClientCore`, with simulated connections, HTTP and token issuer.

It may listen to further recipients. Each of them has its own core, which shares the client's socket
as long as that carries it.
"""

from collections.abc import Callable
from typing import NamedTuple

from pokebridge.client.core import ClientCore
from pokebridge.client.driver import Driver
from pokebridge.client.events import (
    Abandon,
    AnyEvent,
    Closed,
    Connect,
    Opened,
    Pulled,
    PullFailed,
    Refused,
    Start,
    Text,
    Token,
    TokenFailed,
    Try,
    TryFailed,
    Upgraded,
    Wake,
)
from pokebridge.client.frames import parse_frame
from pokebridge.client.listening import SharedSocket, SharingDriver
from pokebridge.client.listens import SOCKET_LOST
from pokebridge.client.transports import Transport
from pokebridge.model import Page
from simulation.connections import ABNORMAL, Connection, Polled, WebSocket
from simulation.http import Answer
from simulation.instance import SimInstance, Work, ask
from simulation.invariants import Oracle
from simulation.loop import VirtualLoop
from simulation.network import Trouble
from simulation.scene import Scene
from simulation.sockets import Network, Wire
from simulation.tokens import issue_token

HOME_URL = "wss://home/v1/connect"
"""The address of the load balancer."""
PAGE_LIMIT = 5
"""Small, so that a client that was away pulls several pages."""
TOKEN_LIFE_S = (45.0, 200.0)


Route = Callable[[str, str], SimInstance | None]
"""Finds the instance that a connection to a URL gets to, for a recipient."""


class Machine(NamedTuple):
    """Where a client runs, and what surrounds it.

    - ``loop``: its process, whose name is that of the device
    - ``network``, ``trouble``: its network, and what is wrong with either
    - ``transport``: by what it connects
    - ``route``: finds the instance that a connection gets to
    """

    loop: VirtualLoop
    network: Network
    trouble: Trouble
    transport: Transport
    route: Route
    scene: Scene
    oracle: Oracle


class SimShell(Driver):
    """A core of one recipient, with all that carries out its actions.

    - ``core``, ``recipient``, ``device``, ``token``: what it is
    - ``machine``, ``loop``, ``network``, ``trouble``: where it runs
    - ``pulls_from``: the instance that answers its running pull
    - ``failing``: whether its last pull failed
    - ``left``: whether it has left for good
    - ``token_trouble``: whether the token issuer does not answer it
    - ``_connection``: its socket, or what polls one
    - ``_tried``: the WebSocket that it tries beside
    """

    def __init__(self, machine: Machine, recipient: str, cursor: int = 0) -> None:
        self.core = ClientCore(HOME_URL, cursor=cursor, transport=machine.transport)
        super().__init__(self.core, machine.scene.rng.random)
        self.machine = machine
        self.loop, self.network, self.trouble = machine.loop, machine.network, machine.trouble
        self._scene, self._oracle, self._route = machine.scene, machine.oracle, machine.route
        self.recipient = recipient
        self.device = machine.loop.name
        self.token = ""
        self.rng = machine.scene.rng
        self.pulls_from: SimInstance | None = None
        self.failing = False
        self.left = False
        self.token_trouble = False
        self._connection: Connection | None = None
        self._tried: Connection | None = None
        self._pull_began_at = 0.0

    @property
    def name(self) -> str:
        """For people."""
        return self.loop.name

    @property
    def wire(self) -> Wire | None:
        """What carries its connection, if it has one of its own."""
        return None if self._connection is None else self._connection.wire

    @property
    def instance(self) -> SimInstance | None:
        """The instance that it is connected to."""
        return None if self._connection is None else self._connection.instance

    @property
    def session(self) -> object:
        """Another object for each session of it; ``None`` while it has none."""
        return self._connection

    @property
    def ready(self) -> bool:
        """Whether it has a session and has heard ``ready``."""
        return self.core.ready

    @property
    def active(self) -> bool:
        """Whether it has neither left nor been told to stop."""
        return not (self.left or self.core.stopped)

    @property
    def pull_is_troubled(self) -> bool:
        """Whether a pull is under way, and something has gone wrong since it began."""
        if self.pulls_from is None:
            return False
        concerned = (self.trouble, self.pulls_from.trouble, self._scene.post.trouble)
        return max(trouble.over_at for trouble in concerned) >= self._pull_began_at

    def begin(self) -> None:
        """Start."""
        self._feed(Start())

    def wake(self) -> None:
        """The machine woke up, or changed its network."""
        self.loop.deliver(0.0, self._feed, Wake())

    def leave(self) -> None:
        """Leave for good, as when the page is closed."""
        self.left = True
        self._disconnect()

    def lose_connection(self) -> None:
        """The connections break, and both sides notice."""
        tried = self._tried
        if tried is not None:
            tried.drop(rudely=True)
            self.loop.deliver(0.0, self.ended, tried, ABNORMAL)
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.drop(rudely=True)
            self.loop.deliver(0.0, self._feed, Closed(ABNORMAL))

    # --- between the core and the world -----------------------------------------------------------

    def _feed(self, event: AnyEvent) -> None:
        if not self.left:
            super()._feed(event)

    def _on_ready_changed(self) -> None:
        self._oracle.readiness_changed(self)

    def _fetch_token(self) -> None:
        self.loop.call_later(self.rng.uniform(0.005, 0.1), self._receive_token)

    def _receive_token(self) -> None:
        if self.token_trouble:
            self._feed(TokenFailed())
            return
        now = self._scene.outside.wall()
        self.token = issue_token(self.recipient, now, self.rng.uniform(*TOKEN_LIFE_S))
        self._feed(Token())

    def _ping(self) -> None:
        if self._connection is not None:
            self._connection.say({"type": "ping"})

    def _authenticate(self) -> None:
        if self._connection is not None:
            self._connection.say({"type": "auth", "token": self.token})

    def _ack(self, version: int) -> None:
        if self._connection is not None:
            self._connection.say({"type": "ack", "version": version})

    def _stop(self, code: int) -> None:
        self._scene.trace.note(self.name, f"told to stop: {code}")
        self._disconnect()

    # --- the socket -------------------------------------------------------------------------------

    def _connect(self, action: Connect) -> None:
        self._disconnect()
        connection: Connection
        connection = Polled(self, self._on_unsent) if action.poll else WebSocket(self)
        self._oracle.polled += action.poll
        self._connection = connection
        connection.open(self._route(action.url, self.recipient), moved=action.moved)

    def _try(self, action: Try | Abandon) -> None:
        tried, self._tried = self._tried, None
        if tried is not None:
            tried.drop()
        if isinstance(action, Try):
            self._tried = WebSocket(self)
            self._tried.open(self._route(action.url, self.recipient), moved=False)

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.drop()

    def opened(self, connection: Connection) -> None:
        """The bridge has accepted a connection."""
        if connection is self._connection:
            self._feed(Opened())

    def heard(self, connection: Connection, text: str) -> None:
        """A frame has come over a connection."""
        if connection is self._tried:
            self._tried = None
            if parse_frame(text).get("type") != "ready":
                connection.drop()
                self._feed(TryFailed(opened=True))
                return
            self._disconnect()
            self._connection = connection
            self._oracle.switched += 1
            self._oracle.heard(self, text)
            self._oracle.readiness_changed(self)  # the core stays ready, now by this connection
            self._feed(Upgraded(text))
        elif connection is self._connection:
            self._oracle.heard(self, text)
            self._feed(Text(text))

    def refused(self, connection: Connection, status: int, retry_after_s: float | None) -> None:
        """The bridge has refused a connection."""
        if connection is self._tried:
            self.ended(connection, ABNORMAL)
        elif connection is self._connection:
            self._disconnect()
            self._feed(Refused(status, retry_after_s))

    def ended(self, connection: Connection, code: int) -> None:
        """A connection is closed, or could not be opened."""
        if connection is self._tried:
            self._tried = None
            self._feed(TryFailed(opened=connection.is_open))
        elif connection is self._connection:
            self._disconnect()
            self._feed(Closed(code))

    # --- pulls ------------------------------------------------------------------------------------

    def _pull(self, after: int) -> None:
        self._pull_began_at = self._scene.scheduler.now
        recipient, device = self.recipient, self.device
        self._ask(lambda at: at.pull(recipient, device, after, PAGE_LIMIT), self._on_page)

    def _on_page(self, page: Page | None) -> None:
        if self.left:
            return
        if page is None:
            self._end_pull(PullFailed())
            return
        self._oracle.received(self, page)
        if self.pull_is_troubled:
            self.trouble.happen()  # until now it could not see all messages
        if not page.messages:
            self._end_pull(Pulled(page.version, page.more, self.core.acks_by_socket))
            return
        if self.core.acks_by_socket:
            self._end_pull(Pulled(page.version, page.more, unacked=True))
            return
        recipient, device, version = self.recipient, self.device, page.version
        self._ask(
            lambda at: at.ack(recipient, device, version),
            lambda acked: self._end_pull(
                PullFailed(cursor=version) if acked is None else Pulled(version, page.more)
            ),
        )

    def _ask(self, work: Work, done: Answer) -> None:
        self.pulls_from = self._route(HOME_URL, self.recipient)
        ask(self.loop, self.network, self.pulls_from, work, done)

    def _end_pull(self, event: Pulled | PullFailed) -> None:
        failed = isinstance(event, PullFailed)
        if failed or self.failing or self.pull_is_troubled:
            self.trouble.happen()  # until now it could not see all messages
        self.pulls_from = None
        self.failing = failed
        self._feed(event)


class SimClient(SharingDriver, SimShell):
    """One device of a recipient, with all that it listens to: as the real ``PokeClient``."""

    def __init__(
        self,
        scene: Scene,
        oracle: Oracle,
        route: Route,
        loop: VirtualLoop,
        recipient: str,
        *,
        transport: Transport,
    ) -> None:
        network, trouble = Network(scene.rng), Trouble(scene.outside)
        super().__init__(
            Machine(loop, network, trouble, transport, route, scene, oracle), recipient
        )
        self._shared = SharedSocket(self._say)
        self._listens: dict[str, SimListening] = {}
        """By recipient, what it listens to or has listened to."""

    @property
    def listens(self) -> list["SimListening"]:
        """What it listens to now."""
        return [each for each in self._listens.values() if not each.left]

    def start(self) -> None:
        """Start the client."""
        self.loop.deliver(0.0, self.begin)

    def wake(self) -> None:
        """The machine woke up, or changed its network."""
        super().wake()
        self._shared.wake()

    def leave(self) -> None:
        """Leave for good, with all that it listens to."""
        for each in self.listens:
            each.leave()
        super().leave()

    def lose_socket(self) -> None:
        """Its connections break, and both sides notice."""
        for each in (self, *self.listens):
            each.lose_connection()

    def listen(self, recipient: str) -> None:
        """Listen to ``recipient`` as well, from where it was left before."""
        before = self._listens.get(recipient)
        if self.left or (before is not None and not before.left):
            return
        listening = SimListening(self, self._shared, recipient, self._oracle.handled(before))
        if before is not None:
            self._oracle.goes_on(before, listening)
        self._listens[recipient] = listening
        self._shared.enter(recipient, listening)
        listening.begin()

    def _say(self, message: dict[str, object]) -> None:
        if self._connection is not None:
            self._connection.say(message)


class SimListening(SimShell):
    """What a client listens to, until it leaves: as the real ``ListeningShell``."""

    def __init__(
        self, client: SimClient, shared: SharedSocket, recipient: str, cursor: int
    ) -> None:
        super().__init__(client.machine, recipient, cursor)
        self._client = client
        self._shared = shared
        self._part: object = None
        """Its part of the client's socket, another object for each."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.loop.name}+{self.recipient}"

    @property
    def instance(self) -> SimInstance | None:
        """The instance that it is connected to."""
        return super().instance if self._part is None else self._client.instance

    @property
    def session(self) -> object:
        """Another object for each session of it; ``None`` while it has none."""
        return self._part or super().session

    @property
    def active(self) -> bool:
        """Whether it listens."""
        return super().active and self._client.active

    def _on_ready_changed(self) -> None:
        super()._on_ready_changed()
        self._oracle.listened += self.core.ready

    def attach(self) -> None:
        """The client has a new socket: use it, unless this has one of its own."""
        if not self.core.ready:
            self._feed(Wake())

    def hear(self, event: Text | Closed) -> None:
        """Something came for this recipient over the client's socket, or that is gone."""
        if self._part is not None:
            if isinstance(event, Closed):
                self._part = None
            else:
                self._oracle.heard(self, event.text)
            self._feed(event)

    def stop(self, code: int) -> None:
        """The client was stopped for good."""
        self.left = True
        self._stop(code)

    def leave(self) -> None:
        """Stop listening."""
        self._shared.forget(self.recipient)
        self._part = None
        super().leave()

    async def close(self) -> None:
        """The same."""
        self.leave()

    def _connect(self, action: Connect) -> None:
        if self._shared.carry(self.recipient):
            self._part = part = object()
            self.loop.deliver(0.0, self._hold_part, part)
        elif self._shared.is_absent:
            # The core tries again later, and ``attach`` makes it do so at once.
            self.loop.deliver(0.0, self._feed, Closed(SOCKET_LOST))
        else:
            super()._connect(action)

    def _hold_part(self, part: object) -> None:
        if self._part is part:
            self._feed(Opened())
            self._authenticate()

    def _authenticate(self) -> None:
        if self._part is None:
            super()._authenticate()
        else:
            frame = {"type": "listen", "recipient": self.recipient, "token": self.token}
            self._shared.say(frame)

    def _ping(self) -> None:
        if self._part is None:
            super()._ping()
        else:  # the client watches over the socket
            self.loop.deliver(0.0, self._feed, Text('{"type":"pong"}'))

    def _try(self, action: Try | Abandon) -> None:
        if self._part is None:
            super()._try(action)
        elif isinstance(action, Try):
            self.loop.deliver(0.0, self._feed, TryFailed())

    def _disconnect(self) -> None:
        super()._disconnect()
        if self._part is not None:
            self._part = None
            self._shared.drop(self.recipient)
