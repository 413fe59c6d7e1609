"""Helpers for tests of a mailbox: a clock, messages, and short ways to inspect it."""

from pokebridge.mailbox.base import Mailbox
from pokebridge.model import NewMessage

BOB = "urn:user:bob"
EVE = "urn:user:eve"
ALICE = "urn:user:alice"


class ManualClock:
    """A clock that stands still until a test sets it."""

    def __init__(self, now_s: float = 1_800_000_000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        """The Unix time in seconds."""
        return self.now_s


def message(
    recipient: str = BOB,
    *,
    id: str = "m",  # noqa: A002 - the field's name
    sender: str = ALICE,
    body: bytes = b"{}",
    ttl_s: float | None = None,
    has_idempotency_key: bool = False,
    is_ephemeral: bool = False,
) -> NewMessage:
    """A message with defaults for everything that a test does not name."""
    return NewMessage(recipient, sender, id, body, ttl_s, has_idempotency_key, is_ephemeral)


async def head(mailbox: Mailbox, recipient: str) -> int:
    """The newest version ever given to ``recipient``; 0 when there is none."""
    return (await mailbox.heads([recipient]))[recipient]


async def versions(mailbox: Mailbox, recipient: str = BOB, *, after: int = 0) -> list[int]:
    """The versions of all readable messages, read page by page."""
    found: list[int] = []
    more = True
    while more:
        page = await mailbox.read(recipient, after=after, limit=500)
        found += [kept.version for kept in page.messages]
        after, more = page.version, page.more
    return found


async def kept(mailbox: Mailbox) -> tuple[int, int]:
    """The number of messages, with expired ones, and the bytes of their bodies."""
    stats = await mailbox.stats()
    return stats.messages, stats.bytes


async def fill(mailbox: Mailbox, count: int, recipient: str = BOB) -> None:
    """Append ``count`` messages."""
    for _ in range(count):
        await mailbox.append(message(recipient))


async def unpoked(mailbox: Mailbox, older_than_s: float = 0) -> dict[str, int | None]:
    """The outbox entries of at least that age: newest version by recipient."""
    pokes = await mailbox.claim_outbox(older_than_s=older_than_s, limit=1000)
    by_recipient = {poke.recipient: poke.version for poke in pokes}
    assert len(by_recipient) == len(pokes), "one entry a recipient"
    return by_recipient
