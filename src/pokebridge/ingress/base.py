"""The port for ingress: a queue whose messages are committed to mailboxes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message from the queue; ``id`` is its own, the same at every delivery.

    ``handle`` is the adapter's: how it tells the engine what has become of the message.
    """

    id: str
    body: bytes
    handle: Any


class Source(Protocol):
    """A queue that delivers each message until it is acked, to one of those that read it.

    The engine may be gone and come back: a call that fails says so with
    :class:`~pokebridge.errors.TransportError`, and a later one connects anew. Nothing is dropped:
    what was neither acked nor buried is delivered again, perhaps to another process.
    """

    async def fetch(self, limit: int) -> Sequence[Delivery]:
        """Wait for messages, some seconds at most, and take at most ``limit``; perhaps none."""

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        """They are committed: deliver them no more."""

    async def retry(self, deliveries: Sequence[Delivery], *, delay_s: float) -> None:
        """They could not be committed now: deliver them again in ``delay_s`` seconds."""

    async def bury(self, delivery: Delivery, reason: str) -> None:
        """It can never be committed: keep it with the ``reason`` where dead letters go, and ack."""

    async def close(self) -> None:
        """Disconnect. May be called twice."""
