"""``pokebridge janitor``: delete the subscriptions of dead instances."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pokebridge.cli.options import config_option, json_option
from pokebridge.server.adapters import open_sweeper
from pokebridge.settings import Settings, load_settings
from pokebridge.telemetry import configure_logging

if TYPE_CHECKING:  # its module imports the driver, which may be missing
    from pokebridge.transport.google_pubsub_sweep import Orphan, SweepReport


@click.command(
    epilog="Example: pokebridge janitor --transport pubsub://my-project --dry-run",
    short_help="Delete subscriptions of dead instances.",
)
@click.option("--transport", metavar="URL", help="As for serve.")
@click.option(
    "--cluster", metavar="NAME", help="Cluster whose subscriptions are examined, as for serve."
)
@click.option("--dry-run", is_flag=True, help="Delete nothing; only report what would be deleted.")
@config_option
@json_option
def janitor(
    transport: str | None,
    cluster: str | None,
    config: Path | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Find the cluster's subscriptions that nobody reads, and delete them.

    Instances do the same when they start and every hour. The command takes ten seconds, or a minute
    when it finds one. You can run it at any time and on any machine. Only Google Pub/Sub keeps the
    subscriptions of a killed instance; for other transports the command connects to nothing. It
    creates nothing, not even a missing topic. Exit status 1: something could not be deleted.
    """
    # It needs no secret, and with dev none is required.
    settings = load_settings(config, {"dev": True, "transport": transport, "cluster": cluster})
    configure_logging(settings.log_format, settings.log_level)
    report = asyncio.run(_sweep(settings, dry_run=dry_run))
    if as_json:
        click.echo(json.dumps(_as_json(report, dry_run=dry_run)))
    elif report is None:
        scheme = settings.transport.partition("://")[0]
        click.echo(f"nothing to do: {scheme}:// keeps no subscriptions of dead instances")
    else:
        click.echo("\n".join(_lines(report)))
    return int(report is not None and any(orphan.problem for orphan in report.orphans))


async def _sweep(settings: Settings, *, dry_run: bool) -> "SweepReport | None":
    """The report; ``None`` when the transport leaves nothing behind."""
    sweeper = await open_sweeper(
        settings.transport, instance=settings.instance, cluster=settings.cluster
    )
    if sweeper is None:
        return None
    try:
        return await sweeper.sweep(dry_run=dry_run)
    finally:
        await sweeper.close()


def _as_json(report: "SweepReport | None", *, dry_run: bool) -> dict[str, object]:
    orphans = report.orphans if report else ()
    return {
        "examined": report.examined if report else 0,
        "orphans": [orphan._asdict() for orphan in orphans],
        "dry_run": dry_run,
    }


def _lines(report: "SweepReport") -> Iterator[str]:
    yield f"{report.examined} examined, {len(report.orphans)} that nobody reads"
    for orphan in report.orphans:
        name = orphan.subscription.rpartition("/")[2]
        yield f"{_outcome(orphan)}: {name} (unread for {orphan.unread_s:.0f} s)"


def _outcome(orphan: "Orphan") -> str:
    if orphan.problem:
        return f"not deleted, {orphan.problem}"
    return "deleted" if orphan.deleted else "would be deleted"
