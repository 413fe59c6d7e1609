"""``pokebridge bench storm``: kill an instance under load, and measure how its clients return."""

import json
import os
import tempfile
from pathlib import Path
from time import monotonic
from typing import Any, get_args

import click
import uvloop

from pokebridge.bench.fleet import FleetPlan
from pokebridge.bench.plot import PlotFile, check_drawing, save_storm_plot
from pokebridge.bench.storm import Storm, StormPlan, storm_failures, storm_report, storm_table
from pokebridge.cli.options import Number, allow_clients
from pokebridge.errors import ConfigError, PokebridgeError
from pokebridge.model import Mode
from pokebridge.server.adapters import transport_class


@click.command(
    epilog="Example: pokebridge bench storm --transport nats://127.0.0.1:4222 --clients 15000",
    short_help="Kill an instance under load.",
)
@click.option(
    "--transport", required=True, metavar="URL", help="Transport of the instances, as for serve."
)
@click.option("--mailbox", metavar="URL", help="As for serve. [default: a temporary SQLite file]")
@click.option("--coordination", metavar="URL", help="As for serve. [default: none]")
@click.option("--mode", type=click.Choice(get_args(Mode)), default="fanout", show_default=True)
@click.option("--instances", type=click.IntRange(min=2), default=3, show_default=True)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Worker processes of each instance.",
)
@click.option("--clients", type=click.IntRange(min=2), default=3000, show_default=True)
@click.option(
    "--handshakes-per-s",
    type=click.IntRange(min=1),
    default=500,
    show_default=True,
    help="Handshakes that each instance accepts per second.",
)
@click.option(
    "--messages-per-s",
    type=Number(min=0),
    default=100,
    show_default=True,
    help="Messages per second to the clients, and as many to the clients that time the pokes.",
)
@click.option(
    "--calm-s",
    type=Number(min=0),
    default=10,
    show_default=True,
    help="Seconds of traffic before the kill, and again after all clients are back.",
)
@click.option(
    "--restart-s",
    type=Number(min=0),
    help="Seconds after which the killed instance starts again. [default: never]",
)
@click.option(
    "--within-s",
    type=Number(min=0),
    default=120,
    show_default=True,
    help="Seconds within which all clients must be back.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write all figures to this file.",
)
@click.option("--plot", "plot_file", type=PlotFile(), help="Draw the storm into this file.")
def storm(json_file: Path | None, plot_file: Path | None, **given: Any) -> None:
    """Start instances, connect clients to them, kill one with -9, and measure the reconnects.

    The clients follow the protocol as every client of pokebridge does. The stand-in for a load
    balancer knows at once that an instance is gone. The command fails if a message was lost, or if
    not all clients have reconnected and pulled in time.

    Instances and clients share this machine, so the command shows whether the storm stays within
    bounds. To find the limits of an instance, use three machines.
    """
    plan = _plan(**given)
    if not transport_class(plan.fleet.transport).is_shared:
        raise ConfigError("--transport: memory:// does not reach another process")
    if plot_file is not None:
        check_drawing()
    allow_clients(plan.clients)
    load = os.getloadavg()[0]
    report = uvloop.run(_storm(plan, load))
    click.echo(storm_table(report))
    if json_file is not None:
        json_file.write_text(json.dumps(report))
    if plot_file is not None:
        save_storm_plot(plot_file, report)
    if failures := storm_failures(report):
        raise PokebridgeError("; ".join(failures))


def _plan(
    *,
    clients: int,
    messages_per_s: float,
    calm_s: float,
    restart_s: float | None,
    within_s: float,
    **fleet: Any,
) -> StormPlan:
    return StormPlan(
        fleet=FleetPlan(**fleet),
        clients=clients,
        messages_per_s=messages_per_s,
        calm_s=calm_s,
        restart_s=restart_s,
        within_s=within_s,
    )


async def _storm(plan: StormPlan, machine_load: float) -> dict[str, Any]:
    began_s = monotonic()

    def say(text: str) -> None:
        passed_s = monotonic() - began_s
        click.echo(f"{passed_s:5.0f} s  {text}", err=True)

    with tempfile.TemporaryDirectory(prefix="pokebridge-storm-") as directory:
        storm = Storm(plan, Path(directory), say)
        await storm.run()
        return storm_report(plan, storm, machine_load)
