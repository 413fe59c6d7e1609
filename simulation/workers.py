"""The worker processes of an instance: real gateways and channels, on pipes of their own.

The instance is the hub (docs/cores.md). Its HTTP requests are answered by the hub alone.
"""

import asyncio
import time
from collections.abc import Callable
from random import Random
from typing import Final

from pokebridge.gateway.entrance import Entrance
from pokebridge.gateway.gateway import Gateway
from pokebridge.server.from_settings import gateway_config
from pokebridge.server.token_keys import token_verifier
from pokebridge.settings import Settings
from pokebridge.wire import Disconnect
from pokebridge.workers.channel import CONGESTED_BYTES, Channel
from pokebridge.workers.frames import Revoke, ToWorker, decode_to_worker
from pokebridge.workers.link import WorkerLink
from pokebridge.workers.worker_gateway import WorkerGateway
from simulation.loop import VirtualLoop
from simulation.sockets import Port

_NARROW: Final = 2048
"""A pipe is this many times narrower than a real one, so that a few pokes congest it."""
_WINDOW_BYTES: Final = 256
"""The most bytes on their way through a pipe. The rest waits at the sender."""
_DELAY_S: Final = (0.00005, 0.001)
_STARTS_IN_S: Final = (0.05, 0.4)


class PipeEnd(asyncio.Transport):
    """One end of the pair of sockets between a hub and a worker, as an asyncio transport."""

    def __init__(self, loop: VirtualLoop, protocol: asyncio.Protocol, delay_s: float) -> None:
        super().__init__()
        self.loop = loop
        self._protocol = protocol
        self._delay_s = delay_s
        self._peer: PipeEnd = self
        self._unsent = bytearray()
        self._on_its_way = 0
        self._is_paused = False
        self._is_closing = False
        self._is_gone = False

    def join(self, peer: "PipeEnd") -> None:
        """Make ``peer`` the other end."""
        self._peer = peer

    def open(self) -> None:
        """Tell the protocol that it is connected."""
        self._protocol.connection_made(self)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """See asyncio."""
        if self._is_closing or self._is_gone:
            return
        self._unsent += data
        self._flush()
        if not self._is_paused and len(self._unsent) > CONGESTED_BYTES // _NARROW:
            self._is_paused = True
            self._protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        """What waits, as if the pipe were as wide as a real one."""
        return len(self._unsent) * _NARROW

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """The limit is the channel's, for a narrower pipe."""

    def close(self) -> None:
        """See asyncio."""
        self._is_closing = True
        if not self._unsent:
            self._end()

    def abort(self) -> None:
        """See asyncio."""
        self._unsent.clear()
        self._end()

    def cut(self) -> None:
        """This end's process has died: only the other end is told."""
        if not self._is_gone:
            self._is_gone = True
            self._peer.loop.deliver(self._delay_s, self._peer.lose)

    def _flush(self) -> None:
        size = min(len(self._unsent), _WINDOW_BYTES - self._on_its_way)
        if size > 0:
            data = bytes(self._unsent[:size])
            del self._unsent[:size]
            self._on_its_way += size
            self._peer.loop.deliver(self._delay_s, self._peer.arrive, data)
        if self._is_paused and len(self._unsent) <= CONGESTED_BYTES // _NARROW // 4:
            self._is_paused = False
            self._protocol.resume_writing()
        if self._is_closing and not self._unsent:
            self._end()

    def arrive(self, data: bytes) -> None:
        """Bytes have come from the other end."""
        if self._is_gone:
            return
        self._peer.loop.deliver(0.0, self._peer.has_read, len(data))
        self._protocol.data_received(data)

    def has_read(self, size: int) -> None:
        """The other end has taken so many bytes: more fit."""
        self._on_its_way -= size
        if not self._is_gone:
            self._flush()

    def _end(self) -> None:
        if not self._is_gone:
            self.cut()
            self.loop.call_soon(self._protocol.connection_lost, None)

    def lose(self) -> None:
        """The other end is gone."""
        if not self._is_gone:
            self._is_gone = True
            self._protocol.connection_lost(None)


