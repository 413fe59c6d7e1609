"""A process whose Processor is killed between the commit of a message and its poke.

dying_processor.py MAILBOX_URL
"""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence

from pokebridge.model import Poke
from pokebridge.processor import Processor
from pokebridge.server.adapters import open_mailbox
from pokebridge.testing.mailbox_kit import message


class Killer:
    """A publisher that is never heard of again."""

    async def publish_now(self, pokes: Sequence[Poke]) -> None:
        """Be killed: what is to be published is committed by now."""
        os.kill(os.getpid(), signal.SIGKILL)


async def send_one(url: str) -> None:
    """Send a message, and die of it."""
    async with Processor(await open_mailbox(url), Killer()) as processor:
        await processor.send(message())
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(send_one(sys.argv[1]))
