"""The port for ingress: a queue whose messages are committed to the mailbox."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

DEAD_BODY_BYTES: Final = 512 * 1024
"""What a dead letter keeps of a body. It is well below what any engine accepts by default, headers
included, and a valid message is smaller."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message from the queue. Its ``id`` is unique, and the same at every delivery.

    ``handle`` belongs to the adapter, which acks the message by it.
    """

    id: str
    body: bytes
    handle: Any


class Source(Protocol):
    """A queue that several processes read.

    Guarantees:

    - **At least once**: a message that was neither acked nor buried is delivered again, perhaps to
      another process. Each delivery goes to one process.
    - **Reconnects**: when the engine is unavailable, a call raises
      :class:`~pokebridge.errors.TransportError`, and a later call connects again.
    """

    async def fetch(self, limit: int) -> Sequence[Delivery]:
        """Wait for messages for a bounded time and take at most ``limit``, perhaps none."""

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Ack committed messages, so that they are not delivered again."""

    async def retry(self, deliveries: Sequence[Delivery], *, delay_s: float) -> None:
        """Return messages to the queue, to be delivered again in ``delay_s`` seconds."""

    async def bury(self, delivery: Delivery, reason: str) -> None:
        """Move a message that can't be committed to the dead letters, with ``reason``, and ack."""

    async def close(self) -> None:
        """Disconnect. May be called twice."""
