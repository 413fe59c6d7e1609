"""Whatever is done to them, the mailboxes in memory, SQLite and PostgreSQL answer the same."""

import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pokebridge.errors import MailboxFullError
from pokebridge.mailbox.base import RECEIPT_KEPT_MS, Limits, Mailbox
from pokebridge.mailbox.memory import MemoryMailbox
from pokebridge.mailbox.postgres import PostgresMailbox
from pokebridge.mailbox.sqlite import SqliteMailbox
from pokebridge.model import Ack, NewMessage, Poke
from pokebridge.testing.mailbox_kit import ManualClock
from tests.support import Daemon

Operation = Callable[[Mailbox], Awaitable[Any]]

recipients = st.sampled_from(["urn:user:bob", "r" * 256])
devices = st.sampled_from(["phone", "tablet"])
numbers = st.integers(-1, 9)
limits = st.sampled_from(
    [Limits(max_messages=6, max_bytes=80, max_share=share) for share in (0.5, 1.0)]
)


def append(new: NewMessage) -> Operation:
    """Append ``new``."""
    return lambda mailbox: mailbox.append(new)


def read(recipient: str, after: int, limit: int, max_bytes: int, known: int | None) -> Operation:
    """Read a page."""
    return lambda mailbox: mailbox.read(
        recipient, after=after, limit=limit, max_bytes=max_bytes, unless_head=known
    )


def heads(recipient: str) -> Operation:
    """Ask for the head."""
    return lambda mailbox: mailbox.heads([recipient])


def ack(recipient: str, device: str, version: int) -> Operation:
    """Ack."""
    return lambda mailbox: mailbox.ack(recipient, device, version)


def ack_all(acks: list[Ack]) -> Operation:
    """Ack for several devices at once."""
    return lambda mailbox: mailbox.ack_all(acks)


def see_device(recipient: str, device: str) -> Operation:
    """Make a device known."""
    return lambda mailbox: mailbox.see_device(recipient, device)


def confirm_outbox(pokes: list[Poke]) -> Operation:
    """Confirm pokes."""
    return lambda mailbox: mailbox.confirm_outbox(pokes)


def unpoked(older_than_s: int) -> Operation:
    """All outbox entries of that age; their order is not promised."""

    async def ask(mailbox: Mailbox) -> set[Poke]:
        return set(await mailbox.claim_outbox(older_than_s=older_than_s, limit=100))

    return ask


def clear(recipient: str) -> Operation:
    """Delete what a recipient has."""
    return lambda mailbox: mailbox.clear(recipient)


async def stats(mailbox: Mailbox) -> Any:
    """Count."""
    return await mailbox.stats()


async def purge(mailbox: Mailbox) -> int:
    """Purge all: which part of it a smaller limit leaves is not promised."""
    return await mailbox.purge(limit=1000)


messages = st.builds(
    NewMessage,
    recipient=recipients,
    sender=st.sampled_from(["urn:user:alice", "urn:user:eve"]),
    id=st.sampled_from(["a", "b", "ü🦆"]),
    body=st.binary(max_size=20),
    ttl_s=st.sampled_from([None, None, 0, 1, 5]),
    has_idempotency_key=st.booleans(),
)
pokes = st.builds(Poke, recipients, st.none() | numbers)
# The same order everywhere, because an ack deletes depending on the known devices.
acks = st.lists(
    st.builds(Ack, recipients, devices, numbers),
    min_size=1,
    unique_by=lambda ack: (ack.recipient, ack.device),
).map(sorted)
operations: st.SearchStrategy[Operation | float] = st.one_of(
    st.builds(append, messages),
    st.builds(append, messages),
    st.builds(
        read, recipients, numbers, st.integers(1, 4), st.integers(0, 60), st.none() | numbers
    ),
    st.builds(ack, recipients, devices, numbers),
    st.builds(ack_all, acks),
    st.builds(see_device, recipients, devices),
    st.builds(heads, recipients),
    st.builds(clear, recipients),
    st.just(stats),
    st.builds(confirm_outbox, st.lists(pokes, max_size=3)),
    st.builds(unpoked, st.integers(0, 3)),
    st.just(purge),
    st.sampled_from([0.5, 1.0, 3.0, -2.0, RECEIPT_KEPT_MS / 1000, 80 * 86_400.0]),  # time passes
)


@settings(max_examples=25, deadline=None)
@given(limits=limits, steps=st.lists(operations, min_size=10, max_size=40))
async def test_all_mailboxes_answer_the_same(
    postgres_server: Daemon, limits: Limits, steps: list[Operation | float]
) -> None:
    """A random history gives the same answer at each step, whichever keeps it."""
    clock = ManualClock()
    with TemporaryDirectory() as folder:
        url = f"{postgres_server.url}?schema=test_{uuid.uuid4().hex}"
        mailboxes: list[Mailbox] = [
            MemoryMailbox(clock, limits),
            await SqliteMailbox.open(Path(folder) / "mailbox.db", clock, limits),
            await PostgresMailbox.open(url, clock, limits),
        ]
        try:
            for step in steps:
                if isinstance(step, float):
                    clock.now_s += step
                    continue
                first, *others = [await answer(mailbox, step) for mailbox in mailboxes]
                assert others == [first, first]
        finally:
            for mailbox in mailboxes:
                await mailbox.close()


async def answer(mailbox: Mailbox, step: Operation) -> object:
    """What comes of ``step``, a refusal included."""
    try:
        return await step(mailbox)
    except MailboxFullError as error:
        return str(error)
