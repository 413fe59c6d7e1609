"""Revocations in the mailbox: every instance finds them there, also after a restart.

They are messages of one reserved recipient. So every mailbox keeps them, and deletes them when they
have run out.
"""

import asyncio
import time
import uuid
from collections.abc import Callable
from contextlib import suppress

import msgspec

from pokebridge.errors import MailboxError
from pokebridge.mailbox.base import Mailbox
from pokebridge.model import REVOCATIONS, NewMessage
from pokebridge.publisher import Publisher
from pokebridge.supervisor import keep_doing
from pokebridge.wire import Disconnect

READ_EVERY_S = 5.0
_PAGE = 500


class _Entry(msgspec.Struct):
    recipient: str
    at_ms: int
    until_ms: int


_decode = msgspec.json.Decoder(_Entry).decode


class Revocations:
    """Revokes tokens, and follows what other instances revoke.

    Args:
        mailbox: keeps the revocations; ``None``: only the instances that hear of one know it.
        publisher: tells the instances at once.
        on_read: called with each revocation that is found in the mailbox.
        keep_s: how long a revocation lasts: as long as the longest-lived token, or longer.
    """

    def __init__(
        self,
        mailbox: Mailbox | None,
        publisher: Publisher,
        on_read: Callable[[Disconnect], None],
        keep_s: float,
    ) -> None:
        self._mailbox = mailbox
        self._publisher = publisher
        self._on_read = on_read
        self._keep_s = keep_s
        # The version up to which the mailbox was read.
        self._cursor = 0
        self._reader: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read what is in force. Raises MailboxError when that is not possible."""
        await self._read()
        if self._mailbox is not None:
            self._reader = keep_doing("revocations", self._read_if_possible, READ_EVERY_S)

    async def close(self) -> None:
        """Stop following."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    async def revoke(self, recipient: str) -> None:
        """Close the recipient's sessions, and refuse its tokens that were issued before now.

        Raises:
            MailboxError: it could not be written down. Nothing has happened.
            TransportError: the instances could not be told. They read it within seconds.
        """
        now_s = time.time()
        entry = _Entry(recipient, int(now_s * 1000), int((now_s + self._keep_s) * 1000))
        if self._mailbox is not None:
            body, id_ = msgspec.json.encode(entry), uuid.uuid4().hex
            await self._mailbox.append(
                NewMessage(REVOCATIONS, REVOCATIONS, id_, body, ttl_s=self._keep_s)
            )
        self._on_read(_disconnect(entry))
        await self._publisher.disconnect(recipient, at_ms=entry.at_ms, until_ms=entry.until_ms)

    async def _read_if_possible(self) -> None:
        with suppress(MailboxError):  # the mailbox's own readiness check reports it
            await self._read()

    async def _read(self) -> None:
        more = self._mailbox is not None
        while more and self._mailbox is not None:
            page = await self._mailbox.read(REVOCATIONS, after=self._cursor, limit=_PAGE)
            for message in page.messages:
                if message.sender == REVOCATIONS:
                    self._on_read(_disconnect(_decode(message.body)))
            self._cursor, more = page.version, page.more


def _disconnect(entry: _Entry) -> Disconnect:
    return Disconnect(entry.recipient, entry.at_ms, entry.until_ms, is_repeated=True)
