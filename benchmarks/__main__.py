"""``python -m benchmarks``: run all measures and print one table."""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import psutil
import uvloop

from benchmarks import (
    audience,
    cycle,
    handshakes,
    latency,
    mailbox,
    memory,
    noise,
    pokes,
    polling,
    profiled,
    tokens,
    transports,
    verification,
    workers,
)
from benchmarks.harness import BenchmarkError, Figure, progress
from pokebridge.telemetry import configure_logging

MEASURES: dict[str, Callable[[], Awaitable[list[Figure]]]] = {
    "memory": memory.measure,
    "pokes": pokes.measure,
    "handshakes": handshakes.measure,
    "tokens": tokens.measure,
    "noise": noise.measure,
    "profiled": profiled.measure,
    "transports": transports.measure,
    "latency": latency.measure,
    "audience": audience.measure,
    "polling": polling.measure,
    "cycle": cycle.measure,
    "mailbox": mailbox.measure,
    "verification": verification.measure,
    "workers": workers.measure,
}


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only", action="append", choices=MEASURES, help="run only this measure; may be repeated"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the figures to this file"
    )
    given = parser.parse_args()
    configure_logging("json", "warning")
    try:
        figures = uvloop.run(_take(given.only or list(MEASURES)))
    except BenchmarkError as error:
        sys.exit(f"bench: {error}")
    print(table(figures))
    print("\n" + ", ".join(f"{name}: {value}" for name, value in machine().items()))
    if given.json:
        given.json.write_text(_as_json(figures))


async def _take(names: Sequence[str]) -> list[Figure]:
    figures = []
    for name in names:
        started_s = time.monotonic()
        figures += await MEASURES[name]()
        progress(f"{name}: done in {time.monotonic() - started_s:.0f} s")
    return figures


def table(figures: Sequence[Figure]) -> str:
    """The figures as a table, each with its target and whether it is met."""
    rows = [("measure", "what", "figure", "target", "", "made of")]
    rows += [
        (
            figure.measure,
            figure.name,
            f"{figure.value:.2f} {figure.unit}",
            "" if figure.at_most is None else f"<= {figure.at_most} {figure.unit}",
            {True: "met", False: "MISSED", None: ""}[figure.met],
            figure.detail,
        )
        for figure in figures
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def machine() -> dict[str, str | int]:
    """What the figures were taken on."""
    info = Path("/proc/cpuinfo").read_text()
    models = [line.partition(": ")[2] for line in info.splitlines() if "model name" in line]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def _as_json(figures: Sequence[Figure]) -> str:
    taken = [{**asdict(figure), "met": figure.met} for figure in figures]
    return json.dumps({"machine": machine(), "figures": taken}, indent=2) + "\n"


if __name__ == "__main__":
    main()
