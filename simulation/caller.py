"""A program without a client: it repeats one HTTP call that waits for messages."""

from collections.abc import Callable
from typing import Final

from pokebridge.model import Page
from simulation.http import TIMEOUT_S
from simulation.instance import SimInstance, ask
from simulation.invariants import Oracle
from simulation.loop import VirtualLoop
from simulation.network import Trouble
from simulation.scene import Scene
from simulation.sockets import Network
from simulation.tokens import issue_token

WAIT_S: Final = 25.0
"""How long a call waits for a message."""
_PAGE_LIMIT: Final = 5
_TOKEN_LIFE_S: Final = 60.0
_AGAIN_S: Final = 1.0


class SimCaller:
    """Repeats ``GET /v1/messages?wait_s``, a second later when a call has failed.

    It is ready once an instance has taken its call, until a call fails. It acks what it has pulled,
    whether that succeeds or not: a later ack covers it.

    - ``name``, ``recipient``: what it is
    - ``instance``: who has its call, or had the last one
    - ``ready``: whether its last call was taken, and has not failed
    - ``trouble``: its own trouble; it never has any
    """

    active = True
    failing = False
    pull_is_troubled = False

    def __init__(
        self,
        scene: Scene,
        oracle: Oracle,
        route: Callable[[str], SimInstance | None],
        loop: VirtualLoop,
        recipient: str,
        network: Network,
    ) -> None:
        self.name = loop.name
        self.recipient = recipient
        self.instance: SimInstance | None = None
        self.ready = False
        self.trouble = Trouble(scene.outside)
        self._scene, self._oracle, self._route = scene, oracle, route
        self._loop = loop
        self._network = network
        self._cursor = 0

    def start(self) -> None:
        """Begin to call."""
        self._loop.deliver(0.0, self._call)

    def _call(self) -> None:
        instance = self._route(self.recipient)
        if instance is not self.instance:
            self._become(ready=False)
            self.instance = instance
        token = issue_token(self.recipient, self._scene.outside.wall(), _TOKEN_LIFE_S)
        after = self._cursor

        async def pull(instance: SimInstance) -> Page:
            self._become(ready=True)
            return await instance.pull_when_new(token, self.name, after, _PAGE_LIMIT, WAIT_S)

        ask(
            *(self._loop, self._network, instance, pull, self._on_page),
            timeout_s=WAIT_S + TIMEOUT_S,
        )

    def _on_page(self, page: Page | None) -> None:
        if page is None:
            self._become(ready=False)
            self._loop.call_later(_AGAIN_S, self._call)
            return
        self._oracle.received(self, page)
        self._cursor = page.version
        if page.messages:
            name, recipient, version = self.name, self.recipient, page.version
            instance = self._route(recipient)
            ask(
                *(self._loop, self._network, instance),
                lambda at: at.ack(recipient, name, version),
                lambda _acked: None,
            )
        self._call()

    def _become(self, *, ready: bool) -> None:
        if self.ready != ready:
            self.ready = ready
            self._oracle.readiness_changed(self)
