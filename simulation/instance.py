"""A real instance without its HTTP server, in a process that can be stopped and killed."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import count
from typing import Any

from pokebridge.errors import PokebridgeError
from pokebridge.gateway.entrance import Entrance
from pokebridge.model import NewMessage, Page, Receipt
from pokebridge.server.assemble import assemble
from pokebridge.server.from_settings import Adapters
from pokebridge.settings import Settings
from pokebridge.wire import Disconnect
from simulation.http import TIMEOUT_S, Answer, Call
from simulation.invariants import Oracle
from simulation.loop import VirtualLoop
from simulation.network import Peer, Trouble
from simulation.polls import WaitingCalls, send_frames
from simulation.scene import GROUP_PREFIX, Scene
from simulation.sockets import Network, Port
from simulation.workers import SimWorker

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
        config = scene.config
        self.workers: list[SimWorker | None] = [None] * config.workers
        """Its worker processes, if there are several; ``None`` for one that has not begun."""
        self.loops = [loop]
        """The loops of all its processes so far."""
        settings = self._settings = Settings(
            instance=name,
            workers=config.workers,
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
            max_listened_recipients=config.listens_at_most,
            group_prefixes=(GROUP_PREFIX,),
            audience_pulls_per_s=config.audience_pulls_per_s,
        )
        self._mailbox = scene.post.connect(self)
        self._adapters = Adapters(
            transport=scene.broker.connect(self),
            coordination=scene.store.connect(self),
            mailbox=self._mailbox,
        )
        self.real = assemble(settings, self._adapters, url=self.url)
        self.real.gateway.bridge.on_revoked = self._tell_workers
        self.port = self._new_port(self.real.gateway.entrance)
        """Where clients connect, if it has no workers."""

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
            return
        if len(self.workers) > 1:
            for place in range(len(self.workers)):
                self.loop.create_task(self._keep_worker(place))
            while len(self.serving_workers) < len(self.workers):  # noqa: ASYNC110 - it is short
                await asyncio.sleep(0.05)
        self.port.is_open = True
        self._scene.trace.note(self.name, "listens")

    async def _keep_worker(self, place: int) -> None:
        for life in count(1):
            worker = self.workers[place] = SimWorker(
                self.loop,
                f"{self.name}/{place + 1}.{life}",
                place + 1,
                self.real.gateway,
                self._settings,
                self._new_port,
                self._scene.rng,
            )
            self.loops.append(worker.loop)
            await worker.ended
            self._scene.trace.note(worker.name, "has ended")
            await asyncio.sleep(self._scene.rng.uniform(0.0, 0.2))

    def _tell_workers(self, disconnect: Disconnect) -> None:
        for worker in self.serving_workers:
            worker.revoke(disconnect)

    def _new_port(self, entrance: Entrance) -> Port:
        http = partial(WaitingCalls, self.real.gateway, self.real.parts.verifier)
        return Port(entrance, partial(self._oracle.written, self), http)

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
            self.port.is_open = False
            waits_until = self.loop.time() + _GRACE_S
            while self.calls and self.loop.time() < waits_until:  # noqa: ASYNC110 - as uvicorn does
                await asyncio.sleep(0.1)
        await self.real.close()
        for adapter in (self._adapters.coordination, self._adapters.transport, self._mailbox):
            await adapter.close()
        self._exit()

    def _exit(self) -> None:
        self._die()

    def kill(self, *, machine: bool = False) -> None:
        """SIGKILL, or the whole ``machine`` loses power: then nobody tells its clients."""
        if self.died_at is not None:
            return
        self.vanished = machine
        self._die(machine=machine)
        if not machine:
            for call in self.calls:
                call.answer(None)

    def _die(self, *, machine: bool = False) -> None:
        for worker in self.workers:
            if worker is not None:
                worker.kill(machine=machine)
        self.port.close(tells=not machine)
        self.died_at = self._scene.scheduler.now
        self.trouble.begin()
        self.loop.kill()
        self._scene.broker.drop(self)
        self.ended.set_result(None)

    # --- what comes over the network --------------------------------------------------------------

    def door(self) -> tuple[VirtualLoop, Port] | None:
        """Where a new connection gets to: of the workers that serve, the one with the fewest."""
        if len(self.workers) == 1:
            return self.loop, self.port
        doors = [(worker.loop, worker.port) for worker in self.serving_workers]
        return min(doors, key=lambda door: door[1].load, default=None)

    @property
    def serving_workers(self) -> Sequence[SimWorker]:
        """Its workers that take connections."""
        return [worker for worker in self.workers if worker is not None and worker.serves]

    async def pull(self, recipient: str, device: str, after: int, limit: int) -> Page:
        """``GET /v1/messages``."""
        devices = self.real.parts.devices
        assert devices is not None
        await devices.see(recipient, device)
        return await self._mailbox.read(recipient, after=after, limit=limit)

    async def pull_when_new(
        self, token: str, device: str, after: int, limit: int, wait_s: float
    ) -> Page:
        """``GET /v1/messages?wait_s``."""
        identity = await self.real.parts.verifier.verify(token)
        polled = self.real.gateway.poll(identity, device, "", lasts=False, moved=True)
        return await polled.read_when_new(
            wait_s,
            self.real.gateway.verify_every_s,
            lambda: self.pull(identity.subject, device, after, limit),
            lambda page: page.version != after,
        )

    async def ack(self, recipient: str, device: str, version: int) -> bool:
        """``POST /v1/messages/ack``."""
        await self._mailbox.ack(recipient, device, version)
        return True

    async def send(self, message: NewMessage) -> Receipt:
        """``POST /v1/messages``."""
        processor = self.real.parts.processor
        assert processor is not None
        return await processor.send(message)

    async def send_frames(self, token: str, session: str, body: bytes) -> bool:
        """``POST /v1/pokes/frames``."""
        return await send_frames(self.real.gateway, self.real.parts.verifier, token, session, body)

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
    def listens(self) -> bool:
        """Whether its port is open."""
        return self.port.is_open


Work = Callable[[SimInstance], Awaitable[Any]]
"""What an instance does for a request; returns the answer."""


def ask(
    loop: VirtualLoop,
    network: Network,
    instance: SimInstance | None,
    work: Work,
    done: Answer,
    timeout_s: float = TIMEOUT_S,
) -> None:
    """Send a request to ``instance`` for a caller on ``loop``; ``done`` takes the answer."""
    call = Call(loop, network, done, timeout_s)
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
