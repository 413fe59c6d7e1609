"""The command plan."""

import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from xml.etree import ElementTree as ET

import pytest

from pokebridge.bench.plot import _counts, crossing
from pokebridge.cli.plan import _load, _Measured
from pokebridge.costs import Strategy, Workload
from tests.cli.conftest import Run
from tests.support.serving import JWT_SECRET, Instance

SAFE = ["--messages-per-s", "100", "--instances", "10"]
CRITICAL = ["--messages-per-s", "1000", "--instances", "50"]
WITHOUT_MATPLOTLIB = """
import sys
sys.modules["matplotlib"] = None
from pokebridge.cli import main
main(sys.argv[1:])
"""


def test_the_roadmaps_safe_example(run: Run) -> None:
    """1,000 operations a second: the last line says that fan-out is fine, and why."""
    result = run("plan", *SAFE)
    assert result.status == 0
    assert result.err == ""
    last = result.out.splitlines()[-1]
    assert last.startswith("fine: stay with fan-out: 1,000 deliveries/s are 20% of the red line")
    assert "over the red line" not in result.out


def test_the_roadmaps_critical_example(run: Run) -> None:
    """50,000 operations a second, 98% discarded: the last line says to partition, and why."""
    result = run("plan", *CRITICAL)
    assert result.status == 0
    lines = result.out.splitlines()
    assert lines[-1].startswith("critical: partition")
    assert "50,000 deliveries/s are 10 times the red line of 5,000, and 98%" in lines[-1]
    fanout, *_ = (line.split() for line in lines if "fan-out   " in line)
    assert fanout == ["fan-out", "50,000*", "98%", "0%", "0.18-6.43", "50", "100", "453-4,876"]


def test_the_table_fits_a_terminal(run: Run) -> None:
    """Eighty columns hold every figure of the roadmap's critical example, whatever COLUMNS says."""
    table = run("plan", *CRITICAL, COLUMNS="40").out.splitlines()[1:-1]
    assert max(map(len, table)) <= 80
    assert "…" not in "".join(table)


def test_json_has_the_contracts_shape(run: Run) -> None:
    """The JSON has the keys of protocol.md section 6, and every strategy."""
    report = json.loads(run("plan", *CRITICAL, "--json").out)
    promised = {"global_ops_per_s", "discarded_share", "over_red_line"}
    assert promised <= report["fanout"].keys()
    assert promised <= report["partitioned"].keys()
    assert report["fanout"]["global_ops_per_s"] == 50_000
    assert report["fanout"]["discarded_share"] == pytest.approx(0.98)
    assert report["fanout"]["over_red_line"] is True
    assert report["partitioned"]["global_ops_per_s"] == 1000
    assert report["partitioned"]["discarded_share"] == 0
    assert report["partitioned"]["over_red_line"] is False
    assert report["partitioned"]["strategy"] == "pubsub-topic"
    assert report["verdict"] == "critical"
    assert report["advice"].startswith("partition")
    assert report["strategies"].keys() == set(Strategy)
    assert report["measured"] is None


@pytest.mark.parametrize(("engine", "unit"), [("nats", "subject"), ("redis", "channel")])
def test_the_advice_is_for_the_engine(run: Run, engine: str, unit: str) -> None:
    """On NATS there are subjects, on Redis channels, and no bill."""
    report = json.loads(run("plan", *CRITICAL, "--engine", engine, "--json").out)
    assert report["fanout"]["strategy"] == f"{engine}-fanout"
    assert report["partitioned"]["strategy"] == f"{engine}-{unit}"
    assert f"a {unit} a shard" in report["advice"]
    assert "$" not in report["advice"]


def test_every_flag_reaches_the_model(run: Run) -> None:
    """Each changes the load that the model is asked about."""
    flags = {
        "shards": 30,
        "sessions": 5000,
        "misplaced_share": 0.25,
        "recipients_per_session": 3,
        "pokes_per_message": 4,
        "poke_size_bytes": 80,
        "red_line_ops_per_s": 700,
    }
    args = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    args = [arg.replace("_", "-") if arg.startswith("--") else arg for arg in args]
    report = json.loads(run("plan", *SAFE, *args, "--messages-per-request", "7", "--json").out)
    expected = {"messages_per_s": 100, "instances": 10} | flags
    assert report["load"] == expected | {"messages_per_request": {"low": 7, "high": 7}}
    assert report["fanout"]["over_red_line"] is True


def test_pokes_share_messages(run: Run) -> None:
    """A rate of pokes is one of messages that carry several."""
    args = ["--pokes-per-s", "1000", "--pokes-per-message", "10", "--instances", "50"]
    report = json.loads(run("plan", *args, "--json").out)
    assert report["load"]["messages_per_s"] == 100
    assert report["fanout"]["global_ops_per_s"] == 5000


