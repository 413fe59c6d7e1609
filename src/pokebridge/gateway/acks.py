"""The acks that clients send over their sockets, merged on their way to the mailbox.

An ack covers all earlier ones of its device. So a device has at most one pending version, however
many acks it sends. The acks of many sessions are recorded by one call of the mailbox.

No ack is answered. If the process dies before an ack is recorded, its client sends it again in its
next session.
"""

from asyncio import CancelledError, Event
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from typing import Final

from pokebridge.errors import UnavailableError
from pokebridge.mailbox.base import ACKS_BATCH, in_parts
from pokebridge.model import Ack

RecordAcks = Callable[[Sequence[Ack]], Awaitable[None]]
"""Records 1 to ``ACKS_BATCH`` acks in the mailbox."""

# The most devices with a pending ack. A dropped ack is sent again in the client's next session.
MAX_PENDING: Final = 100_000
RECORD_EVERY_S: Final = 0.1
"""The mean pause between two calls of the mailbox. Acks are not urgent."""


class Acks:
    """The pending acks of one instance.

    - ``heard``: acks that came over a socket
    - ``recorded``: acks that the mailbox was told, after merging
    - ``on_recorded``: called with the recipient and the version of each ack in the mailbox
    - ``_record``: records acks
    - ``_pending``: the newest version by recipient and device
    - ``_wanted``: set while acks are pending
    """

    def __init__(self, record: RecordAcks) -> None:
        self.heard = 0
        self.recorded = 0
        self.on_recorded: Callable[[str, int], None] = lambda _recipient, _version: None
        self._record = record
        self._pending: dict[tuple[str, str], int] = {}
        self._wanted = Event()

    def add(self, recipient: str, device: str, version: int) -> None:
        """Record ``version`` soon, unless a newer one of the device is pending."""
        self.heard += 1
        pending, key = self._pending, (recipient, device)
        if version > pending.get(key, -1) and (key in pending or len(pending) < MAX_PENDING):
            pending[key] = version
            self._wanted.set()

    async def record(self) -> None:
        """Wait for an ack, and record all that are pending. One that is refused is dropped.

        Raises:
            UnavailableError: the mailbox is unavailable. The acks stay pending.
        """
        await self._wanted.wait()
        pending = self._pending
        while pending:
            batch = [Ack(*key, pending.pop(key)) for key in list(islice(pending, ACKS_BATCH))]
            try:
                refused = set(await in_parts(self._record, batch))
            except (UnavailableError, CancelledError):  # a broken driver cancels what it waits for
                for recipient, device, version in batch:
                    newer = pending.get((recipient, device), version)
                    pending[recipient, device] = max(version, newer)
                raise
            self.recorded += len(batch) - len(refused)
            for ack in batch:
                if ack not in refused:
                    self.on_recorded(ack.recipient, ack.version)
        self._wanted.clear()
