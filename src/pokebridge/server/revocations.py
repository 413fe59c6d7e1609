"""Disconnects and revocations of a recipient. Every instance finds revocations in the mailbox.

Revocations are messages of one reserved recipient. So every mailbox keeps them, and deletes them
when they have run out. A disconnect is kept there as well, for some minutes, if the instance that
was asked does not receive the others' signals: they can't ask it for disconnects that they missed
in a gap.
"""

import asyncio
import time
import uuid
from collections.abc import Callable
from contextlib import suppress

import msgspec
import structlog

from pokebridge.errors import MailboxError
from pokebridge.gateway.disconnects import KEPT_S
from pokebridge.mailbox.base import Mailbox
from pokebridge.model import REVOCATIONS, Message, NewMessage
from pokebridge.publisher import Publisher
from pokebridge.server.late_mailbox import LateMailbox
from pokebridge.supervisor import keep_doing
from pokebridge.wire import Disconnect

READ_EVERY_S = 5.0
_PAGE = 500


class _Entry(msgspec.Struct):
    recipient: str
    at_ms: int
    until_ms: int | None = None


_decode = msgspec.json.Decoder(_Entry).decode

log = structlog.get_logger(__name__)


class Revocations:
    """Ends sessions, revokes tokens, and follows what other instances revoke.

    Args:
        mailbox: keeps the revocations; ``None``: only instances that receive the signal know it.
        publisher: tells the instances at once.
        on_known: called with each disconnect that is asked for here, and with each revocation that
            is found in the mailbox.
        keep_s: how long a revocation lasts: as long as the longest-lived token, or longer.
        hears: whether this instance hears the others.
        late_mailbox: where revocations are read on an instance without a ``mailbox``, as soon as it
            is available.
    """

    def __init__(
        self,
        mailbox: Mailbox | None,
        publisher: Publisher,
        on_known: Callable[[Disconnect], None],
        keep_s: float,
        *,
        hears: bool,
        late_mailbox: LateMailbox | None = None,
    ) -> None:
        self._mailbox = mailbox
        self._read_from = mailbox or late_mailbox
        self._publisher = publisher
        self._on_known = on_known
        self._keep_s = keep_s
        self._hears = hears
        # The version up to which the mailbox was read.
        self._cursor = 0
        self._reader: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read what is in force. Raises MailboxError when that is not possible."""
        if self._mailbox is not None:
            await self._read(self._mailbox)
        if self._read_from is not None:
            self._reader = keep_doing("revocations", self._read_if_possible, READ_EVERY_S)

    async def close(self) -> None:
        """Stop following."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    async def disconnect(self, recipient: str) -> None:
        """Close the recipient's sessions, on all instances.

        This instance keeps it, although it may not be subscribed to that shard: an instance in a
        gap asks it later, and perhaps nobody else has heard.

        Raises:
            MailboxError: it could not be written down, and an instance in a gap may miss it.
            TransportError: the instances could not be told.
        """
        at_ms = int(time.time() * 1000)
        self._on_known(Disconnect(recipient, at_ms))
        try:
            if not self._hears:
                await self._write_down(_Entry(recipient, at_ms), KEPT_S)
        finally:
            await self._publisher.disconnect(recipient, at_ms=at_ms)

    async def revoke(self, recipient: str) -> None:
        """Close the recipient's sessions, and refuse its tokens that were issued before now.

        Raises:
            MailboxError: it could not be written down. Nothing has happened.
            TransportError: the instances could not be told. They read it within seconds.
        """
        now_s = time.time()
        entry = _Entry(recipient, int(now_s * 1000), int((now_s + self._keep_s) * 1000))
        await self._write_down(entry, self._keep_s)
        # Not repeated, so that it holds here even if another instance's clock is ahead.
        self._on_known(_disconnect(entry)._replace(is_repeated=False))
        await self._publisher.disconnect(recipient, at_ms=entry.at_ms, until_ms=entry.until_ms)

    async def _write_down(self, entry: _Entry, keep_s: float) -> None:
        if self._mailbox is not None:
            body, id_ = msgspec.json.encode(entry), uuid.uuid4().hex
            await self._mailbox.append(
                NewMessage(REVOCATIONS, REVOCATIONS, id_, body, ttl_s=keep_s)
            )

    async def _read_if_possible(self) -> None:
        with suppress(MailboxError):  # the mailbox's own readiness check reports it
            assert self._read_from is not None  # noqa: S101 - or nothing would be read
            await self._read(self._read_from)

    async def _read(self, mailbox: Mailbox | LateMailbox) -> None:
        more = True
        while more:
            page = await mailbox.read(REVOCATIONS, after=self._cursor, limit=_PAGE)
            for message in page.messages:
                if message.sender == REVOCATIONS and (entry := _read_entry(message)) is not None:
                    self._on_known(_disconnect(entry))
            self._cursor, more = page.version, page.more


def _read_entry(message: Message) -> _Entry | None:
    """The entry, or ``None`` for one that is damaged: those after it count as well."""
    try:
        return _decode(message.body)
    except msgspec.DecodeError as error:
        log.warning("revocation_invalid", version=message.version, reason=str(error))
        return None


def _disconnect(entry: _Entry) -> Disconnect:
    return Disconnect(entry.recipient, entry.at_ms, entry.until_ms, is_repeated=True)
