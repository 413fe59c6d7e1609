"""A process of its own that appends to a SQLite mailbox and prints the version of each receipt.

    appender.py FILE SENDER COUNT    (COUNT 0: until it is killed)

It ends without closing the mailbox, as a process may.
"""

import asyncio
import itertools
import sys

from pokebridge.mailbox.sqlite import SqliteMailbox
from pokebridge.testing.mailbox_kit import message

CONCURRENCY = 8


async def append_many(path: str, sender: str, count: int) -> None:
    """Append ``count`` messages, some at a time."""
    mailbox = await SqliteMailbox.open(path)
    numbers = iter(range(count)) if count else itertools.count()

    async def append_some() -> None:
        for number in numbers:
            new = message(sender=sender, id=f"{number}", has_idempotency_key=True)
            print((await mailbox.append(new)).version, flush=True)  # noqa: T201 - the answer

    await asyncio.gather(*(append_some() for _ in range(CONCURRENCY)))


if __name__ == "__main__":
    asyncio.run(append_many(sys.argv[1], sys.argv[2], int(sys.argv[3])))
