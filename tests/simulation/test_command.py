"""``make simulate``: the command behind it."""

import json
import subprocess
import sys

import pytest

from simulation import __main__ as command
from simulation.runner import simulate


def test_the_figures_are_those_of_the_seeds_on_any_number_of_processes() -> None:
    """Two processes share the seeds; the JSON on standard output adds them all up."""
    asked = ["--from", "5", "--seeds", "3", "--jobs", "2", "--json"]
    run = subprocess.run(
        [sys.executable, "-m", "simulation", *asked],
        check=True,
        capture_output=True,
        text=True,
    )
    figures = json.loads(run.stdout)
    outcomes = [simulate(seed) for seed in (5, 6, 7)]
    assert figures["seeds"] == 3
    assert figures["failures"] == []
    for name in ("callbacks", "messages", "deliveries", "lost", "doubled", "moves"):
        assert figures[name] == sum(getattr(outcome, name) for outcome in outcomes)
    silences_s = [silence_s for outcome in outcomes for silence_s in outcome.silences_s]
    assert figures["silence_s"]["max"] == round(max(silences_s), 3)


def test_a_failure_is_an_exit_status_and_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One seed that breaks an invariant is enough; the others still run."""
    monkeypatch.setattr("simulation.invariants.SILENCE_BOUND_S", 0.001)
    monkeypatch.setattr(sys, "argv", ["simulation", "--from", "7", "--seeds", "2"])
    monkeypatch.setattr("gc.freeze", lambda: None)
    monkeypatch.setattr("gc.set_threshold", lambda *_: None)
    assert command.main() == 1
    said = capsys.readouterr()
    assert "make simulate FROM=7 SEEDS=1" in said.err
    assert said.out.startswith("2 seeds, 2 failed")


def test_a_trace_can_be_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that happens in one seed, from its world to its end."""
    monkeypatch.setattr(sys, "argv", ["simulation", "--from", "7", "--trace"])
    assert command.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert "Config(" in lines[0]
    assert "callbacks" in lines[-1]
