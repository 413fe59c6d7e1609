"""The pusher: who does not pull is told of it once, whatever fails in between."""

import asyncio
import base64
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from pokebridge.errors import MailboxError
from pokebridge.fallback import push
from pokebridge.fallback.push import Pulls, Pusher, Retries
from pokebridge.fallback.webhook import Webhook
from pokebridge.mailbox.memory import MemoryMailbox
from pokebridge.mailbox.memory_pushes import MemoryPushes
from pokebridge.mailbox.pushes import PushTiming
from pokebridge.mailbox.sqlite import SqliteMailbox
from pokebridge.testing.mailbox_kit import BOB, EVE, message
from tests.fallback.receiver import Receiver, receiving
from tests.support import wait_until

KEY = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
AT_ONCE = PushTiming(grace_s=0, quiet_s=300)
DYING = Path(__file__).with_name("dying_pusher.py")
# A day of attempts within seconds.
QUICK = Retries(first_s=0.05, longest_s=0.2, attempts=1000)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A receiver that is up."""
    async with receiving() as receiver:
        yield receiver


def pushes_of(mailbox: MemoryMailbox) -> MemoryPushes:
    """The queue of ``mailbox``."""
    assert mailbox.pushes is not None
    return mailbox.pushes


@asynccontextmanager
async def pushing(
    mailbox: MemoryMailbox | SqliteMailbox,
    receiver: Receiver,
    *,
    retries: Retries = QUICK,
    timeout_s: float = 2.0,
) -> AsyncIterator[Pusher]:
    """A pusher that looks often."""
    assert mailbox.pushes is not None
    webhook = Webhook(receiver.url, KEY, timeout_s=timeout_s)
    pusher = Pusher(mailbox.pushes, webhook, retries=retries, look_every_s=0.01)
    await pusher.start()
    try:
        yield pusher
    finally:
        await pusher.close()


async def test_who_does_not_pull_is_told_of(receiver: Receiver) -> None:
    """One notification a recipient, with the newest version and nothing of the messages."""
    mailbox = MemoryMailbox(push_timing=AT_ONCE)
    for recipient in (BOB, BOB, EVE):
        await mailbox.append(message(recipient, body=b'"secret"'))
    async with pushing(mailbox, receiver) as pusher:
        await wait_until(lambda: pusher.results["sent"] == 2)
    assert sorted((request.json for request in receiver.requests), key=str) == [
        {"recipient": BOB, "version": 2},
        {"recipient": EVE, "version": 1},
    ]


async def test_a_pull_in_the_grace_cancels(receiver: Receiver) -> None:
    """A message that was pulled in time causes no push. Any other causes one."""
    mailbox = MemoryMailbox(push_timing=PushTiming(grace_s=0.1))
    pulls = Pulls(pushes_of(mailbox), tell_every_s=0.01)
    await pulls.start()
    await mailbox.append(message(BOB))
    await mailbox.append(message(EVE))
    pulls.note(BOB, 1)
    await pulls.close()  # tells the mailbox
    async with pushing(mailbox, receiver):
        await wait_until(lambda: receiver.requests)
    assert receiver.arrived == {EVE: 1}
    assert (await mailbox.stats()).pushes == 0


async def test_pulls_are_told_when_the_mailbox_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage of the mailbox forgets no pull; those after it count too. Close tells the rest."""
    mailbox = MemoryMailbox(push_timing=AT_ONCE)
    queue = pushes_of(mailbox)
    for n in range(30):
        await mailbox.append(message(f"r{n}"))
    tell = queue.pulled
    failures = 3

    async def pulled(versions: dict[str, int]) -> None:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise MailboxError("away")
        await tell(versions)

    monkeypatch.setattr(queue, "pulled", pulled)
    monkeypatch.setattr(push, "TELL_BATCH", 7)
    pulls = Pulls(queue, tell_every_s=0.01)
    await pulls.start()
    for n in range(20):
        pulls.note(f"r{n}", 1)
    await wait_until(lambda: queue.counts() == (10, 0))
    for n in range(20, 30):
        pulls.note(f"r{n}", 1)
    await pulls.close()
    assert queue.counts() == (0, 0)


