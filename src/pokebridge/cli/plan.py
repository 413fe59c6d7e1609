"""``pokebridge plan``: what each way of routing pokes costs, and which one to choose."""

import asyncio
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import click
from rich.console import Console
from rich.table import Table

from pokebridge.bench.plot import PlotFile, save_plot
from pokebridge.cli.api import SUBJECT, Access, token_option
from pokebridge.cli.options import Number, config_option, counted, json_option
from pokebridge.costs import (
    FANOUT,
    PARTITIONED,
    PRICES,
    Advice,
    Engine,
    Outcome,
    Prices,
    Range,
    Strategy,
    Workload,
    advise,
    evaluate,
    format_share,
    misplaced_share,
)
from pokebridge.errors import UnavailableError
from pokebridge.model import Mode
from pokebridge.settings import load_settings
from pokebridge.sharding import MAX_SHARD_COUNT

_DEFAULTS = {field.name: field.default for field in fields(Workload)}
_WIDE_ENOUGH = 200
# The largest figure that is accepted, so that products of several stay finite.
_MOST = 1e12

_ENGINE_TITLES: dict[Engine, str] = {
    "pubsub": "Google Pub/Sub",
    "nats": "NATS",
    "redis": "Redis",
}
TITLES = {
    Strategy.PUBSUB_FANOUT: "fan-out",
    Strategy.PUBSUB_FILTER: "filter a shard",
    Strategy.PUBSUB_PREFIX: "prefix filters",
    Strategy.PUBSUB_TOPIC: "topic a shard",
    Strategy.NATS_FANOUT: "fan-out",
    Strategy.NATS_SUBJECT: "subject a shard",
    Strategy.REDIS_FANOUT: "fan-out",
    Strategy.REDIS_CHANNEL: "channel a shard",
}


COLUMNS: Mapping[str, Callable[[Outcome], str]] = {
    "deliveries\n/s": lambda it: f"{it.deliveries_per_s:,.0f}{'*' if it.over_red_line else ' '}",
    "dis-\ncarded": lambda it: format_share(it.discarded_share),
    "fil-\ntered": lambda it: format_share(it.filtered_share),
    "CPU cores\nwasted": lambda it: _span(it.cpu_cores_wasted, ",.2f"),
    "subs": lambda it: f"{it.subscriptions:,}",
    "deploy\ncalls": lambda it: f"{it.admin_ops_to_deploy:,}",
    "$ a month": lambda it: _span(it.usd_a_month, ",.0f"),
}
_DECISIVE = ("deliveries\n/s", "dis-\ncarded", "CPU cores\nwasted", "$ a month")
_TABLE_WIDTH = 80


class _Measured(NamedTuple):
    """What a running cluster reports."""

    engine: Engine | None
    """The engine in use. ``None``: none, or one that this command does not know."""
    mode: Mode
    noise_ratio: float
    copies: float
    """How many instances receive a message."""
    load: dict[str, Any]


