"""Pokes that begin on a host reach its own sessions at once, and the others through the engine."""

from collections.abc import Callable, Sequence

from pokebridge.model import Poke
from pokebridge.publisher import Publisher


class HostPublisher(Publisher):
    """A publisher that calls ``deliver`` with each poke for a version before it publishes it.

    The signal comes back through the engine later. A session that was told that version is not
    told again (:meth:`~pokebridge.workers.link.RemoteSession.notify`). A poke without a version
    takes the way through the engine alone: its echo could not be told from the next poke.
    """

    deliver: Callable[[Poke], None] = staticmethod(lambda _: None)

    async def _send(self, pokes: Sequence[Poke]) -> None:
        for poke in pokes:
            if poke.version is not None:
                self.deliver(poke)
        await super()._send(pokes)
