"""``pokebridge bench``: put load on an instance and measure it."""

import asyncio
import json
from contextlib import suppress
from typing import Any

import click
import uvloop
from click.core import ParameterSource

from pokebridge.bench.load_generator import LoadGenerator, Plan, Tally
from pokebridge.bench.traffic import percentiles_ms
from pokebridge.cli.api import Access, api_options
from pokebridge.cli.options import Number, allow_clients, json_option
from pokebridge.cli.storm import storm
from pokebridge.errors import UnavailableError

_CONNECTS_PER_S = 200
_PROGRESS_S = 1.0


@click.group(
    invoke_without_command=True,
    epilog="Example: pokebridge bench --clients 1000 --pokes-per-s 2000 --duration-s 20",
    short_help="Put load on an instance.",
)
@click.option(
    "--clients",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Number of clients, each with its own recipient.",
)
@click.option(
    "--ramp-s",
    type=Number(min=0),
    help=f"Seconds over which they connect. [default: {_CONNECTS_PER_S} per second]",
)
@click.option("--pokes-per-s", type=Number(min=0), help="Pokes sent per second. [default: 100]")
@click.option(
    "--messages-per-s",
    type=Number(min=0),
    help="Instead of pokes: stored messages per second.",
)
@click.option(
    "--duration-s",
    type=Number(min=0),
    default=10,
    show_default=True,
    help="Seconds of sending, after all clients have connected.",
)
@api_options(token=False)
@json_option
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    clients: int,
    ramp_s: float | None,
    pokes_per_s: float | None,
    messages_per_s: float | None,
    duration_s: float,
    *,
    as_json: bool,
    **access: Any,
) -> None:
    """Connect clients to an instance, poke them, and measure.

    It measures the time from connecting to `ready`, the time from sending a poke to receiving it,
    and what is lost. It needs the instance's jwt_secret (POKEBRIDGE_JWT_SECRET or --config), or an
    instance that runs with --dev. The load generator itself uses CPU. To find the limits of an
    instance, run it on another machine. Exit status 1: not all clients had a session at the end.
    """
    if ctx.invoked_subcommand is not None:
        _refuse_own_options(ctx)
        return
    if pokes_per_s is not None and messages_per_s is not None:
        raise click.UsageError("--pokes-per-s and --messages-per-s exclude each other")
    allow_clients(clients)
    messages = messages_per_s is not None
    rate_per_s = messages_per_s if messages_per_s is not None else pokes_per_s
    plan = Plan(
        clients=clients,
        ramp_s=clients / _CONNECTS_PER_S if ramp_s is None else ramp_s,
        duration_s=duration_s,
        rate_per_s=100 if rate_per_s is None else rate_per_s,
        messages=messages,
    )
    tally = uvloop.run(_bench(Access(**access), plan))
    report = _report(plan, tally)
    click.echo(json.dumps(report) if as_json else _table(report))
    if missing := clients - tally.present:
        raise UnavailableError(f"{missing} of {clients} clients had no session at the end")


bench.add_command(storm)


def _refuse_own_options(ctx: click.Context) -> None:
    """Refuse options before the subcommand: they belong to bench and would be ignored."""
    for name in ctx.params:
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"options of {ctx.invoked_subcommand} come after its name")


async def _bench(access: Access, plan: Plan) -> Tally:
    async with access.open() as api:
        load = LoadGenerator(api, plan)
        progress = asyncio.create_task(_show_progress(load))
        try:
            await load.run()
        finally:
            progress.cancel()
            with suppress(asyncio.CancelledError):
                await progress
    if not load.tally.handshakes_s:
        (reason, _), *_ = load.tally.failures.most_common(1)
        raise UnavailableError(f"no client could connect: {reason}")
    return load.tally


async def _show_progress(load: LoadGenerator) -> None:
    while True:
        await asyncio.sleep(_PROGRESS_S)
        tally = load.tally
        click.echo(
            f"{load.connected} connected, {tally.sent} sent, {len(tally.latencies_s)} heard,"
            f" {tally.failures.total()} failures",
            err=True,
        )


def _report(plan: Plan, tally: Tally) -> dict[str, Any]:
    return {
        "clients": plan.clients,
        "connected": len(tally.handshakes_s),
        "handshake_ms": percentiles_ms(tally.handshakes_s, digits=3),
        "kind": "messages" if plan.messages else "pokes",
        "sent": tally.sent,
        "sent_per_s": round(tally.sent / tally.sending_s, 1) if tally.sending_s else 0,
        "wanted_per_s": plan.rate_per_s,
        "heard": len(tally.latencies_s),
        "lost": tally.lost,
        "latency_ms": percentiles_ms(tally.latencies_s, digits=3),
        "failures": dict(tally.failures),
    }


def _table(report: dict[str, Any]) -> str:
    def times(percentiles: dict[str, float] | None) -> str:
        if percentiles is None:
            return "-"
        return ", ".join(f"{name} {value:.1f} ms" for name, value in percentiles.items())

    rate = f"{report['sent_per_s']:g} of {report['wanted_per_s']:g} per s"
    pokes = f"{report['sent']} sent ({rate}), {report['heard']} heard, {report['lost']} lost"
    rows = [
        ("clients", f"{report['connected']} of {report['clients']} connected"),
        ("handshake", times(report["handshake_ms"])),
        (report["kind"], pokes),
        ("latency", times(report["latency_ms"])),
        *(("failed", f"{count} x {reason}") for reason, count in report["failures"].items()),
    ]
    return "\n".join(f"{name:<10} {text}" for name, text in rows)
