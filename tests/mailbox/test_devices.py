"""Devices are made known once a day, and in a storm of reconnects some at a time."""

import asyncio

import pytest

from pokebridge.errors import MailboxError
from pokebridge.mailbox import devices
from pokebridge.mailbox.devices import KnownDevices
from pokebridge.mailbox.memory import MemoryMailbox
from pokebridge.testing.mailbox_kit import BOB, ManualClock
from tests.support import wait_until


class WatchedMailbox(MemoryMailbox):
    """Counts what it is told, takes its time, and can fail."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []
        self.under_way = self.most_under_way = 0
        self.error: MailboxError | None = None

    async def see_device(self, recipient: str, device: str) -> None:
        """Count, then do or fail."""
        self.told.append(recipient)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await asyncio.sleep(0)
        self.under_way -= 1
        if self.error:
            raise self.error
        await super().see_device(recipient, device)


@pytest.fixture
def mailbox() -> WatchedMailbox:
    """An empty mailbox."""
    return WatchedMailbox()


async def test_a_device_is_told_of_once_a_day(mailbox: WatchedMailbox) -> None:
    """Whatever it does within a day costs the mailbox nothing; after it, one call."""
    clock = ManualClock()
    known = KnownDevices(mailbox, clock)
    for _ in range(3):
        await known.see(BOB, "phone")
        known.note(BOB, "phone")
        clock.now_s += 3600
    assert mailbox.told == [BOB]
    await known.see(BOB, "tablet")
    clock.now_s += 21 * 3600
    await known.see(BOB, "phone")
    assert len(mailbox.told) == 3


async def test_a_storm_is_told_some_at_a_time(mailbox: WatchedMailbox) -> None:
    """Thousands of notes at once delay no call, and are written in bounded steps."""
    known = KnownDevices(mailbox)
    for n in range(3000):
        known.note(f"r{n}", "phone")
        known.note(f"r{n}", "phone")
    assert mailbox.told == []
    await wait_until(lambda: len(mailbox.told) == 3000)
    assert mailbox.most_under_way <= devices.AT_ONCE
    assert sorted(mailbox.told) == sorted(f"r{n}" for n in range(3000))
    await known.close()


async def test_what_is_noted_is_bounded(
    mailbox: WatchedMailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has no room is left to the device's first pull, which waits until it is known."""
    monkeypatch.setattr(devices, "MAX_NOTED", 2)
    known = KnownDevices(mailbox)
    for n in range(5):
        known.note(f"r{n}", "phone")
    await wait_until(lambda: len(mailbox.told) == 2)
    await known.see("r4", "phone")
    assert mailbox.told == ["r0", "r1", "r4"]
    await known.close()


async def test_a_mailbox_that_fails_is_told_again(mailbox: WatchedMailbox) -> None:
    """A failed write affects no other call and is repeated. A waiting caller gets the error."""
    known = KnownDevices(mailbox)
    mailbox.error = MailboxError("gone")
    known.note(BOB, "phone")
    await wait_until(lambda: len(mailbox.told) == 1 and not mailbox.under_way)
    with pytest.raises(MailboxError):
        await known.see(BOB, "phone")
    mailbox.error = None
    await wait_until(lambda: known._telling is None)
    known.note(BOB, "phone")
    await wait_until(lambda: len(mailbox.told) == 3)
    await known.close()


async def test_closing_ends_the_telling(mailbox: WatchedMailbox) -> None:
    """No task is left behind."""
    known = KnownDevices(mailbox)
    known.note(BOB, "phone")
    await known.close()
    await known.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}
