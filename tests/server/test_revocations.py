"""What instances read about revocations in the mailbox."""

from structlog.testing import capture_logs

from pokebridge.mailbox.memory import MemoryMailbox
from pokebridge.model import REVOCATIONS
from pokebridge.publisher import Publisher
from pokebridge.server.revocations import Revocations
from pokebridge.testing.mailbox_kit import BOB, message
from pokebridge.transport.memory import MemoryTransport


async def test_a_damaged_entry_harms_only_itself() -> None:
    """The instance starts, logs the entry, and applies the revocations after it."""
    mailbox = MemoryMailbox()
    for body in (b"no JSON", b'{"recipient":7}', b'{"recipient":"urn:user:bob","at_ms":5}'):
        await mailbox.append(message(REVOCATIONS, sender=REVOCATIONS, body=body))
    known: list[tuple[str, int | None]] = []
    async with Publisher(MemoryTransport()) as publisher:
        revocations = Revocations(
            mailbox,
            publisher,
            lambda each: known.append((each.recipient, each.at_ms)),
            60,
            hears=True,
        )
        with capture_logs() as logs:
            await revocations.start()
        await revocations.close()
    assert known == [(BOB, 5)]
    assert [line["event"] for line in logs] == ["revocation_invalid"] * 2
