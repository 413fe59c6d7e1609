"""Pictures of the costs of a plan and of a storm, drawn with matplotlib, which is an extra."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pokebridge.bench.traffic import LOAD_GENERATOR, SAMPLE_S
from pokebridge.costs import PRICES, Outcome, Prices, Strategy, Workload, evaluate
from pokebridge.errors import ConfigError

if TYPE_CHECKING:  # an extra, and slow to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png")
_STEPS = 60
# Okabe and Ito's colours, which colour-blind people tell apart, and a dash pattern each.
_STYLES: Mapping[Strategy, tuple[str, str]] = {
    Strategy.PUBSUB_FANOUT: ("#D55E00", "-"),
    Strategy.PUBSUB_FILTER: ("#0072B2", "--"),
    Strategy.PUBSUB_PREFIX: ("#CC79A7", ":"),
    Strategy.PUBSUB_TOPIC: ("#009E73", "-."),
    Strategy.NATS_FANOUT: ("#D55E00", "-"),
    Strategy.NATS_SUBJECT: ("#009E73", "-."),
    Strategy.REDIS_FANOUT: ("#D55E00", "-"),
    Strategy.REDIS_CHANNEL: ("#009E73", "-."),
}
# The same palette for the panels of a storm, and a red for limits and what crosses them.
_BLUE, _ORANGE, _GREEN, _PURPLE, _GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"
_RED = "#C00000"
_STORM_SIZE_INCHES = (9.0, 11.0)
# Room above the curves, for legends and names.
_HEADROOM = 1.15
# Rates and CPU are means over so many samples: over a second.
_SMOOTH = round(1 / SAMPLE_S)
_STYLE: Any = {
    "font.size": 10,
    "font.sans-serif": ["DejaVu Sans", "Verdana"],  # the first comes with the library
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "pokebridge",  # the same figures make the same bytes
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


class PlotFile(click.Path):
    """A file to draw into; its suffix chooses the format."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """A path that ends in .svg or .png."""
        path = Path(str(super().convert(value, param, ctx)))
        if path.suffix.lower() not in FORMATS:
            self.fail(f"{path} must end in {' or '.join(FORMATS)}.", param, ctx)
        return path


def check_drawing() -> None:
    """Raise ConfigError when matplotlib is not installed."""
    try:
        import matplotlib as mpl  # noqa: F401, PLC0415 - an extra
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed: pip install 'pokebridge[plot]'"
        ) from error


@contextmanager
def drawing(path: Path, size_inches: tuple[float, float]) -> Iterator["Figure"]:
    """A figure to draw on; it is saved to ``path`` when the block ends.

    Raises:
        ConfigError: matplotlib is not installed, or ``path`` can't be written.
    """
    check_drawing()
    import matplotlib as mpl  # noqa: PLC0415 - an extra
    from matplotlib.figure import Figure  # noqa: PLC0415

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size_inches, layout="constrained")
        yield figure
        try:
            no_date = {"Date": None, "Creator": None} if path.suffix.lower() == ".svg" else None
            figure.savefig(path, metadata=no_date, dpi=150)
        except OSError as error:
            raise ConfigError(f"--plot {path}: {error.strerror}") from None


def save_plot(
    path: Path,
    load: Workload,
    strategies: Sequence[Strategy],
    titles: Mapping[Strategy, str],
    prices: Prices = PRICES,
) -> None:
    """Draw deliveries and costs of ``strategies`` under ``load``, by number of instances.

    Raises:
        ConfigError: matplotlib is not installed, or ``path`` can't be written.
    """
    counts = _counts(load)
    courses = {
        strategy: [evaluate(replace(load, instances=count), strategy, prices) for count in counts]
        for strategy in strategies
    }
    with drawing(path, (10, 4.6)) as figure:
        left, right = figure.subplots(1, 2)
        for strategy, outcomes in courses.items():
            _draw_outcomes(left, right, counts, outcomes, titles[strategy])
        _finish_deliveries(left, load)
        _finish_costs(right, load)
        figure.suptitle(f"{load.messages_per_s:,.6g} messages/s, {load.shards:,} shards")


def crossing(load: Workload) -> int | None:
    """The number of instances from which fan-out is over the red line; ``None``: never."""
    if not load.messages_per_s:
        return None
    return int(load.red_line_ops_per_s // load.messages_per_s) + 1


def _counts(load: Workload) -> list[int]:
    """Numbers of instances from 1 to beyond both ``load.instances`` and the crossing."""
    crossed = crossing(load) or 1
    last = max(2 * load.instances, min(2 * crossed, 20 * load.instances), 10)
    steps = {round(last ** (step / _STEPS)) for step in range(_STEPS + 1)}
    return sorted({*steps, load.instances, min(crossed, last)})


def _draw_outcomes(
    left: "Axes", right: "Axes", counts: Sequence[int], outcomes: Sequence[Outcome], title: str
) -> None:
    colour, dashes = _STYLES[outcomes[0].strategy]
    style: dict[str, Any] = {"color": colour, "linestyle": dashes}
    left.plot(counts, [each.deliveries_per_s for each in outcomes], label=title, **style)
    low = [each.usd_a_month.low for each in outcomes]
    high = [each.usd_a_month.high for each in outcomes]
    right.fill_between(counts, low, high, color=colour, alpha=0.12, linewidth=0)
    right.plot(counts, high, label=title, **style)
    right.plot(counts, low, linewidth=0.8, **style)


def _finish_deliveries(axes: "Axes", load: Workload) -> None:
    line = load.red_line_ops_per_s
    axes.axhline(line, color=_RED, linewidth=1.2)
    axes.annotate(
        f"red line, {line:,.6g}/s",
        (1, line),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        color=_RED,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
    )
    crossed = crossing(load)
    if crossed is not None and crossed <= axes.get_xlim()[1]:
        at = (crossed, load.messages_per_s * crossed)
        axes.plot(*at, marker="o", color=_RED, linestyle="none")
        axes.annotate(
            f"crossed at {crossed:,}",
            at,
            xytext=(8, -4) if crossed == 1 else (-6, 6),
            textcoords="offset points",
            ha="left" if crossed == 1 else "right",
            color=_RED,
        )
    _finish_axes(axes, load, "Deliveries a second", "")
    axes.legend(loc="upper left", framealpha=0.9, edgecolor="none")


def _finish_costs(axes: "Axes", load: Workload) -> None:
    _finish_axes(axes, load, "Dollars a month, from low to high", "$")


def _finish_axes(axes: "Axes", load: Workload, title: str, unit: str) -> None:
    axes.set(title=title, xlabel="instances", xscale="log")
    # A logarithmic axis has no 0, and some values are 0.
    lowest, highest = axes.dataLim.intervaly
    if lowest < 1:
        axes.set_yscale("symlog", linthresh=1)
    else:
        axes.set_yscale("log")
    axes.set_ylim(lowest / 2, 2 * max(highest, 1))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{unit}{value:,.6g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(lambda *_: "")
    axes.axvline(load.instances, color="#666666", linewidth=0.8, linestyle=(0, (2, 3)))
    axes.annotate(
        f"{load.instances:,} now",
        (load.instances, 0),
        xycoords=("data", "axes fraction"),
        xytext=(-3, 4),
        textcoords="offset points",
        ha="right",
        color="#666666",
    )


# --- a storm ------------------------------------------------------------------------------------


def save_storm_plot(path: Path, report: dict[str, Any]) -> None:
    """Draw a ``report`` of :func:`~pokebridge.bench.storm.storm_report` over time.

    Raises:
        ConfigError: matplotlib is not installed, or ``path`` can't be written.
    """
    samples = report["samples"]
    times_s = [sample["at_s"] for sample in samples]
    with drawing(path, _STORM_SIZE_INCHES) as figure:
        panels = figure.subplots(6, 1, sharex=True)
        _draw_connected(panels[0], times_s, report)
        _draw_handshakes(panels[1], times_s, report)
        _draw_panel(panels[2], "Pulls a second", times_s, {"pulls": _rates(samples, "pulls")})
        _draw_cpu(panels[3], times_s, samples)
        _draw_poke_times(panels[4], report)
        silence_s = {"longest wait": [sample["silence_s"] for sample in samples]}
        _draw_panel(panels[5], "Longest wait of a message, s", times_s, silence_s)
        for axes in panels:
            axes.set_ylim(bottom=0, top=axes.get_ylim()[1] * _HEADROOM)
            _mark(axes, report)
        _name_marks(panels[0], report)
        panels[0].set_xlim(times_s[0], times_s[-1])
        panels[-1].set_xlabel("seconds after the kill")
        figure.suptitle(
            f"{report['clients']:,} clients on {report['instances']} instances, one killed:"
            f" {report['struck']:,} reconnect"
        )


def _draw_panel(
    axes: "Axes",
    title: str,
    times_s: Sequence[float],
    courses: Mapping[str, Sequence[float]],
    colours: Sequence[str] = (_BLUE, _ORANGE, _GREEN, _PURPLE),
) -> None:
    for (name, values), colour in zip(courses.items(), colours, strict=False):
        axes.plot(times_s, values, label=name, color=colour, linewidth=1.2)
    axes.set_title(title, loc="left", fontsize=10)
    if len(courses) > 1:
        axes.legend(loc="upper right", fontsize=8, framealpha=0.9, edgecolor="none", ncols=4)


def _draw_connected(axes: "Axes", times_s: Sequence[float], report: dict[str, Any]) -> None:
    connected = [sample["connected"] for sample in report["samples"]]
    _draw_panel(axes, "Connected", times_s, {"connected": connected})
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _draw_handshakes(axes: "Axes", times_s: Sequence[float], report: dict[str, Any]) -> None:
    samples = report["samples"]
    courses = {"accepted": _rates(samples, "accepted"), "refused": _rates(samples, "refused")}
    _draw_panel(axes, "Handshakes a second", times_s, courses)
    left = report["instances"] - 1
    limit_per_s = report["handshakes"]["limit_per_s"] * left
    axes.axhline(limit_per_s, color=_RED, linewidth=1, linestyle="--")
    axes.annotate(
        f"the {left} instances' limit: {limit_per_s:,}/s",
        (0.01, limit_per_s),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        color=_RED,
        fontsize=8,
    )


def _draw_cpu(axes: "Axes", times_s: Sequence[float], samples: Sequence[dict[str, Any]]) -> None:
    names = sorted({name for sample in samples for name in sample["cpu"]} - {LOAD_GENERATOR})
    courses = {
        name: _smooth([sample["cpu"].get(name, float("nan")) for sample in samples])
        for name in (*names, LOAD_GENERATOR)
    }
    colours = [*(_BLUE, _GREEN, _ORANGE, _PURPLE)[: len(names)], _GREY]
    _draw_panel(axes, "CPU, cores", times_s, courses, colours)


def _draw_poke_times(axes: "Axes", report: dict[str, Any]) -> None:
    seconds = sorted(report["pokes_by_second"], key=lambda each: float(each["at_s"]))
    times_s = [second["at_s"] for second in seconds]
    courses = {name: [second[name] for second in seconds] for name in ("p50", "p99")}
    _draw_panel(axes, "From message to poke, clients of the others, ms", times_s, courses)
    axes.set_yscale("symlog", linthresh=10)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _mark(axes: "Axes", report: dict[str, Any]) -> None:
    axes.axvline(0, color=_RED, linewidth=1)
    if report["back_s"] is not None:
        axes.axvline(report["back_s"], color=_GREY, linewidth=1, linestyle=":")


def _name_marks(axes: "Axes", report: dict[str, Any]) -> None:
    moments = {"killed": 0.0, "all are back": report["back_s"]}
    for (name, at_s), colour in zip(moments.items(), (_RED, _GREY), strict=True):
        if at_s is not None:
            axes.annotate(
                name,
                (at_s, 0),
                xytext=(4, 6),
                textcoords="offset points",
                color=colour,
                fontsize=8,
            )


def _rates(samples: Sequence[dict[str, Any]], name: str) -> Sequence[float]:
    """The rate per second at each sample, over about the second before it."""
    rates = []
    for last in range(len(samples)):
        first = max(0, last - _SMOOTH)
        took_s = samples[last]["at_s"] - samples[first]["at_s"] or SAMPLE_S
        rates.append(sum(sample[name] for sample in samples[first + 1 : last + 1]) / took_s)
    return rates


def _smooth(values: Sequence[float]) -> Sequence[float]:
    """The mean of each value and of those in the second before it."""
    windows = (values[max(0, end - _SMOOTH) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]
