"""The mailbox of a worker: it passes calls to its hub, which alone writes the store.

So a store that accepts one writer has one, and messages that several workers send at the same time
share the hub's group commits. The worker reads pages of a file itself, as long as the hub would
return the same.
"""

from collections.abc import Mapping, Sequence

from pokebridge.errors import MailboxError, UnavailableError
from pokebridge.mailbox.base import (
    PAGE_BYTES,
    Mailbox,
    MailboxStats,
    PageReader,
    RecipientStats,
    Wanted,
)
from pokebridge.model import MAX_VERSION, Ack, NewMessage, Page, Poke, Receipt
from pokebridge.workers import methods
from pokebridge.workers.calls import Answers, Calls, Method, P, R

__all__ = ["HubMailbox", "offer_mailbox"]


class HubMailbox:
    """The hub's mailbox, in a worker."""

    is_shared = True

    def __init__(self, calls: Calls, reader: PageReader | None = None) -> None:
        """``calls`` reach the hub. ``reader`` reads its store here."""
        self._calls = calls
        self._reader = reader
        self._closed = False

    async def append(self, message: NewMessage) -> Receipt:
        """As the port says, and so do all the others."""
        return await self._call(methods.APPEND, message)

    async def read(  # noqa: D102
        self,
        recipient: str,
        *,
        after: int,
        limit: int,
        max_bytes: int = PAGE_BYTES,
        unless_head: int | None = None,
    ) -> Page:
        wanted = Wanted(recipient, _cut(after), limit, max_bytes, unless_head)
        reader = self._reader
        if reader is None or self._closed:
            return await self._call(methods.READ, *wanted)
        page, look = await reader.read(wanted)
        if page is None:
            page = await self._call(methods.READ, *wanted)
            reader.trust(look)
        return page

    async def heads(self, recipients: Sequence[str]) -> Mapping[str, int]:  # noqa: D102
        return await self._call(methods.HEADS, recipients)

    async def see_device(self, recipient: str, device: str) -> None:  # noqa: D102
        await self._call(methods.SEE_DEVICE, recipient, device)

    async def ack(self, recipient: str, device: str, version: int) -> None:  # noqa: D102
        await self._call(methods.ACK, recipient, device, _cut(version))

    async def ack_all(self, acks: Sequence[Ack]) -> None:  # noqa: D102
        await self._call(
            methods.ACK_ALL,
            [each._replace(version=_cut(each.version)) for each in acks],
        )

    async def claim_outbox(self, *, older_than_s: float, limit: int) -> Sequence[Poke]:  # noqa: D102
        return await self._call(methods.CLAIM_OUTBOX, older_than_s, limit)

    async def confirm_outbox(self, pokes: Sequence[Poke]) -> None:  # noqa: D102
        await self._call(methods.CONFIRM_OUTBOX, pokes)

    async def purge(self, *, limit: int) -> int:  # noqa: D102
        return await self._call(methods.PURGE, limit)

    async def clear(self, recipient: str) -> int:  # noqa: D102
        return await self._call(methods.CLEAR, recipient)

    async def begin_generation(self) -> int:  # noqa: D102
        return await self._call(methods.BEGIN_GENERATION)

    async def stats(self) -> MailboxStats:  # noqa: D102
        return await self._call(methods.STATS)

    async def inspect(self, recipient: str) -> RecipientStats:  # noqa: D102
        return await self._call(methods.INSPECT, recipient)

    async def check(self) -> None:  # noqa: D102
        await self._call(methods.CHECK)

    async def close(self) -> None:
        """Refuse further calls. The hub's mailbox stays open."""
        self._closed = True
        if self._reader is not None:
            await self._reader.close()

    async def _call(self, method: Method[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        if self._closed:
            raise MailboxError("the mailbox is closed")
        try:
            return await self._calls.call(method, *arguments, **named)
        except MailboxError:
            raise
        except UnavailableError as error:
            raise MailboxError(f"the mailbox is {error}") from None


def _cut(version: int) -> int:
    """An equivalent version that has an encoding."""
    return max(0, min(version, MAX_VERSION))


def offer_mailbox(answers: Answers, mailbox: Mailbox) -> None:
    """Have ``answers`` do the calls of a worker's :class:`HubMailbox` on ``mailbox``."""

    async def read(
        recipient: str, after: int, limit: int, max_bytes: int, unless_head: int | None
    ) -> Page:
        return await mailbox.read(
            recipient, after=after, limit=limit, max_bytes=max_bytes, unless_head=unless_head
        )

    async def claim_outbox(older_than_s: float, limit: int) -> Sequence[Poke]:
        return await mailbox.claim_outbox(older_than_s=older_than_s, limit=limit)

    async def purge(limit: int) -> int:
        return await mailbox.purge(limit=limit)

    answers.offer(methods.APPEND, mailbox.append)
    answers.offer(methods.READ, read)
    answers.offer(methods.HEADS, mailbox.heads)
    answers.offer(methods.SEE_DEVICE, mailbox.see_device)
    answers.offer(methods.ACK, mailbox.ack)
    answers.offer(methods.ACK_ALL, mailbox.ack_all)
    answers.offer(methods.CLAIM_OUTBOX, claim_outbox)
    answers.offer(methods.CONFIRM_OUTBOX, mailbox.confirm_outbox)
    answers.offer(methods.PURGE, purge)
    answers.offer(methods.CLEAR, mailbox.clear)
    answers.offer(methods.BEGIN_GENERATION, mailbox.begin_generation)
    answers.offer(methods.STATS, mailbox.stats)
    answers.offer(methods.INSPECT, mailbox.inspect)
    answers.offer(methods.CHECK, mailbox.check)