@click.command(
    epilog="Example: pokebridge plan --messages-per-s 1000 --instances 50 --plot plan.svg",
    short_help="Compare the costs of the modes.",
)
@click.option(
    "--messages-per-s",
    type=Number(0, _MOST),
    help="Messages published per second. A message carries one or more pokes.",
)
@click.option(
    "--pokes-per-s", type=Number(0, _MOST), help="Instead of --messages-per-s: pokes per second."
)
@click.option("--instances", type=click.IntRange(1, int(_MOST)), help="Number of instances.")
@click.option(
    "--shards",
    type=click.IntRange(1, MAX_SHARD_COUNT),
    help="Number of shards. [default: shard_count]",
)
@click.option("--sessions", type=click.IntRange(0, int(_MOST)), help="Open sessions. [default: 0]")
@click.option(
    "--misplaced-share",
    type=Number(0, 1),
    help="Share of sessions that are not on the owner of their shard. [default: 0]",
)
@click.option(
    "--recipients-per-session",
    type=Number(1, _MOST),
    help="Recipients that a session hears, its own included. Needs the number of sessions."
    " [default: 1]",
)
@click.option(
    "--pokes-per-message",
    type=Number(1, _MOST),
    help=f"Pokes that share a message. [default: {_DEFAULTS['pokes_per_message']:g}]",
)
@click.option(
    "--poke-size-bytes",
    type=Number(1, _MOST),
    help=f"Size of one poke as JSON. [default: {_DEFAULTS['poke_size_bytes']:g}]",
)
@click.option(
    "--messages-per-request",
    type=Number(1, _MOST),
    help="Messages that share a request to Google. [default: unknown, 1 to 200]",
)
@click.option(
    "--usd-per-tib",
    type=Number(0, _MOST),
    default=PRICES.usd_per_tib,
    show_default=True,
    help=f"Google's price, as of {PRICES.as_of}.",
)
@click.option(
    "--red-line-ops-per-s",
    type=Number(0, _MOST, min_open=True),
    help="The red line, as for serve.",
)
@click.option(
    "--engine",
    type=click.Choice(get_args(Engine)),
    help="Engine that the advice and the plot are for. [default: pubsub; with --from the one in"
    " use, and only its costs are shown]",
)
@click.option(
    "--plot", type=PlotFile(), metavar="FILE", help="Draw the costs into FILE, .svg or .png."
)
@click.option(
    "--from",
    "url",
    metavar="URL",
    help="Take the figures that are not given from the running cluster at URL.",
)
@token_option
@config_option
@json_option
def plan(
    *,
    engine: Engine | None,
    plot: Path | None,
    usd_per_tib: float,
    url: str | None,
    token: str | None,
    config: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Compare what fan-out and partitioning cost, and advise.

    The table shows for each way of routing: deliveries per second in the whole cluster, the share
    that instances discard, the share that a filter drops and charges for, the CPU cores that are
    wasted, subscriptions, and dollars a month. An uncertain figure is a range. docs/redline.md
    explains the computation and names the sources of the prices.
    """
    heard = given["recipients_per_session"] or 1.0
    measured = asyncio.run(_measure(Access(url, config, token), heard)) if url else None
    load = _load(given, measured, config)
    prices = replace(PRICES, usd_per_tib=usd_per_tib)
    in_use = measured.engine if measured else None
    is_shown = {engine or in_use} if in_use else set(get_args(Engine))
    engine = engine or in_use or "pubsub"
    outcomes = {strategy: evaluate(load, strategy, prices) for strategy in Strategy}
    advice = advise(load, engine, measured.mode if measured else "fanout", prices)
    if plot is not None:
        strategies = [strategy for strategy in Strategy if strategy.engine == engine]
        save_plot(plot, load, strategies, TITLES, prices)
    if as_json:
        report = _as_json(load, outcomes, advice, engine, measured)
        click.echo(json.dumps(report | {"prices": asdict(prices)}))
        return
    shown = [outcome for outcome in outcomes.values() if outcome.strategy.engine in is_shown]
    for line in _headlines(load, measured, prices if "pubsub" in is_shown else None):
        click.echo(line)
    _print_table(shown)
    for outcome in shown:
        for obstacle in outcome.obstacles:
            engine_title = _ENGINE_TITLES[outcome.strategy.engine]
            click.echo(f"{engine_title}, {TITLES[outcome.strategy]}: {obstacle}")
    click.echo(f"{advice.verdict}: {advice.text}")


async def _measure(access: Access, recipients_per_session: float) -> _Measured:
    """The load of the running cluster, whose sessions hear so many recipients each."""
    async with access.open() as api:
        cluster = await api.get("/v1/cluster", await api.token_for(SUBJECT, ["admin"]))
    try:
        traffic, members = cluster["traffic"], cluster["instances"]
        messages_per_s = _figure(traffic["messages_per_s"])
        global_ops_per_s = _figure(traffic["global_ops_per_s"])
        copies = global_ops_per_s / messages_per_s if messages_per_s else 1.0
        mode: Mode = "partitioned" if cluster["mode"] == "partitioned" else "fanout"
        load: dict[str, Any] = {
            "messages_per_s": messages_per_s,
            "instances": max(len(members), 1),
            "shards": int(_figure(cluster["shard_count"])),
            "sessions": int(_figure(sum(member["sessions"] for member in members))),
            "red_line_ops_per_s": _figure(traffic["red_line"]),
            "recipients_per_session": recipients_per_session,
        }
        if mode == "partitioned":
            load["misplaced_share"] = misplaced_share(Workload(**load), copies)
        engine = cluster.get("engine")
        known: Engine | None = engine if engine in get_args(Engine) else None
        return _Measured(known, mode, _figure(traffic["noise_ratio"]), copies, load)
    except (KeyError, TypeError, ValueError):
        raise UnavailableError(
            f"{access.url} answered, but not as an instance of pokebridge"
        ) from None


def _figure(value: Any) -> float:
    """A figure of a running cluster. Raises ValueError when nothing can be computed with it."""
    figure = float(value)
    if not 0 <= figure <= _MOST:
        raise ValueError("no such figure is measured")
    return figure


def _load(given: dict[str, Any], measured: _Measured | None, config: Path | None) -> Workload:
    """Flags, then what was measured, then the settings, then the model's defaults."""
    settings = load_settings(config, {"dev": True})
    load: dict[str, Any] = {
        "shards": settings.shard_count,
        "red_line_ops_per_s": settings.red_line_ops_per_s,
    }
    if measured:
        load |= measured.load
    load |= {name: value for name, value in given.items() if value is not None}
    if (pokes_per_s := load.pop("pokes_per_s", None)) is not None:
        if given["messages_per_s"] is not None:
            raise click.UsageError("--pokes-per-s and --messages-per-s exclude each other")
        load["messages_per_s"] = pokes_per_s / load.get("pokes_per_message", 1)
    for name in ("messages_per_s", "instances"):
        if name not in load:
            flag = f"--{name.replace('_', '-')}"
            raise click.UsageError(
                f"{flag} is needed, or --from URL to take it from a running cluster"
            )
    if load.get("recipients_per_session", 1) > 1 and not load.get("sessions"):
        raise click.UsageError("--recipients-per-session needs --sessions, the number of sessions")
    if "messages_per_request" in load:
        load["messages_per_request"] = Range.exactly(load["messages_per_request"])
    return Workload(**load)


# --- output -------------------------------------------------------------------------------------


def _as_json(
    load: Workload,
    outcomes: dict[Strategy, Outcome],
    advice: Advice,
    engine: Engine,
    measured: _Measured | None,
) -> dict[str, Any]:
    figures = {strategy: _figures(outcome) for strategy, outcome in outcomes.items()}
    return {
        "load": asdict(load),
        "measured": {
            "mode": measured.mode,
            "noise_ratio": measured.noise_ratio,
            "copies": measured.copies,
        }
        if measured
        else None,
        "fanout": figures[FANOUT[engine]],
        "partitioned": figures[PARTITIONED[engine]],
        "strategies": {strategy.value: each for strategy, each in figures.items()},
        "verdict": advice.verdict,
        "advice": advice.text,
    }


def _figures(outcome: Outcome) -> dict[str, Any]:
    """An outcome under the names of protocol.md section 6."""
    figures = asdict(outcome)
    return {"global_ops_per_s": figures.pop("deliveries_per_s")} | figures


def _headlines(load: Workload, measured: _Measured | None, prices: Prices | None) -> Sequence[str]:
    pokes = f"{load.pokes_per_message:g} poke{'' if load.pokes_per_message == 1 else 's'} each"
    instances, shards = counted(load.instances, "instance"), counted(load.shards, "shard")
    asked = (
        f"{_round(load.messages_per_s)} messages/s ({pokes}), {instances},"
        f" {shards}, red line at {_round(load.red_line_ops_per_s)} deliveries/s"
    )
    data = "costs of CPU time as measured, see docs/redline.md"
    if prices is not None:
        data = f"prices as of {prices.as_of}; {data}"
    if measured is None:
        return [asked, data]
    reached = f"{measured.copies:.3g} instance{'' if measured.copies == 1 else 's'}"
    noise = (
        f"measured in {measured.mode}: a message reaches {reached},"
        f" {measured.noise_ratio:.1%} of the CPU time is noise"
    )
    return [asked, noise, data]


def _round(rate: float) -> str:
    """A rate with two digits, or all those before the point."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _print_table(outcomes: Sequence[Outcome]) -> None:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    # The whole table needs 76 columns. A narrow terminal shows what decides.
    is_wide = shutil.get_terminal_size((_WIDE_ENOUGH, 0)).columns >= _TABLE_WIDTH
    columns = COLUMNS if is_wide else {name: COLUMNS[name] for name in _DECISIVE}
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    engine = ""
    for outcome in outcomes:
        if outcome.strategy.engine != engine:
            engine = outcome.strategy.engine
            table.add_row(_ENGINE_TITLES[outcome.strategy.engine])
        table.add_row(
            f"  {TITLES[outcome.strategy]}",
            *(form(outcome) for form in columns.values()),
            style="bold red" if outcome.over_red_line else "",
        )
    # A narrow terminal breaks the lines of the table. If rich knew, it would leave out digits.
    Console(highlight=False, width=_WIDE_ENOUGH).print(table)
    if any(outcome.over_red_line for outcome in outcomes):
        click.echo("* over the red line")


def _span(value: Range, form: str) -> str:
    low, high = format(value.low, form), format(value.high, form)
    return low if low == high else f"{low}-{high}"
