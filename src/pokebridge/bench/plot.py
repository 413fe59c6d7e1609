"""The plan as a picture: deliveries and cost against the number of instances."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pokebridge.costs import PRICES, Load, Outcome, Prices, Strategy, evaluate
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
}
_RED = "#C00000"
_STYLE: Any = {
    "font.size": 10,
    "font.sans-serif": ["DejaVu Sans", "Verdana"],  # the first comes with the library
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "pokebridge",  # the same figures make the same file
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


class PlotFile(click.Path):
    """A file whose name says in which format to draw."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """A path that ends in .svg or .png."""
        path = Path(str(super().convert(value, param, ctx)))
        if path.suffix.lower() not in FORMATS:
            self.fail(f"{path} must end in {' or '.join(FORMATS)}.", param, ctx)
        return path


def check_drawing() -> None:
    """Raise ConfigError when the library that draws is not installed."""
    try:
        import matplotlib as mpl  # noqa: F401, PLC0415 - an extra
    except ImportError as error:
        raise ConfigError(
            "--plot needs a library that is not installed: pip install 'pokebridge[plot]'"
        ) from error


@contextmanager
def drawing(path: Path, size_inches: tuple[float, float]) -> Iterator["Figure"]:
    """A figure to draw on, which is saved to ``path`` when the block ends.

    Raises:
        ConfigError: the library for it is not installed, or the file can't be written.
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
    load: Load,
    strategies: Sequence[Strategy],
    titles: Mapping[Strategy, str],
    prices: Prices = PRICES,
) -> None:
    """Draw what ``strategies`` make of ``load`` with few to many instances.

    Raises:
        ConfigError: the library for it is not installed, or the file can't be written.
    """
    counts = _counts(load)
    courses = {
        strategy: [evaluate(replace(load, instances=count), strategy, prices) for count in counts]
        for strategy in strategies
    }
    with drawing(path, (10, 4.6)) as figure:
        left, right = figure.subplots(1, 2)
        for strategy, outcomes in courses.items():
            _draw(left, right, counts, outcomes, titles[strategy])
        _finish_deliveries(left, load)
        _finish_costs(right, load)
        figure.suptitle(f"{load.messages_per_s:,.6g} messages/s, {load.shards:,} shards")


def crossing(load: Load) -> int | None:
    """From how many instances on fan-out is over the line; ``None``: no number is."""
    if not load.messages_per_s:
        return None
    return int(load.red_line_ops_per_s // load.messages_per_s) + 1


def _counts(load: Load) -> list[int]:
    """From 1 to well beyond both what there is and where the line is crossed, within reason."""
    crossed = crossing(load) or 1
    last = max(2 * load.instances, min(2 * crossed, 20 * load.instances), 10)
    steps = {round(last ** (step / _STEPS)) for step in range(_STEPS + 1)}
    return sorted({*steps, load.instances, min(crossed, last)})


def _draw(
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


def _finish_deliveries(axes: "Axes", load: Load) -> None:
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
    _finish(axes, load, "Deliveries a second", "")
    axes.legend(loc="upper left", framealpha=0.9, edgecolor="none")


def _finish_costs(axes: "Axes", load: Load) -> None:
    _finish(axes, load, "Dollars a month, from low to high", "$")


def _finish(axes: "Axes", load: Load, title: str, unit: str) -> None:
    axes.set(title=title, xlabel="instances", xscale="log")
    # Down to nothing where there is nothing: a logarithm would leave it out.
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
