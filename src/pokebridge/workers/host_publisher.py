"""Pokes that begin on a host reach its own sessions at once, and the others through the engine."""

from collections.abc import Callable, Sequence

from pokebridge.model import Poke
from pokebridge.publisher import Publisher


class HostPublisher(Publisher):
    """A publisher that calls ``deliver`` with each poke for a version before it publishes it.

    The signal comes back through the engine later. A session that was poked for that version is not
    poked again (:meth:`~pokebridge.workers.link.RemoteSession.notify`). A poke without a version
    goes only through the engine: its echo could not be distinguished from the next poke.
    """

    deliver: Callable[[Poke], None] = staticmethod(lambda _: None)

    async def _send(self, pokes: Sequence[Poke]) -> None:
        for poke in pokes:
            if poke.version is not None:
                self.deliver(poke)
        await super()._send(pokes)
