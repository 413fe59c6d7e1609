"""An HTTP request on its way: it is answered, fails, or gets no answer at all."""

from collections.abc import Callable
from typing import Any

from simulation.loop import VirtualLoop
from simulation.sockets import Network

TIMEOUT_S = 10.0
"""The clients' (``client.pulling``)."""

Answer = Callable[[Any], None]
"""Takes what the instance answered, or ``None`` when it did not, or could not."""


class Call:
    """One request and its one answer."""

    def __init__(
        self, loop: VirtualLoop, network: Network, done: Answer, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._loop = loop
        self._network = network
        self._done = done
        self._over = False
        self._timeout = loop.call_later(timeout_s, self._end, None)

    def answer(self, result: Any) -> None:
        """The answer is on its way, unless the network is quiet: then it never comes."""
        if not self._network.quiet:
            self._loop.deliver(self._network.latency_s(), self._end, result)

    def _end(self, result: Any) -> None:
        if not self._over:
            self._over = True
            self._timeout.cancel()
            self._done(result)
