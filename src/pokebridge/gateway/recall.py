"""Recover disconnects that were lost in a gap: ask the other instances for the recent ones."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence

from pokebridge.backoff import spread
from pokebridge.errors import TransportError
from pokebridge.gateway.bridge import Bridge
from pokebridge.gateway.config import GatewayConfig
from pokebridge.sharding import shard_of
from pokebridge.transport.base import Signal, Transport
from pokebridge.wire import MISSED, encode_disconnect, encode_probe

# The pauses before an instance asks after a gap. It asks twice, since the instances that know a
# disconnect may have been in the same gap, and receive only the second question.
ASK_AFTER_S = (0.5, 10.0)
ANSWER_WITHIN_S = 1.0
# How often an answer is tried: an instance that knows may be stopped at the second question.
ANSWER_TRIES = 10


class Recall:
    """Asks for recent disconnects, and answers.

    Args:
        transport: carries the questions and the answers.
        bridge: knows the recent disconnects, and hears the questions.
        config: the gateway's.
        spawn: runs a named coroutine function in the background.
    """

    def __init__(
        self,
        transport: Transport,
        bridge: Bridge,
        config: GatewayConfig,
        spawn: Callable[[str, Callable[[], Awaitable[None]]], None],
    ) -> None:
        self._transport = transport
        self._disconnects = bridge.disconnects
        self._question = Signal(encode_probe(f"{MISSED}{config.instance}"))
        self._shard_count = config.shard_count
        self._spawn = spawn
        # Whether the first question, or an answer, is about to be published.
        self._will_ask = False
        self._will_answer = False
        bridge.on_asked = self.on_asked

    def on_missed(self) -> None:
        """This instance may have missed signals, and receives again."""
        if not self._will_ask:
            self._will_ask = True
            self._spawn("recall_disconnects", self._ask)

    def on_asked(self) -> None:
        """An instance asks. It may be this one, which may know what the others do not."""
        if not self._will_answer:
            self._will_answer = True
            self._spawn("repeat_disconnects", self._answer)

    async def _ask(self) -> None:
        for pause_s in ASK_AFTER_S:
            await asyncio.sleep(pause_s)
            self._will_ask = False
            with contextlib.suppress(TransportError):  # the next gap will ask
                await self._transport.publish([self._question])

    async def _answer(self) -> None:
        """Repeat what is known, unless another instance has done it in the meantime."""
        asked_s = time.time()
        for _ in range(ANSWER_TRIES):
            await asyncio.sleep(spread(ANSWER_WITHIN_S, 0.0, 1.0))
            self._will_answer = False
            with contextlib.suppress(TransportError):
                if signals := self._known_since(asked_s):
                    await self._transport.publish(signals)
                return

    def _known_since(self, asked_s: float) -> Sequence[Signal]:
        known = self._disconnects.to_repeat(time.time(), unless_heard_since_s=asked_s)
        return [
            Signal(encode_disconnect(**each._asdict()), shard_of(each.recipient, self._shard_count))
            for each in known
        ]
