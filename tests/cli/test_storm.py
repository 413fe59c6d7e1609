"""The storm: a real one in small, and what it says when something goes wrong."""

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pokebridge.bench.fleet import StormInstance
from pokebridge.bench.http_pool import Answer, HttpPool
from pokebridge.bench.storm import storm_failures, storm_table
from pokebridge.bench.traffic import most_in_a_second
from pokebridge.errors import UnavailableError
from tests.cli.conftest import Run
from tests.support import Daemon, free_port
from tests.support.stream_server import stream_server

CLIENTS = 120
LIMIT_PER_S = 30
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def test_a_storm_loses_nobody_and_nothing(
    run_process: Run, nats_server: Daemon, tmp_path: Path
) -> None:
    """One of two instances is killed under traffic. All clients return at the allowed rate."""
    figures, picture = tmp_path / "storm.json", tmp_path / "storm.svg"
    options = {
        "transport": nats_server.url,
        "instances": 2,
        "workers": os.environ.get("TESTED_WORKERS", "1"),
        "clients": CLIENTS,
        "handshakes-per-s": LIMIT_PER_S,
        "messages-per-s": 40,
        "calm-s": 1,
        "restart-s": 0,
        "json": figures,
        "plot": picture,
    }
    args = [f"--{name}={value}" for name, value in options.items()]
    result = run_process("bench", "storm", *args)
    assert result.status == 0, result.err
    report = json.loads(figures.read_text())
    assert report["struck"] > CLIENTS / 4
    assert report["back"] == report["struck"]
    assert report["connected"] == CLIENTS
    messages = report["messages"]
    assert messages["sent"] > 50
    assert (messages["lost"], messages["refused"]) == (0, 0)
    most = report["handshakes"]["most_in_a_second"]
    assert most.keys() == {"instance-1", "instance-2"}
    assert max(most.values()) <= LIMIT_PER_S
    assert report["handshakes"]["by_status"].keys() == {"101", "503"}
    assert report["restarted_s"] > 0
    assert report["others_poke_ms"]["before"]["count"] > 10
    assert min(sample["connected"] for sample in report["samples"]) < CLIENTS
    assert all({"instance-1", "load generator"} <= each["cpu"].keys() for each in report["samples"])
    assert f"{report['back']} of {report['struck']} have pulled" in result.out
    assert picture.read_text().count("</svg>") == 1
    assert f"{CLIENTS} of {CLIENTS} connected" in result.err


# --- in one line ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "status", "text"),
    [
        ([], 2, "Missing option '--transport'"),
        (["--transport", "memory://"], 2, "--transport: memory:// does not reach another process"),
        (["--transport", "nats://x", "--clients", "100000000"], 2, "--clients: at most"),
        (["--transport", "nats://x", "--plot", "storm.pdf"], 2, "must end in .svg or .png"),
    ],
)
def test_what_can_not_be_done_is_said_in_a_line(
    run: Run, args: list[str], status: int, text: str
) -> None:
    """Nothing else is printed, but for the progress."""
    result = run("bench", "storm", *args)
    assert (result.status, result.out) == (status, "")
    last = result.err.splitlines()[-1]
    assert last.startswith("pokebridge: ")
    assert text in last


def test_options_at_the_wrong_place_are_not_ignored(run: Run) -> None:
    """Before its name they would be those of bench."""
    result = run("bench", "--clients", "5", "storm", "--transport", "nats://x")
    assert (result.status, result.out) == (2, "")
    assert result.err == "pokebridge: options of storm come after its name\n"


async def test_an_instance_that_does_not_start_has_the_last_word(tmp_path: Path) -> None:
    """Its last output is shown as the reason why there is no storm."""
    command = [sys.executable, "-c", "print('so be it\\nI quit')"]
    instance = StormInstance("instance-1", free_port(), command, tmp_path / "log")
    with pytest.raises(UnavailableError, match=r"^instance-1 has ended by itself: I quit$"):
        await instance.start("secret")


