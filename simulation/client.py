"""A client: the real, pure :class:`ClientCore`, with a simulated socket, HTTP and token issuer."""

from collections.abc import Callable

from pokebridge.client.core import ClientCore
from pokebridge.client.driver import Driver
from pokebridge.client.events import (
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
    Wake,
)
from pokebridge.framing import Opcode
from pokebridge.gateway.handshake import UpgradeRequest
from pokebridge.model import Page
from simulation.http import Answer
from simulation.instance import SimInstance, Work, ask
from simulation.invariants import Oracle
from simulation.loop import VirtualLoop
from simulation.network import Trouble
from simulation.scene import Scene
from simulation.sockets import Network, Wire, masked_frame, read_frame
from simulation.tokens import issue_token

HOME_URL = "wss://home/v1/connect"
"""The address of the load balancer."""
PAGE_LIMIT = 5
"""Small, so that a client that was away pulls several pages."""
TOKEN_LIFE_S = (45.0, 200.0)
_ABNORMAL = 1006  # RFC 6455, section 7.4.1: no close frame came


Route = Callable[[str, "SimClient"], SimInstance | None]
"""Finds the instance that a client's connection to a URL gets to."""


class SimClient(Driver):
    """One device of a recipient."""

    def __init__(
        self,
        scene: Scene,
        oracle: Oracle,
        route: Route,
        loop: VirtualLoop,
        recipient: str,
        device: str,
    ) -> None:
        self.core = ClientCore(HOME_URL)
        super().__init__(self.core, scene.rng.random)
        self._scene = scene
        self._oracle = oracle
        self._route = route
        self.loop = loop
        self.recipient = recipient
        self.device = device
        self.rng = scene.rng
        self.network = Network(scene.rng)
        self.trouble = Trouble(scene.outside)
        self.instance: SimInstance | None = None
        """The instance that its socket is connected to."""
        self.pulls_from: SimInstance | None = None
        """The instance that answers its running pull."""
        self.failing = False
        """Whether its last pull failed."""
        self.left = False
        self.token_trouble = False
        self._token = ""
        self._wire: Wire | None = None
        self._unparsed = b""
        self._is_open = False
        self._close_code = _ABNORMAL
        self._pull_began_at = 0.0

    @property
    def name(self) -> str:
        """For people."""
        return self.loop.name

    @property
    def wire(self) -> Wire | None:
        """Its connection, if it has one."""
        return self._wire

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

    def start(self) -> None:
        """Start the client."""
        self.loop.deliver(0.0, self._feed, Start())

    def wake(self) -> None:
        """The machine woke up, or changed its network."""
        self.loop.deliver(0.0, self._feed, Wake())

    def leave(self) -> None:
        """Leave for good, as when the page is closed."""
        self.left = True
        self._disconnect()

    def lose_socket(self) -> None:
        """The connection breaks, and both sides notice."""
        wire = self._wire
        if wire is not None:
            wire.hang_up(rudely=True)
            self._disconnect()
            self.loop.deliver(0.0, self._feed, Closed(_ABNORMAL))

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
        self._token = issue_token(self.recipient, now, self.rng.uniform(*TOKEN_LIFE_S))
        self._feed(Token())

    def _ping(self) -> None:
        self._say(b'{"type":"ping"}')

    def _authenticate(self) -> None:
        self._say(b'{"type":"auth","token":"%b"}' % self._token.encode())

    def _ack(self, version: int) -> None:
        self._say(b'{"type":"ack","version":%d}' % version)

    def _stop(self, code: int) -> None:
        self._scene.trace.note(self.name, f"told to stop: {code}")
        self._disconnect()

    # --- the socket -------------------------------------------------------------------------------

    def _connect(self, action: Connect) -> None:
        self._disconnect()
        url, moved = action.url, action.moved
        instance = self._route(url, self)
        if instance is not None and instance.vanished:
            return  # nobody answers: the core has a deadline
        door = None if instance is None or not instance.listens else instance.door()
        if door is None:
            self.loop.deliver(self.network.latency_s(), self._refused_by_nobody)
            return
        server_loop, port = door
        wire = self._wire = Wire(self.network, self, server_loop)
        self.instance = instance
        self._unparsed, self._is_open, self._close_code = b"", False, _ABNORMAL
        query = f"device={self.device}" + ("&moved=1" if moved else "")
        headers = [
            (b"host", b"home"),
            (b"upgrade", b"websocket"),
            (b"connection", b"Upgrade"),
            (b"sec-websocket-key", b"dGhlIHNhbXBsZSBub25jZQ=="),
            (b"sec-websocket-version", b"13"),
            (b"authorization", b"Bearer " + self._token.encode()),
        ]
        request = UpgradeRequest("GET", f"/v1/connect?{query}", headers, self.name)
        wire.carry(server_loop, port.accept, wire, request)

    def _refused_by_nobody(self) -> None:
        if self._wire is None:
            self._feed(Closed(_ABNORMAL))

    def _disconnect(self) -> None:
        wire, self._wire = self._wire, None
        self.instance = None
        if wire is not None:
            wire.hang_up()

    def _say(self, text: bytes) -> None:
        if self._wire is not None:
            self._wire.send(masked_frame(Opcode.TEXT, text))

    def on_data(self, wire: Wire, data: bytes) -> None:
        """Bytes from the instance."""
        self._unparsed += data
        while self._wire is wire and (self._is_open or self._has_opened()):
            found = read_frame(self._unparsed)
            if found is None:
                return
            frame, self._unparsed = found
            if frame.opcode is Opcode.TEXT:
                text = frame.payload.decode()
                self._oracle.heard(self, text)
                self._feed(Text(text))
            elif frame.opcode is Opcode.PING:
                wire.send(masked_frame(Opcode.PONG, frame.payload))
            elif frame.opcode is Opcode.CLOSE:
                self._close_code = int.from_bytes(frame.payload[:2], "big")
                wire.send(masked_frame(Opcode.CLOSE, frame.payload[:2]))

    def _has_opened(self) -> bool:
        """Read the answer to the handshake; whether it is there and says yes."""
        head, end, rest = self._unparsed.partition(b"\r\n\r\n")
        if not end:
            return False
        status = int(head.split()[1])
        if status == 101:
            self._unparsed, self._is_open = rest, True
            self._feed(Opened())
            return self._wire is not None
        asked_s = None
        for line in head.decode().split("\r\n"):
            name, _, value = line.partition(": ")
            if name == "Retry-After":
                asked_s = float(value)
        self._disconnect()
        self._feed(Refused(status, asked_s))
        return False

    def on_end(self, wire: Wire) -> None:
        """The instance has closed, or the connection broke."""
        if self._wire is wire:
            self._disconnect()
            self._feed(Closed(self._close_code))

    # --- pulls ------------------------------------------------------------------------------------

    def _pull(self, after: int) -> None:
        self._pull_began_at = self._scene.scheduler.now
        recipient, device = self.recipient, self.device
        self._ask(lambda at: at.pull(recipient, device, after, PAGE_LIMIT), self._on_page)

    def _on_page(self, page: Page | None) -> None:
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
        self.pulls_from = self._route(HOME_URL, self)
        ask(self.loop, self.network, self.pulls_from, work, done)

    def _end_pull(self, event: Pulled | PullFailed) -> None:
        failed = isinstance(event, PullFailed)
        if failed or self.failing or self.pull_is_troubled:
            self.trouble.happen()  # until now it could not see all messages
        self.pulls_from = None
        self.failing = failed
        self._feed(event)
