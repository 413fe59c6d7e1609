"""Messages whose poke is lost, as when an engine took it and dropped it."""

from pathlib import Path

from pokebridge.mailbox.sqlite import SqliteMailbox
from pokebridge.model import NewMessage, Poke


async def commit_unpoked(file: Path, message: NewMessage) -> int:
    """Commit ``message`` in a mailbox that others use, as one whose poke was published.

    Returns its version.
    """
    mailbox = await SqliteMailbox.open(file)
    receipt = await mailbox.append(message)
    await mailbox.confirm_outbox([Poke(message.recipient, receipt.version)])
    await mailbox.close()
    return receipt.version