def test_without_the_library_nothing_is_started(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that can't be drawn is said before the storm, not after it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("bench", "storm", "--transport", "nats://127.0.0.1:1", "--plot", "storm.svg")
    assert result.status == 2
    assert result.err.count("\n") == 1
    assert "pokebridge[plot]" in result.err


def report_of(**changes: Any) -> dict[str, Any]:
    """A storm that went well, but for ``changes``."""
    times = {"count": 1, "p50": 1.0, "p99": 2.0, "max": 3.0}
    return {
        "clients": 9,
        "instances": 3,
        "killed": "instance-3",
        "struck": 3,
        "back": 3,
        "back_s": 4.0,
        "connected": 9,
        "messages": {"sent": 5, "resent": 0, "refused": 0, "lost": 0},
        "probe": {"sent": 9, "lost": 0},
        "handshakes": {"limit_per_s": 5, "most_in_a_second": {}, "by_status": {}},
        "others_poke_ms": {"before": times, "storm": times, "after": dict.fromkeys(times)},
        "silence_s": {"struck": 4.0, "others": 0.1},
        "machine": {"cores": 2, "load_before": 0.5},
    } | changes


def test_a_storm_that_went_well_is_no_failure() -> None:
    """And its table has what did not happen, too."""
    report = report_of()
    assert storm_failures(report) == []
    assert "2.0 ms storm, -" in storm_table(report)


def test_lost_clients_and_lost_messages_are_failures() -> None:
    """Each is named."""
    messages = {"sent": 5, "resent": 0, "refused": 0, "lost": 2}
    report = report_of(back=1, back_s=None, connected=7, messages=messages)
    clients, lost = storm_failures(report)
    assert clients.startswith("7 of 9 clients are connected")
    assert lost == "2 messages were lost"
    assert "all never" in storm_table(report)


# --- the rate -------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.floats(0, 3), st.floats(0, 1.5)).map(lambda pair: (pair[0], sum(pair))),
        max_size=30,
    )
)
def test_what_passed_in_a_second_is_what_lies_in_one(handshakes: list[tuple[float, float]]) -> None:
    """As counted for each second that could have the most: one that ends with an answer."""
    spans = [(answered - 1, asked) for asked, answered in handshakes]
    counts = [sum(first <= at < last for first, last in spans) for at, _ in spans]
    assert most_in_a_second(handshakes) == max(counts, default=0)


def test_who_waits_long_for_an_answer_proves_nothing() -> None:
    """A hundred that were answered together may have passed one after the other."""
    assert most_in_a_second([(n / 100, 1.0) for n in range(100)]) < 100
    assert most_in_a_second([(0.0, 2.0)] * 100) == 0
    assert most_in_a_second([(0.1, 0.2)] * 100) == 100


# --- requests -------------------------------------------------------------------------------------


async def fetch(pool: HttpPool, path: str) -> Answer | None:
    """One request through ``pool``."""
    answered = asyncio.get_running_loop().create_future()
    pool.send(f"GET {path} HTTP/1.1\r\n\r\n".encode(), answered.set_result)
    async with asyncio.timeout(5):
        answer: Answer | None = await answered
    return answer


async def test_requests_share_a_few_connections() -> None:
    """Many more than there are, and each gets the answer to its own."""
    connections = 0

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while line := await reader.readline():
            await reader.readline()
            path = line.split()[1]
            head = f"HTTP/1.1 200 OK\r\nRetry-After: 7\r\nContent-Length: {len(path)}\r\n\r\n"
            writer.write(head.encode() + path)

    async with stream_server(echo) as port:
        pool = HttpPool(port, 3)
        answers = await asyncio.gather(*(fetch(pool, f"/{n}") for n in range(50)))
        assert answers == [Answer(200, f"/{n}".encode(), 7.0) for n in range(50)]
        assert connections == 3
        pool.close()


async def test_a_connection_that_breaks_is_told_and_replaced() -> None:
    """Whose request was under way hears of it; those in line get another connection."""

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")

    async with stream_server(hang_up) as port:
        pool = HttpPool(port, 1)
        assert await asyncio.gather(*(fetch(pool, "/") for _ in range(5))) == [None] * 5
        pool.close()


async def test_nobody_waits_for_an_instance_that_is_gone() -> None:
    """All in line hear that no connection can be had."""
    pool = HttpPool(free_port(), 2)
    assert await asyncio.gather(*(fetch(pool, "/") for _ in range(5))) == [None] * 5