def test_another_price(run: Run) -> None:
    """The bill follows it, and the report says with which prices it was made."""
    usual = json.loads(run("plan", *CRITICAL, "--json").out)
    free = json.loads(run("plan", *CRITICAL, "--usd-per-tib", "0", "--json").out)
    assert usual["prices"]["usd_per_tib"] == 40
    assert f"prices as of {usual['prices']['as_of']}" in run("plan", *CRITICAL).out
    assert free["prices"]["usd_per_tib"] == 0
    assert free["fanout"]["usd_a_month"] == {"low": 0, "high": 0}


def test_settings_are_the_defaults(run: Run, tmp_path: Path) -> None:
    """The configured number of shards and the red line, unless a flag says otherwise."""
    config = tmp_path / "pokebridge.toml"
    config.write_text("shard_count = 40\nred_line_ops_per_s = 900\n")
    args = [*SAFE, "--json", "--config", str(config)]
    load = json.loads(run("plan", *args).out)["load"]
    assert (load["shards"], load["red_line_ops_per_s"]) == (40, 900)
    load = json.loads(run("plan", *args, "--shards", "50").out)["load"]
    assert (load["shards"], load["red_line_ops_per_s"]) == (50, 900)


def test_broken_limits_are_named(run: Run) -> None:
    """What Google would refuse stands under the table, with the strategy's name."""
    out = run("plan", "--messages-per-s", "1", "--instances", "3000", "--shards", "9000").out
    assert "Google Pub/Sub, filter a shard: 12,000 subscriptions, and Google allows" in out


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ([], "--messages-per-s is needed, or --from URL"),
        (["--messages-per-s", "1"], "--instances is needed, or --from URL"),
        (["--messages-per-s", "inf", "--instances", "1"], "'inf' is not a finite number"),
        (["--messages-per-s", "nan", "--instances", "1"], "'nan' is not a finite number"),
        ([*SAFE, "--pokes-per-s", "1"], "--pokes-per-s and --messages-per-s exclude each other"),
        (["--messages-per-s", "-1", "--instances", "1"], "--messages-per-s"),
        (["--messages-per-s", "1", "--instances", "0"], "--instances"),
        (["--messages-per-s", "1e308", "--instances", "1"], "--messages-per-s"),
        (["--messages-per-s", "1", "--instances", "9" * 400], "--instances"),
        ([*SAFE, "--shards", "10001"], "--shards"),
        ([*SAFE, "--plot", "plan.pdf"], "plan.pdf must end in .svg or .png"),
        ([*SAFE, "--plot", "/no/such/directory/plan.svg"], "No such file or directory"),
        ([*SAFE, "--from", "ftp://x"], "must be an http:// or https:// URL"),
    ],
)
def test_a_wrong_use_is_one_line(run: Run, args: list[str], text: str) -> None:
    """One line names what is wrong, and nothing else is printed."""
    result = run("plan", *args)
    assert result.status == 2
    assert result.out == ""
    assert result.err.startswith("pokebridge: ")
    assert result.err.count("\n") == 1
    assert text in result.err


# --- a running cluster --------------------------------------------------------------------------


def test_figures_of_a_running_cluster(run: Run, instance: Instance) -> None:
    """The token is signed or given, and flags replace measured figures."""
    report = json.loads(
        run("plan", "--from", instance.url, "--json", POKEBRIDGE_JWT_SECRET=JWT_SECRET).out
    )
    assert report["measured"]["mode"] == "fanout"
    assert 0 <= report["measured"]["noise_ratio"] <= 1
    assert report["load"]["instances"] == 1
    assert report["load"]["shards"] == 100
    assert report["load"]["red_line_ops_per_s"] == 5000
    token = run("token", "urn:op", "--scope", "admin", POKEBRIDGE_JWT_SECRET=JWT_SECRET).out.strip()
    result = run("plan", "--from", instance.url, "--token", token, *CRITICAL)
    assert "measured in fanout: " in result.out
    assert result.out.splitlines()[-1].startswith("critical: ")


def test_a_token_that_may_not_is_refused_in_one_line(run: Run, instance: Instance) -> None:
    """Without the scope admin."""
    token = run("token", "urn:op", POKEBRIDGE_JWT_SECRET=JWT_SECRET).out.strip()
    result = run("plan", "--from", instance.url, "--token", token)
    assert result.status == 1
    assert "the token was refused (403)" in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("answer", ["{}", '{"traffic": [], "instances": 7}', "[]", "no JSON"])
