"""A process that is killed amid a push: it has claimed what is due, and posts it nowhere.

dying_pusher.py SQLITE_FILE
"""

import asyncio
import os
import signal
import sys

from pokebridge.fallback.push import Pusher
from pokebridge.mailbox.pushes import PushTiming
from pokebridge.mailbox.sqlite import SqliteMailbox


class Killer:
    """A receiver that is never heard of again."""

    timeout_s = 0.5

    async def post(self, webhook_id: str, body: bytes) -> None:
        """Be killed: the push is claimed by now."""
        os.kill(os.getpid(), signal.SIGKILL)

    async def close(self) -> None:
        """Nothing is open."""


async def push(path: str) -> None:
    """Send what is due, and die of it."""
    mailbox = await SqliteMailbox.open(path, push_timing=PushTiming())
    assert mailbox.pushes is not None
    await Pusher(mailbox.pushes, Killer()).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(push(sys.argv[1]))
