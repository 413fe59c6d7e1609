"""The command mailbox."""

import asyncio
import json
import time
import uuid
from pathlib import Path

import pytest

from pokebridge.mailbox.base import Mailbox
from pokebridge.server.adapters import open_mailbox
from pokebridge.testing.mailbox_kit import BOB, EVE, fill, message, versions
from tests.cli.conftest import Run


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A mailbox with two messages of Bob's, one of them expired, and one of Eve's."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/mailbox.db"
    else:
        server = request.getfixturevalue("postgres_server")
        url = f"{server.url}?schema=test_{uuid.uuid4().hex}"

    async def fill_it() -> None:
        mailbox = await open_mailbox(url)
        await fill(mailbox, 1, BOB)
        await mailbox.append(message(BOB, body=b"12345", ttl_s=0))
        await fill(mailbox, 1, EVE)
        await mailbox.see_device(EVE, "phone")
        await mailbox.close()

    asyncio.run(fill_it())
    return url


def left(url: str) -> dict[str, list[int]]:
    """The versions that each has."""

    async def look(mailbox: Mailbox) -> dict[str, list[int]]:
        return {recipient: await versions(mailbox, recipient) for recipient in (BOB, EVE)}

    async def open_and_look() -> dict[str, list[int]]:
        mailbox = await open_mailbox(url)
        try:
            return await look(mailbox)
        finally:
            await mailbox.close()

    return asyncio.run(open_and_look())


def test_stats(run: Run, url: str) -> None:
    """The counts, as JSON for programs and in columns for people."""
    before_ms = time.time() * 1000 - 60_000
    counted = json.loads(run("mailbox", "stats", "--mailbox", url, "--json").out)
    for name in ("oldest_message_ms", "oldest_outbox_ms"):
        assert before_ms < counted.pop(name) <= time.time() * 1000
    assert counted == {
        "recipients": 2,
        "messages": 3,
        "bytes": 9,
        "devices": 1,
        "outbox": 2,
        "pushes": 0,
        "dead_pushes": 0,
    }
    result = run("mailbox", "stats", POKEBRIDGE_MAILBOX=url)
    assert result.status == 0
    assert [line.split()[0] for line in result.out.splitlines()[:5]] == [
        "recipients",
        "messages",
        "bytes",
        "devices",
        "outbox",
    ]


def test_purge_expired(run: Run, url: str) -> None:
    """What has expired goes, and nothing else; nothing is asked."""
    result = run("mailbox", "purge", "--expired", "--mailbox", url)
    assert (result.status, result.out) == (0, "1 purged\n")
    assert left(url) == {BOB: [1], EVE: [1]}
    assert json.loads(run("mailbox", "stats", "--mailbox", url, "--json").out)["messages"] == 2


def test_purge_a_recipient(run: Run, url: str) -> None:
    """With ``--yes`` all messages of one recipient are deleted without a question."""
    result = run("mailbox", "purge", BOB, "--yes", "--mailbox", url, "--json")
    assert (result.status, json.loads(result.out)) == (0, {"purged": 2})
    assert left(url) == {BOB: [], EVE: [1]}


@pytest.mark.parametrize(
    ("answer", "status", "kept"), [("y", 0, []), ("n", 130, [1]), ("", 130, [1])]
)
def test_a_purge_is_confirmed(
    run_process: Run, tmp_path: Path, answer: str, status: int, kept: list[int]
) -> None:
    """Without --yes it asks, and takes silence for a no."""
    url = f"sqlite:///{tmp_path}/mailbox.db"

    async def fill_it() -> None:
        mailbox = await open_mailbox(url)
        await fill(mailbox, 1, BOB)
        await mailbox.close()

    asyncio.run(fill_it())
    result = run_process("mailbox", "purge", BOB, "--mailbox", url, stdin=answer)
    assert result.status == status
    assert f"Delete all messages of {BOB}?" in result.err
    assert left(url)[BOB] == kept


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("stats", "--mailbox", "memory://"), "name the mailbox that the instances share"),
        (("stats", "--mailbox", "sqlite:///no/such.db"), "there is no file no/such.db"),
        (("stats", "--mailbox", "sqlite:///no/such.db"), "sqlite:///var/pokebridge.db after `make"),
        (("stats", "--mailbox", "postgresql://127.0.0.1:port/x"), "a port must be"),
        (("purge", "--mailbox", "memory://"), "either a RECIPIENT or --expired"),
        (("purge", BOB, "--expired"), "either a RECIPIENT or --expired"),
        (("purge", "Jürgen Müller", "--yes"), "a recipient is"),
    ],
)
def test_what_is_asked_for_wrongly(run: Run, arguments: tuple[str, ...], said: str) -> None:
    """One line says what is wrong, and no file is created."""
    result = run("mailbox", *arguments)
    assert result.status == 2
    assert result.err.startswith("pokebridge: ")
    assert result.err.count("\n") == 1
    assert said in result.err


def test_restored(run: Run, url: str) -> None:
    """The next version is above the base that it names, and the messages stay."""
    base = json.loads(run("mailbox", "restored", "--mailbox", url, "--json").out)["base"]

    async def send() -> int:
        mailbox = await open_mailbox(url)
        receipt = await mailbox.append(message(EVE))
        await mailbox.close()
        return receipt.version

    assert asyncio.run(send()) == base + 1
    assert left(url) == {BOB: [1], EVE: [1, base + 1]}
    result = run("mailbox", "restored", "--mailbox", url)
    assert (result.status, result.out.startswith("all new versions are above ")) == (0, True)
