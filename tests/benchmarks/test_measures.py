"""Every measure of ``make bench`` runs, at a size that proves that and measures nothing."""

import json
import re
import sys
from collections.abc import Awaitable, Sequence
from pathlib import Path

import pytest

from benchmarks import __main__ as bench
from benchmarks import (
    audience,
    handshakes,
    latency,
    mailbox,
    memory,
    noise,
    pokes,
    polling,
    verification,
)
from benchmarks import tokens as token_measure
from benchmarks.harness import (
    BenchmarkError,
    Figure,
    child,
    herd,
    load_program,
    tokens,
    websockets_server,
)


async def taken(measure: Awaitable[list[Figure]]) -> dict[str, Figure]:
    """The figures of a measure, by the last words of their names."""
    return {figure.name.rpartition(", ")[2]: figure for figure in await measure}


def between(low: float, figure: Figure, high: float) -> bool:
    """Whether a figure is of a likely size, with all the room that a busy machine needs."""
    return low < figure.value < high


async def test_memory() -> None:
    """A session takes memory, but less than one of the websockets library."""
    figures = await taken(memory.measure(clients=1000, warm_up=20))
    assert between(0.5, figures["at 1,000"], 10)
    assert between(0.01, figures["to websockets"], 0.9)


async def test_pokes() -> None:
    """Every poke of every kind is delivered, and costs something."""
    figures = await taken(pokes.measure(clients=200, parts=1, rounds=2))
    assert between(0.2, figures["to C send()"], 50)
    assert between(0.02, figures["to websockets"], 5)
    assert figures["to C send()"].name.startswith("CPU of 8,000 pokes")


async def test_handshakes() -> None:
    """Authenticated handshakes cost CPU time on both servers."""
    figures = await handshakes.measure(clients=300, rounds=1)
    assert len(figures) == 2
    assert all(between(0.05, figure, 10) for figure in figures)


async def test_verification() -> None:
    """Every session is looked up in every kind of mailbox, at a cost."""
    figures = await taken(verification.measure(sessions=1000))
    assert {"memory", "SQLite", "PostgreSQL"} < figures.keys()
    assert all(between(0, figures[kind], 5) for kind in ("memory", "SQLite", "PostgreSQL"))


async def test_tokens() -> None:
    """A remembered token costs less than one that was pushed out."""
    remembered, forgotten = await token_measure.measure(clients=200, rounds=1)
    assert between(0.001, remembered, 0.9)
    assert remembered.value < forgotten.value


async def test_noise() -> None:
    """Pokes for strangers are dropped at a cost, as single signals and in batches."""
    figures = await noise.measure(sessions=100, strangers=200, rounds=3)
    assert len(figures) == 2
    assert all(between(0.01, figure, 100) for figure in figures)


async def test_latency() -> None:
    """Every poke that is posted is heard; the slowest are no faster than the median."""
    figures = await taken(latency.measure(clients=20, pokes_each=1, rate_per_s=100))
    assert 0 < figures["p50"].value <= figures["p99"].value < 10_000


async def test_audience() -> None:
    """Users are poked before and during the pokes to a room, which reach it."""
    figures = await audience.measure(audience=150, users=20, rate_per_s=100, pokes_each=2)
    assert len(figures) == 4
    assert all(between(0, figure, 10_000) for figure in figures)
    during = [figure.detail for figure in figures if "during" in figure.name]
    assert all(re.search(r"the room heard [1-9][0-9,]* pokes a second", each) for each in during)


async def test_polling() -> None:
    """Every message is pulled by a call that waits or upon a poke, both in a likely time."""
    (figure,) = await polling.measure(clients=10, messages_each=2, rate_per_s=100)
    assert between(-10_000, figure, 10_000)
    assert all(0 < float(ms) < 10_000 for ms in figure.detail.removesuffix(" ms").split(" to "))


async def test_mailbox() -> None:
    """Both stores and their drivers append and pull, and so do those of few and many recipients."""
    size = mailbox.Size(messages=250, active=50, many=200, few=20)
    figures = await mailbox.measure(size=size, calls=600, rounds=2)
    assert len(figures) == 2 * (1 + 3 + 3 + 1)
    assert figures[0].name == "append of 250 messages, SQLite"
    assert all(figure.value > 0 for figure in figures)


# --- the harness: what keeps the figures honest -----------------------------------------------


async def test_a_missing_poke_is_an_error() -> None:
    """The herd counts: a figure is never taken over fewer pokes than were to be delivered."""
    async with child("load send", load_program(), "send", "2") as sender:
        port = int(await sender.line())
        async with herd(port, tokens(2), pokes_at_once=2) as clients:
            sender.tell("1\n")
            await clients.hear(2)
            sender.tell("1\n")
            with pytest.raises(BenchmarkError, match="4 pokes were heard where 5 were sent"):
                await clients.hear(3)


async def test_the_yardstick_checks_tokens() -> None:
    """The websockets server refuses a wrong token, so its handshakes do the same work as ours."""
    async with websockets_server() as server:
        with pytest.raises(BenchmarkError, match="load read has ended"):
            async with herd(server.port, ["not.a.token"]):
                pass


def test_a_target_is_met_or_missed() -> None:
    """The table says for each figure with a target whether it holds."""
    met, missed, neither = bench.table(
        [
            Figure("m", "low", 1.0, "x", at_most=1.0),
            Figure("m", "high", 1.1, "x", at_most=1.0),
            Figure("m", "free", 9.0, "x"),
        ]
    ).splitlines()[1:]
    assert met.endswith("<= 1.0 x  met")
    assert missed.endswith("<= 1.0 x  MISSED")
    assert neither.endswith("9.00 x")


def test_the_command_prints_and_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """``--only`` selects measures, and ``--json`` writes the figures of the table."""

    async def measure() -> Sequence[Figure]:
        return [Figure("noise", "a figure", 0.5, "x", at_most=0.7)]

    file = tmp_path / "figures.json"
    monkeypatch.setitem(bench.MEASURES, "noise", measure)
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "noise", "--json", str(file)])
    bench.main()
    written = json.loads(file.read_text())
    assert [(each["name"], each["met"]) for each in written["figures"]] == [("a figure", True)]
    assert written["machine"]["cores"] >= 1
    assert "a figure" in capsys.readouterr().out
