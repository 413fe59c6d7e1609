"""The wheel, built here and installed into an environment that has nothing else."""

import json
import subprocess
import sys
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "pokebridge",
    "pokebridge.api",
    "pokebridge.bench",
    "pokebridge.cli",
    "pokebridge.client",
    "pokebridge.cluster",
    "pokebridge.console",
    "pokebridge.coordination",
    "pokebridge.engines",
    "pokebridge.fallback",
    "pokebridge.gateway",
    "pokebridge.ingress",
    "pokebridge.mailbox",
    "pokebridge.server",
    "pokebridge.testing",
    "pokebridge.testing.pubsub",
    "pokebridge.transport",
    "pokebridge.workers",
}
_ASK = """
import importlib.util, json, pathlib, sys
import pokebridge, pokebridge.testing
root = pathlib.Path(pokebridge.__file__).parents[1]
files = [str(each.relative_to(root)) for each in root.rglob("*") if each.is_file()]
strangers = [name for name in ("tests", "simulation", "benchmarks", "pytest")
             if importlib.util.find_spec(name)]
json.dump({"root": str(root), "files": files, "strangers": strangers}, sys.stdout)
"""


def _run(*command: object) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site-packages of an empty environment into which the wheel was installed."""
    directory = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", directory)
    (wheel,) = directory.glob("*.whl")
    python = directory / "env/bin/python"
    _run(sys.executable, "-m", "venv", "--without-pip", directory / "env")
    uv = Path(sys.executable).with_name("uv")
    _run(uv, "pip", "install", "--python", python, "--offline", "--no-deps", "--no-index", wheel)
    found = json.loads(_run(python, "-I", "-B", "-c", _ASK))
    assert found["strangers"] == []
    return Path(found["root"])


def _files(directory: Path) -> set[str]:
    return {
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def _metadata(installed: Path) -> tuple[Path, Message]:
    (directory,) = installed.glob("pokebridge-*.dist-info")
    return directory, Parser().parsestr((directory / "METADATA").read_text())


def test_it_holds_the_package_and_nothing_else(installed: Path) -> None:
    """Every file of src/pokebridge is in it; no tests, no simulation, no benchmarks."""
    assert _files(installed / "pokebridge") == _files(ROOT / "src/pokebridge")
    info, _ = _metadata(installed)
    others = {each.name for each in installed.iterdir()}
    assert others == {"pokebridge", info.name}


def test_it_has_these_packages(installed: Path) -> None:
    """A package that comes or goes is meant to: add it here too."""
    found = {
        ".".join(path.parent.relative_to(installed).parts)
        for path in (installed / "pokebridge").rglob("__init__.py")
    }
    assert found == PACKAGES


def test_it_brings_its_license_types_and_command(installed: Path) -> None:
    """LICENSE and NOTICE come with it, type checkers read it, and it has the command."""
    info, metadata = _metadata(installed)
    assert {"LICENSE", "NOTICE"} <= {path.name for path in (info / "licenses").iterdir()}
    assert set(metadata.get_all("License-File", [])) == {"LICENSE", "NOTICE"}
    assert (installed / "pokebridge/py.typed").exists()
    assert "pokebridge = pokebridge.cli:main" in (info / "entry_points.txt").read_text()


def test_the_extra_testing_names_pytest(installed: Path) -> None:
    """The contract suites need pytest, which no other user of the wheel has to install."""
    _, metadata = _metadata(installed)
    needed = [each for each in metadata.get_all("Requires-Dist", []) if "pytest" in each]
    assert {each.partition(">=")[0] for each in needed} == {"pytest", "pytest-asyncio"}
    assert all("extra == 'testing'" in each for each in needed)
