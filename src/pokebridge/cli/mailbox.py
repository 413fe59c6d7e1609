"""``pokebridge mailbox``: show what the mailbox holds, delete from it, and note a restore."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import click

from pokebridge.cli.options import config_option, json_option
from pokebridge.errors import ConfigError
from pokebridge.mailbox.base import Mailbox, MailboxStats
from pokebridge.model import check_recipient
from pokebridge.server.adapters import mailbox_class
from pokebridge.server.from_settings import open_mailbox
from pokebridge.settings import load_settings

T = TypeVar("T")

PURGE_BATCH = 1000

_mailbox_option = click.option("--mailbox", "url", metavar="URL", help="As for serve.")


@click.group(short_help="Show what the mailbox holds, and delete from it.")
def mailbox() -> None:
    """Show what the instances' mailbox holds, and delete from it.

    The instances can keep running. They delete expired messages themselves, every 20 seconds.
    """


@mailbox.command(
    epilog="Example: pokebridge mailbox stats --mailbox postgresql://me@db/poke --json",
    short_help="Count messages, devices and owed pokes.",
)
@_mailbox_option
@config_option
@json_option
def stats(url: str | None, config: Path | None, *, as_json: bool) -> None:
    """Count recipients, messages, bytes, devices, and the pokes and pushes that are owed.

    If pokes are owed for more than a few seconds, the transport is unavailable. The command reads
    the whole store, which takes a while if it is large.
    """
    counted = _with_mailbox(url, config, lambda box: box.stats())
    if as_json:
        click.echo(json.dumps(counted._asdict()))
    else:
        click.echo("\n".join(f"{name:<18}{value}" for name, value in _lines(counted).items()))


@mailbox.command(
    epilog="""\b
    Examples:
      pokebridge mailbox purge --expired
      pokebridge mailbox purge urn:user:bob --yes""",
    short_help="Delete messages.",
)
@click.argument("recipient", required=False)
@click.option("--expired", is_flag=True, help="Delete the expired messages of all recipients.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@_mailbox_option
@config_option
@json_option
def purge(
    recipient: str | None,
    url: str | None,
    config: Path | None,
    *,
    expired: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Delete every message of RECIPIENT and forget its devices, or delete expired messages.

    A recipient's versions continue where they were, so the cursors of its clients stay valid.
    """
    if (recipient is None) == (not expired):
        raise click.UsageError("name either a RECIPIENT or --expired")
    if recipient is None:
        purged = _with_mailbox(url, config, _purge_expired)
    else:
        name = check_recipient(recipient)
        if not yes:
            click.confirm(f"Delete all messages of {name}?", abort=True, err=True)
        purged = _with_mailbox(url, config, lambda box: box.clear(name))
    click.echo(json.dumps({"purged": purged}) if as_json else f"{purged} purged")


@mailbox.command(
    epilog="Example: pokebridge mailbox restored --mailbox postgresql://me@db/poke",
    short_help="Begin new versions after a restore.",
)
@_mailbox_option
@config_option
@json_option
def restored(url: str | None, config: Path | None, *, as_json: bool) -> None:
    """Begin a new generation of versions after the mailbox was restored from a backup.

    Clients remember the highest version that they have. A restored mailbox would give the same
    versions to new messages, and clients would skip those. So the next versions are far above all
    that were given out. Restores that are noticed without this command are listed in
    docs/backup.md. Running it once too often does no harm.
    """
    base = _with_mailbox(url, config, lambda box: box.begin_generation())
    click.echo(json.dumps({"base": base}) if as_json else f"all new versions are above {base}")


async def _purge_expired(box: Mailbox) -> int:
    purged = 0
    while step := await box.purge(limit=PURGE_BATCH):
        purged += step
    return purged


def _with_mailbox(
    url: str | None, config: Path | None, work: Callable[[Mailbox], Awaitable[T]]
) -> T:
    # It needs no secret, and with dev none is required.
    settings = load_settings(config, {"dev": True, "mailbox": url})
    if not mailbox_class(settings.mailbox).is_shared:
        raise ConfigError(
            "mailbox: memory:// is inside its instance; name the mailbox that the instances share"
        )

    async def run() -> T:
        box = await open_mailbox(settings, must_exist=True)
        try:
            return await work(box)
        finally:
            await box.close()

    return asyncio.run(run())


def _lines(counted: MailboxStats) -> dict[str, str]:
    return {
        "recipients": f"{counted.recipients:,}",
        "messages": f"{counted.messages:,}",
        "bytes": f"{counted.bytes:,}",
        "devices": f"{counted.devices:,}",
        "outbox": f"{counted.outbox:,}",
        "oldest message": _time(counted.oldest_message_ms),
        "oldest in outbox": _time(counted.oldest_outbox_ms),
        "pushes owed": f"{counted.pushes:,}",
        "pushes given up": f"{counted.dead_pushes:,}",
    }


def _time(unix_ms: int | None) -> str:
    if unix_ms is None:
        return "-"
    return datetime.fromtimestamp(unix_ms / 1000, UTC).isoformat(" ", "seconds")
