"""Both ends of a real channel, in one process."""

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from pokebridge.workers.calls import Answers, Calls
from pokebridge.workers.channel import Channel
from pokebridge.workers.frames import (
    Call,
    Failure,
    Message,
    Result,
    ToHub,
    ToWorker,
    decode_to_hub,
    decode_to_worker,
)


@dataclass
class Ends:
    """A hub's and a worker's end, and what each has heard that is no call."""

    hub: Channel[ToHub] = field(init=False)
    worker: Channel[ToWorker] = field(init=False)
    answers: Answers = field(init=False)
    calls: Calls = field(init=False)
    hub_heard: list[Message] = field(default_factory=list)
    worker_heard: list[Message] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    on_hub_heard: Callable[[Message], None] = lambda _: None
    on_worker_heard: Callable[[Message], None] = lambda _: None

    def to_hub(self, message: ToHub) -> None:
        """A message arrives at the hub."""
        if isinstance(message, Call):
            self.answers.answer(message)
        else:
            self.hub_heard.append(message)
            self.on_hub_heard(message)

    def to_worker(self, message: ToWorker) -> None:
        """A message arrives at the worker."""
        if isinstance(message, Result | Failure):
            self.calls.settle(message)
        else:
            self.worker_heard.append(message)
            self.on_worker_heard(message)


@asynccontextmanager
async def connected() -> AsyncIterator[Ends]:
    """Two ends that are connected."""
    ends, pair = Ends(), socket.socketpair()
    ends.hub = Channel(decode_to_hub, ends.to_hub, lambda: ends.broken.append("hub"))
    ends.worker = Channel(decode_to_worker, ends.to_worker, lambda: ends.broken.append("worker"))
    ends.answers = Answers(ends.hub.send, ends.hub.room)
    ends.calls = Calls(ends.worker.send, ends.worker.room)
    await ends.hub.connect(pair[0])
    await ends.worker.connect(pair[1])
    yield ends
    ends.hub.close()
    ends.worker.close()
