"""Senders, instances, readers and PostgreSQL are killed in turn; no message is lost or doubled.

A longer run: ``TESTED_KILLS=500 .venv/bin/pytest tests/mailbox/test_chaos.py``.
"""

import asyncio
import itertools
import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

import pytest

from pokebridge.mailbox.postgres import PostgresMailbox
from pokebridge.testing.mailbox_kit import head
from tests.mailbox import crowd
from tests.support import Daemon, Serve, wait_until

KILLS = int(os.environ.get("TESTED_KILLS", "8"))
SENDERS = 8
DEVICES = ("phone", "tablet")
# Messages of each recipient that must be accepted before the first kill.
ACCEPTED_AT_LEAST = 20
CATCH_UP_S = 60.0

Log = dict[str, list[tuple[int, str]]]


class Member:
    """A process of the crowd, to be killed and started again."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, crowd.__file__, *self._arguments])

    def kill(self) -> None:
        """SIGKILL it."""
        self._process.kill()
        self._process.wait()

    def start(self) -> None:
        """Start it again, to go on with the same log."""
        self._process = self._start()


@contextmanager
def killed_at_the_end(members: list[Member]) -> Iterator[list[Member]]:
    """The members, whatever becomes of the test."""
    try:
        yield members
    finally:
        for member in members:
            member.kill()


def logged(*paths: Path) -> Log:
    """What the logs say, by recipient."""
    lines: Log = defaultdict(list)
    for path in paths:
        for recipient, version, message_id in crowd.parse(path):
            lines[recipient].append((version, message_id))
    return lines


class Victim(Protocol):
    """What can be killed and started again."""

    def kill(self) -> None:
        """SIGKILL it."""

    def start(self) -> None:
        """Start it again."""


async def kill_in_turn(kinds: Sequence[Sequence[Victim]], kills: int) -> None:
    """Kill one of each kind, one after the other, and start it again, ``kills`` times in all."""
    for kind in itertools.islice(itertools.cycle(kinds), kills):
        victim = random.choice(kind)
        await asyncio.to_thread(victim.kill)
        await asyncio.sleep(random.uniform(0, 0.3))  # how long it is away, not a wait for something
        await asyncio.to_thread(victim.start)


@pytest.mark.timeout(KILLS * 10 + 110)
async def test_every_accepted_message_arrives_once_and_in_order(
    own_postgres_server: Daemon,
    nats_server: Daemon,
    serve: Serve,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Each device reads, by cursor, every version once and in order, and all that was answered 202.

    Two instances, eight sender processes and two readers, on a real PostgreSQL, each kind killed
    with SIGKILL again and again.
    """
    database = own_postgres_server
    mailbox = await PostgresMailbox.open(database.url)
    for recipient, device in itertools.product(crowd.RECIPIENTS, DEVICES):
        await mailbox.see_device(recipient, device)  # the first reader would delete for both
    start = partial(serve, mailbox=database.url, transport=nats_server.url, drain_s=0)
    instances = await asyncio.gather(*(asyncio.to_thread(start) for _ in range(2)))
    urls = [instance.url for instance in instances]
    tokens = {recipient: instances[0].token(recipient) for recipient in crowd.RECIPIENTS}
    sent = [tmp_path / f"sent-{n}" for n in range(SENDERS)]
    read = {device: tmp_path / f"read-{device}" for device in DEVICES}
    with ExitStack() as crowds:
        senders = [
            Member("send", str(path), instances[0].token(f"urn:sender:{n}", "send"), *urls)
            for n, path in enumerate(sent)
        ]
        crowds.enter_context(killed_at_the_end(senders))
        readers = [
            Member("read", str(path), device, json.dumps(tokens), *urls)
            for device, path in read.items()
        ]
        crowds.enter_context(killed_at_the_end(readers))

        def enough_is_accepted() -> bool:
            accepted = logged(*sent)
            return all(len(accepted[name]) > ACCEPTED_AT_LEAST for name in crowd.RECIPIENTS)

        await wait_until(enough_is_accepted, CATCH_UP_S, "the senders are at work")
        await kill_in_turn([senders, instances, readers, [database]], KILLS)
        for sender in senders:
            sender.kill()
        await _all_read(mailbox, read)
        await wait_until(lambda: _nothing_owed(mailbox), what="every poke is published")
        await mailbox.close()
    accepted = logged(*sent)
    record_property("accepted", sum(map(len, accepted.values())))
    for device, path in read.items():
        for recipient, lines in logged(path).items():
            assert [version for version, _ in lines] == list(range(1, len(lines) + 1)), device
            assert len({message_id for _, message_id in lines}) == len(lines), "one is doubled"
            assert set(accepted[recipient]) <= set(lines), "one that was accepted is missing"


async def _all_read(mailbox: PostgresMailbox, read: dict[str, Path]) -> None:
    """Wait until each device has read up to the head, which moves no more."""

    async def caught_up() -> bool:
        heads = {recipient: await head(mailbox, recipient) for recipient in crowd.RECIPIENTS}
        logs = [logged(path) for path in read.values()]
        return all(
            log[recipient] and log[recipient][-1][0] == head
            for log in logs
            for recipient, head in heads.items()
        )

    await wait_until(caught_up, CATCH_UP_S, "all is read")


async def _nothing_owed(mailbox: PostgresMailbox) -> bool:
    return (await mailbox.stats()).outbox == 0
