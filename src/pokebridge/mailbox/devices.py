"""Makes devices known to a mailbox, without a call for those it was told before."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from pokebridge.errors import InputError, MailboxError
from pokebridge.mailbox.base import SEEN_EVERY_MS, Inbox
from pokebridge.supervisor import cancel, supervise

KNOWN: Final = 50_000
# Noted devices that wait. A device that does not fit is made known by its first pull.
MAX_NOTED: Final = 10_000
AT_ONCE: Final = 256


class KnownDevices:
    """Remembers the devices that this process made known within a day, KNOWN at most.

    A reconnect of such a device is a look-up in a dictionary. After a restart nothing is remembered
    and all devices reconnect. Then ``note`` delays no session: it passes AT_ONCE devices at a time
    to the mailbox, which looks them up together and writes only the unknown ones. ``clock`` gives
    seconds.
    """

    def __init__(self, mailbox: Inbox, clock: Callable[[], float] = time.monotonic) -> None:
        self._mailbox = mailbox
        self._clock = clock
        self._told_s: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._noted: dict[tuple[str, str], None] = {}
        self._telling: asyncio.Task[None] | None = None

    async def see(self, recipient: str, device: str) -> None:
        """Return when ``device`` is known: from then on messages are kept until it acks them.

        Raises :class:`~pokebridge.errors.MailboxError` when the mailbox is unavailable.
        """
        key = (recipient, device)
        if not self._is_known(key):
            await self._mailbox.see_device(recipient, device)
            self._remember(key)

    def note(self, recipient: str, device: str) -> None:
        """Make ``device`` known in the background. Never waits and never fails."""
        key = (recipient, device)
        if not self._is_known(key) and len(self._noted) < MAX_NOTED:
            self._noted[key] = None
            if self._telling is None:
                self._telling = supervise("known_devices", self._tell)

    async def close(self) -> None:
        """Stop, and drop the noted devices that the mailbox was not told yet."""
        await cancel(self._telling)

    def _is_known(self, key: tuple[str, str]) -> bool:
        told_s = self._told_s.get(key)
        if told_s is None or self._clock() - told_s >= SEEN_EVERY_MS / 1000:
            return False
        self._told_s.move_to_end(key)
        return True

    def _remember(self, key: tuple[str, str]) -> None:
        self._told_s[key] = self._clock()
        self._told_s.move_to_end(key)
        if len(self._told_s) > KNOWN:
            self._told_s.popitem(last=False)

    async def _tell(self) -> None:
        while self._noted:
            some = [key for key, _ in zip(self._noted, range(AT_ONCE), strict=False)]
            try:
                async with asyncio.TaskGroup() as group:
                    for key in some:
                        group.create_task(self._try_to_see(key))
            finally:  # those after them must not wait for one that fails
                for key in some:
                    del self._noted[key]
        self._telling = None

    async def _try_to_see(self, key: tuple[str, str]) -> None:
        with suppress(InputError, MailboxError):  # the device's next pull or session tries again
            await self.see(*key)