def test_who_is_no_instance_is_told_in_one_line(run: Run, answer: str) -> None:
    """Something else answers there."""

    class Handler(BaseHTTPRequestHandler):
        """Gives the answer."""

        def do_GET(self) -> None:
            """To everything."""
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.handle_request)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        result = run("plan", "--from", url, "--token", "a.b.c")
        thread.join()
    assert (result.status, result.out, result.err.count("\n")) == (1, "", 1)
    assert "not as an instance of pokebridge" in result.err


def test_what_is_measured_comes_after_flags_and_before_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A flag is a what-if; the cluster knows its own red line better than our settings."""
    monkeypatch.setenv("POKEBRIDGE_RED_LINE_OPS_PER_S", "1")
    figures = {"messages_per_s": 30.0, "instances": 3, "red_line_ops_per_s": 2.0}
    measured = _Measured("nats", "fanout", 0.5, 3.0, figures)
    load = _load({"instances": 7, "sessions": None}, measured, None)
    assert load == Workload(30.0, 7, red_line_ops_per_s=2.0)


# --- the picture --------------------------------------------------------------------------------


def texts(picture: Path) -> set[str]:
    """What is written in an SVG."""
    root = ET.parse(picture).getroot()
    return {element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")}


def test_the_picture_shows_the_line_and_the_crossing(run: Run, tmp_path: Path) -> None:
    """The red line, where it is crossed, and each way of routing, by name."""
    picture = tmp_path / "plan.svg"
    result = run("plan", *CRITICAL, "--plot", str(picture))
    assert (result.status, result.err) == (0, "")
    names = {"fan-out", "filter a shard", "prefix filters", "topic a shard"}
    assert names | {"red line, 5,000/s", "crossed at 6", "50 now"} <= texts(picture)
    assert "subject a shard" not in texts(picture)


def test_the_picture_is_the_same_every_time(run: Run, tmp_path: Path) -> None:
    """So that one in the documentation changes only with the model."""
    one, other = tmp_path / "one.svg", tmp_path / "other.SVG"
    for picture in (one, other):
        run("plan", *CRITICAL, "--plot", str(picture))
    assert one.read_bytes() == other.read_bytes()


def test_a_png_by_its_name(run: Run, tmp_path: Path) -> None:
    """And for NATS, whose cost begins at nothing."""
    picture = tmp_path / "plan.png"
    assert run("plan", *SAFE, "--engine", "nats", "--plot", str(picture)).status == 0
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize(
    "args",
    [("0", "4"), ("0.5", "2"), ("20000", "3"), ("10", "5000"), ("1", "1"), ("1e12", f"{10**12}")],
)
def test_extremes_can_be_drawn(run: Run, tmp_path: Path, args: tuple[str, str]) -> None:
    """No messages, hardly any, one instance, the line crossed by the first or far away."""
    picture = tmp_path / "plan.svg"
    result = run(
        "plan", "--messages-per-s", args[0], "--instances", args[1], "--plot", str(picture)
    )
    assert (result.status, result.err) == (0, "")
    assert "fan-out" in texts(picture)


def test_where_the_line_is_crossed() -> None:
    """By the first number of instances that is over it; at the line is not over."""
    assert crossing(Workload(1000, 50)) == 6
    assert crossing(Workload(999, 50)) == 6
    assert crossing(Workload(1001, 50)) == 5
    assert crossing(Workload(6000, 1)) == 1
    assert crossing(Workload(0, 1)) is None
    assert {1, 6, 50, 100} <= set(_counts(Workload(1000, 50)))


def test_the_extra_is_named_when_it_is_missing(tmp_path: Path) -> None:
    """One line that says what to install, and nothing is drawn."""
    picture = tmp_path / "plan.svg"
    command = [sys.executable, "-c", WITHOUT_MATPLOTLIB, "plan", *SAFE, "--plot", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'pokebridge[plot]'" in done.stderr
    assert not picture.exists()


def test_what_sessions_listen_to_is_planned_for(run: Run) -> None:
    """With a thousand recipients an instance, partitioning saves nothing. The advice says so."""
    listening = [*CRITICAL, "--recipients-per-session", "2"]
    report = json.loads(run("plan", *listening, "--sessions", "50000", "--json").out)
    assert report["load"]["recipients_per_session"] == 2
    assert report["partitioned"]["held_share"] == report["fanout"]["held_share"] == 1
    assert "the recipients that an instance's sessions hear" in report["advice"]
    more = [*listening, "--sessions", "50000", "--shards", "10000", "--json"]
    assert 0.05 < json.loads(run("plan", *more).out)["partitioned"]["held_share"] < 0.15
    refused = run("plan", *listening)
    assert refused.status == 2
    assert "--recipients-per-session needs --sessions" in refused.err
