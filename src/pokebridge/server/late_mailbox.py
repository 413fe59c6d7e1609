"""The mailbox of a gateway without other roles, which serves even without the mailbox.

The gateway compares sessions with the newest versions, and follows the revocations. Other instances
store and serve messages.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from time import monotonic
from typing import Final

from pokebridge.errors import ConfigError, MailboxError
from pokebridge.mailbox.base import Mailbox
from pokebridge.model import Page
from pokebridge.supervisor import Part

# The pause after an attempt to open it that failed.
OPEN_AGAIN_S: Final = 5.0


class LateMailbox:
    """Opens a mailbox when it is first read, and again later if that fails.

    Args:
        open_: opens it. Raises ConfigError or MailboxError.
    """

    def __init__(self, open_: Callable[[], Awaitable[Mailbox]]) -> None:
        self._open = open_
        self._mailbox: Mailbox | None = None
        # Why the last attempt to open it failed, and when.
        self._failure = ""
        self._failed_s = float("-inf")
        self._opening = asyncio.Lock()
        # Logs when it becomes unavailable, and when it is back.
        self._part = Part("mailbox")

    @property
    def identity(self) -> str:
        """That of the mailbox, once it is open."""
        return getattr(self._mailbox, "identity", "")

    async def heads(self, recipients: Sequence[str]) -> Mapping[str, int]:
        """See :class:`~pokebridge.mailbox.base.Mailbox`."""
        with self._part.watched():
            return await (await self._opened()).heads(recipients)

    async def read(self, recipient: str, *, after: int, limit: int) -> Page:
        """See :class:`~pokebridge.mailbox.base.Mailbox`."""
        with self._part.watched():
            return await (await self._opened()).read(recipient, after=after, limit=limit)

    async def close(self) -> None:
        """Close it, if it was ever open."""
        if self._mailbox is not None:
            await self._mailbox.close()

    async def _opened(self) -> Mailbox:
        async with self._opening:
            if self._mailbox is None:
                if monotonic() - self._failed_s < OPEN_AGAIN_S:
                    raise MailboxError(self._failure)
                try:
                    self._mailbox = await self._open()
                except (ConfigError, MailboxError) as error:
                    self._failure, self._failed_s = str(error), monotonic()
                    raise MailboxError(self._failure) from error
            return self._mailbox