async def test_the_pulls_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the mailbox is away the waiting pulls are bounded, and known ones still advance."""
    monkeypatch.setattr(push, "MAX_PULLED", 3)
    mailbox = MemoryMailbox(push_timing=AT_ONCE)
    pulls = Pulls(pushes_of(mailbox))
    for n in range(5):
        pulls.note(f"r{n}", 1)
    pulls.note("r0", 7)
    pulls.note("r0", 6)
    assert pulls._versions == {"r0": 7, "r1": 1, "r2": 1}


async def test_nothing_is_lost_or_doubled_while_the_receiver_is_down(receiver: Receiver) -> None:
    """A minute's outage at a sixtieth of its time: each is told of once, and soon after its end.

    Meanwhile there is one attempt at a time, so that few attempts are used up.
    """
    mailbox = MemoryMailbox(push_timing=AT_ONCE)
    recipients = [f"urn:user:{n}" for n in range(100)]
    await receiver.stop()
    async with pushing(mailbox, receiver) as pusher:
        for recipient in recipients:
            await mailbox.append(message(recipient))
        down_until_s = time.monotonic() + 1.0
        await wait_until(lambda: time.monotonic() > down_until_s)
        attempts = pusher.results["failed"]
        assert 2 <= attempts <= 200
        await receiver.start()
        await wait_until(lambda: len(receiver.arrived) == 100, timeout_s=5)
        await wait_until(lambda: pusher.results["sent"] == 100)
    assert set(receiver.arrived) == set(recipients)
    assert set(receiver.arrived.values()) == {1}
    assert pusher.results["dead"] == 0


async def test_an_outage_is_logged_once(receiver: Receiver) -> None:
    """One line when the receiver fails, one when it is back, however many pushes are owed."""
    mailbox = MemoryMailbox(push_timing=AT_ONCE)
    receiver.status = "503 Service Unavailable"
    with capture_logs() as logs:
        async with pushing(mailbox, receiver) as pusher:
            for n in range(5):
                await mailbox.append(message(f"r{n}"))
            await wait_until(lambda: pusher.results["failed"] > 8)
            receiver.status = "204 No Content"
            await wait_until(lambda: pusher.results["sent"] == 5)
    assert [(line["event"], line["part"]) for line in logs] == [
        ("part_unavailable", "push_webhook"),
        ("part_is_back", "push_webhook"),
    ]


async def test_a_retry_has_the_same_id(receiver: Receiver) -> None:
    """So a receiver that took it, and whose answer was lost, knows it again."""
    mailbox = MemoryMailbox(push_timing=AT_ONCE)
    receiver.status = "500 Oops"
    async with pushing(mailbox, receiver):
        await mailbox.append(message())
        await wait_until(lambda: len(receiver.requests) >= 3)
    assert len({request.id for request in receiver.requests}) == 1
    assert receiver.requests[0].id.startswith("push_")


async def test_it_is_given_up_in_the_end(receiver: Receiver) -> None:
    """After the last attempt the push is recorded, logged and counted, and not tried again."""
    mailbox = MemoryMailbox(push_timing=AT_ONCE)
    receiver.status = "410 Gone"
    retries = Retries(first_s=0.01, longest_s=0.02, attempts=3)
    with capture_logs() as logs:
        async with pushing(mailbox, receiver, retries=retries) as pusher:
            await mailbox.append(message())
            await wait_until(lambda: pusher.results["dead"] == 1)
    assert len(receiver.requests) == 3
    assert pushes_of(mailbox).counts() == (0, 1)
    [line] = [line for line in logs if line["event"] == "push_given_up"]
    assert (line["recipient"], line["attempts"]) == (BOB, 3)
    assert line["reason"] == "it answered 410 Gone"


def test_attempts_are_spread_over_a_day() -> None:
    """The usual pauses double up to a cap, half of each at random, and add up to about a day."""
    retries = Retries()
    least = [min(retries.pause_s(n) for _ in range(200)) for n in range(1, retries.attempts)]
    most = [max(retries.pause_s(n) for _ in range(200)) for n in range(1, retries.attempts)]
    assert least[0] == pytest.approx(2.5, rel=0.1)
    assert most[0] == pytest.approx(5, rel=0.1)
    assert all(one < other for one, other in pairwise(most[:12]))
    assert max(most) <= 4 * 3600
    assert (sum(least) + sum(most)) / 2 == pytest.approx(24 * 3600, rel=0.1)


async def test_a_slow_receiver_holds_up_no_other(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of concurrent requests is limited. Each that ends lets another start."""
    monkeypatch.setattr(push, "AT_ONCE", 4)
    mailbox = MemoryMailbox(push_timing=AT_ONCE)
    receiver.gate.clear()
    async with pushing(mailbox, receiver) as pusher:
        for n in range(12):
            await mailbox.append(message(f"r{n}"))
        await wait_until(lambda: len(receiver.requests) == 4)
        assert len(pusher._under_way) == 4
        receiver.gate.set()
        await wait_until(lambda: pusher.results["sent"] == 12)


