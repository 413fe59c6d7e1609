"""A real instance without its HTTP server, in a process that can be stopped and killed."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from pokebridge.errors import PokebridgeError
from pokebridge.gateway.handshake import UpgradeRequest
from pokebridge.model import NewMessage, Page, Receipt
from pokebridge.server.assemble import assemble
from pokebridge.server.from_settings import Adapters
from pokebridge.settings import Settings
from simulation.http import Answer, Call
from simulation.invariants import Oracle
from simulation.loop import VirtualLoop
from simulation.network import Peer, Trouble
from simulation.scene import Scene
from simulation.sockets import Network, Socket, Wire

_GRACE_S = 5.0


class SimInstance(Peer):
    """One process that runs an instance."""

    def __init__(self, scene: Scene, oracle: Oracle, loop: VirtualLoop, base: str) -> None:
        super().__init__(loop, loop.name)
        name = loop.name
        self.base = base
        """Its name for the supervisor, which stays when a restart changes ``name``."""
        self._scene = scene
        self._oracle = oracle
        self.url = f"wss://{name}.sim"
        self.listens = False
        """Whether its port is open."""
        self.began_at = scene.scheduler.now
        self.stopping = False
        self.vanished = False
        """Whether the whole machine is gone, so that it does not even refuse connections."""
        self.died_at: float | None = None
        self.calls: dict[Call, None] = {}
        """The HTTP requests under way."""
        self.ended: asyncio.Future[None] = scene.outside.create_future()
        self.denial = Trouble(scene.outside)
        """When the broker does not let it subscribe to everything."""
        self._sockets: list[Socket] = []
        config = scene.config
        settings = Settings(
            instance=name,
            advertise_url=self.url,
            transport="sim://broker",
            mailbox="sim://mailbox",
            coordination="sim://store",
            mode=config.mode,
            assignment=config.assignment,
            lease_s=config.lease_s,
            shard_count=config.shard_count,
            verify_every_s=config.verify_every_s,
            jwt_secret="of no use, but there must be one",  # type: ignore[arg-type] # noqa: S106 - as in a file
            max_sessions=1000,
            handshakes_per_s=0,
            max_sessions_per_address=0,
        )
        self._mailbox = scene.post.connect(self)
        self.real = assemble(
            settings,
            Adapters(
                transport=scene.broker.connect(self),
                coordination=scene.store.connect(self),
                mailbox=self._mailbox,
            ),
            url=self.url,
        )

    # --- its life ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the process."""
        self.loop.deliver(0.0, self._begin)

    def _begin(self) -> None:
        self.loop.create_task(self._serve())

    async def _serve(self) -> None:
        try:
            await self.real.start()
        except PokebridgeError as error:
            self._scene.trace.note(self.name, f"can't start: {error}")
            self._exit()
        else:
            self.listens = True
            self._scene.trace.note(self.name, "listens")

    def stop(self) -> None:
        """SIGTERM."""
        if not self.stopping:
            self.stopping = True
            self.loop.deliver(0.0, self._end)

    def _end(self) -> None:
        self.loop.create_task(self._shut_down())

    async def _shut_down(self) -> None:
        if self.listens:
            await self.real.drain()
            self.listens = False
            waits_until = self.loop.time() + _GRACE_S
            while self.calls and self.loop.time() < waits_until:  # noqa: ASYNC110 - as uvicorn does
                await asyncio.sleep(0.1)
        await self.real.close()
        self._exit()

    def _exit(self) -> None:
        self._die()
        for socket in self._sockets:
            socket.cut()

    def kill(self, *, machine: bool = False) -> None:
        """SIGKILL, or the whole ``machine`` loses power: then nobody tells its clients."""
        if self.died_at is not None:
            return
        self.vanished = machine
        self._die()
        for socket in self._sockets:
            if machine:
                socket.wire.lose()
            else:
                socket.cut()
        if not machine:
            for call in self.calls:
                call.answer(None)

    def _die(self) -> None:
        self.listens = False
        self.died_at = self._scene.scheduler.now
        self.trouble.begin()
        self.loop.kill()
        self._scene.broker.drop(self)
        self.ended.set_result(None)

    # --- what comes over the network --------------------------------------------------------------

    def accept(self, wire: Wire, request: UpgradeRequest) -> None:
        """A client connects and asks for an upgrade."""
        self._sockets = [socket for socket in self._sockets if not socket.is_gone]
        written, client = self._oracle.written, wire.client
        socket = Socket(wire, lambda data, unsent: written(self, client, data, unsent))
        if not self.listens:
            socket.cut()
            return
        self._sockets.append(socket)
        self.real.gateway.entrance.upgrade(socket, request, lambda: None)

    async def pull(self, recipient: str, device: str, after: int, limit: int) -> Page:
        """``GET /v1/messages``."""
        devices = self.real.parts.devices
        assert devices is not None
        await devices.see(recipient, device)
        return await self._mailbox.read(recipient, after=after, limit=limit)

    async def ack(self, recipient: str, device: str, version: int) -> bool:
        """``POST /v1/messages/ack``."""
        await self._mailbox.ack(recipient, device, version)
        return True

    async def send(self, message: NewMessage) -> Receipt:
        """``POST /v1/messages``."""
        processor = self.real.parts.processor
        assert processor is not None
        return await processor.send(message)

    async def disconnect(self, recipient: str) -> None:
        """``DELETE /v1/sessions/{recipient}``."""
        await self.real.parts.revocations.disconnect(recipient)

    async def revoke(self, recipient: str) -> None:
        """``DELETE /v1/sessions/{recipient}?revoke=true``."""
        await self.real.parts.revocations.revoke(recipient)

    # --- its state --------------------------------------------------------------------

    @property
    def is_well(self) -> bool:
        """Whether it serves and has no trouble."""
        return self.serves and self.hears_since < float("inf")

    @property
    def serves(self) -> bool:
        """Whether it takes clients, and is not to stop."""
        return self.listens and not self.stopping and not self.real.gateway.draining

    @property
    def hears_since(self) -> float:
        """Since when it hears the broker and has no other trouble; infinity while it does not."""
        return max(self.began_at, self.line.over_at, self.denial.over_at, self.trouble.over_at)

    @property
    def gaps(self) -> int:
        """How many gaps it has noticed."""
        return self.real.gateway.subscriptions.gaps

    @property
    def sockets(self) -> Sequence[Socket]:
        """The open sockets of its clients."""
        return self._sockets


Work = Callable[[SimInstance], Awaitable[Any]]
"""What an instance does for a request; returns the answer."""


def ask(
    loop: VirtualLoop, network: Network, instance: SimInstance | None, work: Work, done: Answer
) -> None:
    """Send a request to ``instance`` for a caller on ``loop``; ``done`` takes the answer."""
    call = Call(loop, network, done)
    if network.quiet or (instance is not None and instance.vanished):
        return
    if instance is None or not instance.listens:
        call.answer(None)
        return
    instance.loop.deliver(network.latency_s(), _serve, instance, work, call)


def _serve(instance: SimInstance, work: Work, call: Call) -> None:
    if not instance.listens:
        call.answer(None)
        return
    instance.calls[call] = None
    instance.loop.create_task(_answer(instance, work, call))


async def _answer(instance: SimInstance, work: Work, call: Call) -> None:
    try:
        result = await work(instance)
    except PokebridgeError:
        result = None
    instance.calls.pop(call, None)
    call.answer(result)
