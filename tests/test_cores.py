"""How many workers `auto` means."""

import os
from pathlib import Path

import pytest

from pokebridge.cores import usable_cores
from pokebridge.errors import ConfigError
from pokebridge.settings import load_settings

CORES = 8


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, CORES),
        ({"cpu.max": "max 100000\n"}, CORES),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "1600000 100000\n"}, CORES),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, CORES),
        ({"cpu.max": "nonsense"}, CORES),
    ],
    ids=["none", "v2-max", "v2-2.5", "v2-half", "v2-more", "v1-3", "v1-max", "nonsense"],
)
def test_the_limit_of_the_cgroup_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int
) -> None:
    """Cores of the affinity, within the limit of either version of cgroups, at least one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CORES)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cores(tmp_path) == cores


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"workers": "0"}, "WORKERS"),
        ({"workers": "many"}, "WORKERS"),
        ({"workers": "2", "roles": "processor"}, "roles"),
        ({"workers": "2", "tracing": "true"}, "tracing"),
    ],
    ids=["0", "many", "processor", "tracing"],
)
def test_what_workers_can_not_do_is_refused(settings: dict[str, str], reason: str) -> None:
    """One line says which setting is in the way."""
    environ = {f"POKEBRIDGE_{name.upper()}": value for name, value in settings.items()}
    with pytest.raises(ConfigError, match=reason):
        load_settings(environ={"POKEBRIDGE_DEV": "1", **environ})