async def test_of_two_pushers_one_sends_each(receiver: Receiver, tmp_path: Path) -> None:
    """Two pushers on one file send each push once."""
    async with AsyncExitStack() as stack:
        mailboxes = []
        for _ in range(2):
            mailbox = await SqliteMailbox.open(tmp_path / "m.db", push_timing=AT_ONCE)
            stack.push_async_callback(mailbox.close)
            mailboxes.append(mailbox)
        pushers = [
            await stack.enter_async_context(pushing(mailbox, receiver)) for mailbox in mailboxes
        ]
        calls = (mailboxes[0].append(message(f"r{n}")) for n in range(100))
        await asyncio.gather(*calls)
        await wait_until(lambda: sum(pusher.results["sent"] for pusher in pushers) == 100)
    assert set(receiver.arrived.values()) == {1}
    assert len(receiver.arrived) == 100


async def test_a_killed_process_leaves_its_push_to_another(
    receiver: Receiver, tmp_path: Path
) -> None:
    """SIGKILL between the claim and the POST: told of once, by another, when the lease is over."""
    path = tmp_path / "mailbox.db"
    mailbox = await SqliteMailbox.open(path, push_timing=AT_ONCE)
    await mailbox.append(message())
    dying = await asyncio.create_subprocess_exec(sys.executable, DYING, path)
    assert await dying.wait() == -9
    async with pushing(mailbox, receiver) as pusher:
        await wait_until(lambda: pusher.results["sent"] == 1)
    assert receiver.arrived == {BOB: 1}
    await mailbox.close()


async def test_closing_lets_attempts_end(receiver: Receiver) -> None:
    """A stop waits for the answer to a running request, so that it is not repeated."""
    mailbox = MemoryMailbox(push_timing=AT_ONCE)
    await mailbox.append(message())
    receiver.gate.clear()
    async with pushing(mailbox, receiver) as pusher:
        await wait_until(lambda: receiver.requests)
        closing = asyncio.create_task(pusher.close())
        await asyncio.sleep(0)
        receiver.gate.set()
        await closing
        assert pusher.results["sent"] == 1
    assert pushes_of(mailbox).counts() == (0, 0)


async def test_closing_waits_no_longer_than_it_may(receiver: Receiver) -> None:
    """A receiver that hangs is cut off; the push stays owed."""
    mailbox = MemoryMailbox(push_timing=AT_ONCE)
    await mailbox.append(message())
    receiver.gate.clear()
    async with pushing(mailbox, receiver) as pusher:
        await wait_until(lambda: receiver.requests)
        await pusher.close(deadline_s=0.05)
        assert pusher.results["sent"] == 0
    assert pushes_of(mailbox).counts() == (1, 0)


async def test_a_mailbox_that_is_away_doubles_nothing(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has arrived is told to the mailbox again and again, not to the receiver."""
    mailbox = MemoryMailbox(push_timing=AT_ONCE)
    queue = pushes_of(mailbox)
    tell: Callable[[object], Awaitable[None]] = queue.sent  # type: ignore[assignment] # wider
    failures = 4

    async def sent(owed: object) -> None:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise MailboxError("away")
        await tell(owed)

    monkeypatch.setattr(queue, "sent", sent)
    async with pushing(mailbox, receiver):
        await mailbox.append(message())
        await wait_until(lambda: queue.counts() == (0, 0) and failures < 0)
    assert receiver.arrived == {BOB: 1}
