"""The inbox of a worker: it passes calls to its hub, which alone writes the store.

So a store that accepts one writer has one. The worker reads pages of a file itself, as long as the
hub would return the same.
"""

from pokebridge.errors import MailboxError, UnavailableError
from pokebridge.mailbox.base import PAGE_BYTES, Inbox, PageReader, Wanted
from pokebridge.model import MAX_VERSION, Page
from pokebridge.workers import methods
from pokebridge.workers.calls import Answers, Calls, Method, P, R

__all__ = ["HubInbox", "offer_inbox"]


class HubInbox:
    """The hub's mailbox, in a worker."""

    def __init__(self, calls: Calls, reader: PageReader | None = None) -> None:
        """``calls`` reach the hub. ``reader`` reads its store here."""
        self._calls = calls
        self._reader = reader
        self._closed = False

    async def read(
        self,
        recipient: str,
        *,
        after: int,
        limit: int,
        max_bytes: int = PAGE_BYTES,
        unless_head: int | None = None,
    ) -> Page:
        """As the port says, and so do the others."""
        wanted = Wanted(recipient, _cut(after), limit, max_bytes, unless_head)
        reader = self._reader
        if reader is None or self._closed:
            return await self._call(methods.READ, *wanted)
        page, look = await reader.read(wanted)
        if page is None:
            page = await self._call(methods.READ, *wanted)
            reader.trust(look)
        return page

    async def see_device(self, recipient: str, device: str) -> None:  # noqa: D102
        await self._call(methods.SEE_DEVICE, recipient, device)

    async def ack(self, recipient: str, device: str, version: int) -> None:  # noqa: D102
        await self._call(methods.ACK, recipient, device, _cut(version))

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


def offer_inbox(answers: Answers, mailbox: Inbox) -> None:
    """Have ``answers`` do the calls of a worker's :class:`HubInbox` on ``mailbox``."""

    async def read(
        recipient: str, after: int, limit: int, max_bytes: int, unless_head: int | None
    ) -> Page:
        return await mailbox.read(
            recipient, after=after, limit=limit, max_bytes=max_bytes, unless_head=unless_head
        )

    answers.offer(methods.READ, read)
    answers.offer(methods.SEE_DEVICE, mailbox.see_device)
    answers.offer(methods.ACK, mailbox.ack)
