"""A storm as a picture: small multiples over time, one below the other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pokebridge.bench.plot import drawing
from pokebridge.bench.storm_watch import LOAD_GENERATOR, SAMPLE_S

if TYPE_CHECKING:  # an extra, and slow to import
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _GREEN, _PURPLE, _GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"
_RED = "#C00000"
# For legends and names.
_HEADROOM = 1.15
_SIZE_INCHES = (9.0, 11.0)
# Rates and CPU are shown over so many samples: a second.
_SMOOTH = round(1 / SAMPLE_S)


def save_storm_plot(path: Path, report: dict[str, Any]) -> None:
    """Draw what :func:`~pokebridge.bench.storm_report.storm_report` has found.

    Raises:
        ConfigError: the library for it is not installed, or the file can't be written.
    """
    samples = report["samples"]
    times_s = [sample["at_s"] for sample in samples]
    with drawing(path, _SIZE_INCHES) as figure:
        panels = figure.subplots(6, 1, sharex=True)
        _draw_connected(panels[0], times_s, report)
        _draw_handshakes(panels[1], times_s, report)
        _draw(panels[2], "Pulls a second", times_s, {"pulls": _rates(samples, "pulls")})
        _draw_cpu(panels[3], times_s, samples)
        _draw_poke_times(panels[4], report)
        silence_s = {"longest wait": [sample["silence_s"] for sample in samples]}
        _draw(panels[5], "Longest wait of a message, s", times_s, silence_s)
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


def _draw(
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
    _draw(axes, "Connected", times_s, {"connected": connected})
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _draw_handshakes(axes: "Axes", times_s: Sequence[float], report: dict[str, Any]) -> None:
    samples = report["samples"]
    courses = {"accepted": _rates(samples, "accepted"), "refused": _rates(samples, "refused")}
    _draw(axes, "Handshakes a second", times_s, courses)
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
    _draw(axes, "CPU, cores", times_s, courses, colours)


def _draw_poke_times(axes: "Axes", report: dict[str, Any]) -> None:
    seconds = sorted(report["pokes_by_second"], key=lambda each: float(each["at_s"]))
    times_s = [second["at_s"] for second in seconds]
    courses = {name: [second[name] for second in seconds] for name in ("p50", "p99")}
    _draw(axes, "From message to poke, clients of the others, ms", times_s, courses)
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
    """A second's rate up to each sample; more than that when samples were late."""
    rates = []
    for last in range(len(samples)):
        first = max(0, last - _SMOOTH)
        took_s = samples[last]["at_s"] - samples[first]["at_s"] or SAMPLE_S
        rates.append(sum(sample[name] for sample in samples[first + 1 : last + 1]) / took_s)
    return rates


def _smooth(values: Sequence[float]) -> Sequence[float]:
    """The mean of each value and those just before it."""
    windows = (values[max(0, end - _SMOOTH) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]
