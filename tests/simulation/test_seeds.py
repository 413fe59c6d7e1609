"""A few hundred worlds with much bad luck, and the proof that a seed tells one story only."""

import os
import subprocess
import sys
from random import Random

import pytest

from simulation import faults
from simulation.runner import simulate
from simulation.summary import report
from simulation.world import draw_config

SEEDS = 200
PARTS = 8
TOLD_TWICE = range(3)
_DIGESTS = (
    "from simulation.runner import simulate\n"
    f"print(*(simulate(seed).digest for seed in {TOLD_TWICE!r}))"
)


@pytest.mark.parametrize(
    "part", [0, 1, 2, *(pytest.param(part, marks=pytest.mark.long) for part in range(3, PARTS))]
)
def test_every_invariant_holds(part: int) -> None:
    """The fixed seeds; ``make simulate`` runs as many as one likes."""
    for seed in range(part, SEEDS, PARTS):
        outcome = simulate(seed)
        assert outcome.violation is None, "\n".join(report(outcome))


def test_the_same_seed_tells_the_same_story() -> None:
    """Twice here, and in a new process with another hash seed, every line is the same."""
    here = [simulate(seed).digest for seed in TOLD_TWICE]
    assert [simulate(seed).digest for seed in TOLD_TWICE] == here
    assert len(set(here)) == len(here)
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    elsewhere = subprocess.run(
        [sys.executable, "-c", _DIGESTS],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert elsewhere.stdout.split() == here


def test_worlds_differ() -> None:
    """The fixed seeds have every kind of fault, both modes, both ways to assign, many sizes."""
    configs = [draw_config(Random(seed), faults.ALL) for seed in range(SEEDS)]
    assert {config.mode for config in configs} == {"fanout", "partitioned"}
    assert {config.assignment for config in configs} == {"coordinator", "ring"}
    assert {config.instances for config in configs} == {2, 3, 4, 5}
    assert {config.workers for config in configs} == {1, 2, 3}
    kinds = [set(config.faults) for config in configs]
    assert min(sum(kind in each for each in kinds) for kind in set.union(*kinds)) > SEEDS / 4


def test_a_failure_says_how_to_replay_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report has the seed, the invariant, the time, the last events and the command."""
    monkeypatch.setattr("simulation.invariants.SILENCE_BOUND_S", 0.001)
    outcome = simulate(7)
    assert outcome.violation is not None
    said = "\n".join(report(outcome))
    assert "no silence" in said
    assert f"{outcome.violation.at_s:.4f}" in said
    assert "commits" in said
    assert "make simulate FROM=7 SEEDS=1" in said
