"""HTTP between a caller and an instance: it works, fails, or takes for ever."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from pokebridge.errors import PokebridgeError
from simulation.loop import VirtualLoop
from simulation.sockets import Network

if TYPE_CHECKING:
    from simulation.instance import SimInstance

TIMEOUT_S = 10.0
"""The clients' (``client.pulling``)."""

Answer = Callable[[Any], None]
"""Takes what the instance answered, or ``None`` when it did not, or could not."""
Work = Callable[["SimInstance"], Awaitable[Any]]


class Call:
    """One request and its one answer."""

    def __init__(self, loop: VirtualLoop, network: Network, done: Answer) -> None:
        self._loop = loop
        self._network = network
        self._done = done
        self._over = False
        self._timeout = loop.call_later(TIMEOUT_S, self._end, None)

    def answer(self, result: Any) -> None:
        """The answer is on its way, unless the network is quiet: then it never comes."""
        if not self._network.quiet:
            self._loop.deliver(self._network.latency_s(), self._end, result)

    def _end(self, result: Any) -> None:
        if not self._over:
            self._over = True
            self._timeout.cancel()
            self._done(result)


class Http:
    """All requests of a world."""

    def ask(
        self,
        loop: VirtualLoop,
        network: Network,
        instance: "SimInstance | None",
        work: Work,
        done: Answer,
    ) -> None:
        """Have ``instance`` do ``work`` for a caller on ``loop``."""
        call = Call(loop, network, done)
        if network.quiet or (instance is not None and instance.vanished):
            return
        if instance is None or not instance.listens:
            call.answer(None)
            return
        instance.loop.deliver(network.latency_s(), self._serve, instance, work, call)

    def _serve(self, instance: "SimInstance", work: Work, call: Call) -> None:
        if not instance.listens:
            call.answer(None)
            return
        instance.calls[call] = None
        instance.loop.create_task(self._answer(instance, work, call))

    async def _answer(self, instance: "SimInstance", work: Work, call: Call) -> None:
        try:
            result = await work(instance)
        except PokebridgeError:
            result = None
        instance.calls.pop(call, None)
        call.answer(result)
