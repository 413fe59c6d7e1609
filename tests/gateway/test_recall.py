"""Disconnects that a gap has swallowed: whoever knows them answers, also after a failure."""

import time
from collections.abc import Sequence
from typing import Any

import pytest

from pokebridge.errors import TransportError
from pokebridge.gateway import recall
from pokebridge.testing.transport import RecordingReceiver
from pokebridge.transport.base import Feed, Signal
from pokebridge.wire import Disconnect, decode_signal
from tests.gateway.harness import BOB, running
from tests.support import wait_until


async def test_an_answer_that_the_engine_refuses_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who asked twice may never ask again, and only this instance may know."""
    monkeypatch.setattr(recall, "ANSWER_WITHIN_S", 0.01)
    async with running() as server:
        receiver = RecordingReceiver()
        await server.transport.subscribe(Feed.ALL, receiver)
        publish, refusals = server.transport.publish, 3

        async def refuse(signals: Sequence[Signal]) -> None:
            nonlocal refusals
            if any(isinstance(decode_signal(signal.body), Disconnect) for signal in signals):
                refusals -= 1
                if refusals >= 0:
                    raise TransportError("away")
            await publish(signals)

        monkeypatch.setattr(server.transport, "publish", refuse)
        at_ms = int(time.time() * 1000)
        server.gateway.bridge.disconnects.note(Disconnect(BOB, at_ms), time.time())
        server.gateway.bridge.on_asked()

        def repeated() -> list[Any]:
            heard = (decode_signal(body) for body in receiver.payloads)
            return [each for each in heard if isinstance(each, Disconnect)]

        await wait_until(lambda: bool(repeated()))
        assert repeated() == [Disconnect(BOB, at_ms, is_repeated=True)]
        assert refusals < 0