class SimWorker:
    """One worker process, from its start to its end.

    - ``loop``: its loop
    - ``name``: for people
    - ``port``: its clients' sockets; open once it serves
    - ``ended``: done when the hub knows that the process has ended
    - ``_hub``, ``_link``, ``_hub_end``: the hub's loop and gateway, and its end of the channel
    - ``_own_end``: the worker's end
    - ``_new_port``: makes the closed port of an entrance
    """

    def __init__(
        self,
        hub: VirtualLoop,
        name: str,
        number: int,
        gateway: Gateway,
        settings: Settings,
        new_port: Callable[[Entrance], Port],
        rng: Random,
    ) -> None:
        """To be made by the hub, of which it is worker ``number``."""
        self.loop = hub.sibling(name)
        self.name = name
        self.port = new_port(gateway.entrance)
        self.ended: asyncio.Future[None] = hub.create_future()
        self._hub = hub
        self._gateway = gateway
        self._settings = settings
        self._new_port = new_port
        self._link = WorkerLink(number, gateway)
        self._link.on_broken = self._broken_off
        self._delay_s = rng.uniform(*_DELAY_S)
        self._hub_end = PipeEnd(hub, self._link.channel, self._delay_s)
        self._own_end: PipeEnd | None = None
        self.loop.deliver(rng.uniform(*_STARTS_IN_S), self._begin)

    @property
    def serves(self) -> bool:
        """Whether connections are passed to it."""
        return self.port.is_open

    def revoke(self, disconnect: Disconnect) -> None:
        """The hub tells it of a revocation."""
        self._link.send(Revoke(disconnect))

    def break_channel(self) -> None:
        """The channel breaks, as when too much is unsent."""
        self._hub_end.abort()

    def kill(self, *, machine: bool = False) -> None:
        """SIGKILL, or the whole ``machine`` loses power."""
        if self.loop.dead:
            return
        self.loop.kill()
        self.port.close(tells=not machine)
        if self._own_end is not None:
            self._own_end.cut()
        else:
            self._hub.deliver(self._delay_s, self._broken_off)

    def _begin(self) -> None:
        """The process has started, and has been told what it must know."""
        channel: Channel[ToWorker] = Channel(
            decode_to_worker,
            lambda message: worker.take(message),  # noqa: PLW0108 - it is made below
            self.kill,
        )
        self._own_end = PipeEnd(self.loop, channel, self._delay_s)
        self._own_end.join(self._hub_end)
        self._hub_end.join(self._own_end)
        self._own_end.open()
        verifier = token_verifier(self._settings)
        worker = WorkerGateway(
            gateway_config(self._settings, None),
            verifier,
            channel.send,
            takes_acks=self._gateway.on_ack is not None,
        )
        verifier.refuses = lambda recipient, issued_at: worker.disconnects.refuses(
            recipient, issued_at, time.time()
        )
        worker.start(serves=True)
        self.loop.create_task(_keep_time(worker))
        self._hub.deliver(self._delay_s, self._serve, worker)

    def _serve(self, worker: WorkerGateway) -> None:
        """The hub has heard that it is ready."""
        if self.loop.dead:
            return
        self._hub_end.open()
        for disconnect in self._gateway.bridge.disconnects.in_force(time.time()):
            self.revoke(disconnect)
        self.port = self._new_port(worker.entrance)
        self.port.is_open = True

    def _broken_off(self) -> None:
        """The hub's end of the channel has ended: so has the process, if the hub can help it."""
        self.kill()
        if not self.ended.done():
            self.ended.set_result(None)


async def _keep_time(worker: WorkerGateway) -> None:
    while True:
        await asyncio.sleep(1.0)
        worker.refuse_overdue(time.time())
