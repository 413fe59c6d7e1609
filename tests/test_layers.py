"""The architecture's walls, as tests."""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DRIVERS = ("asyncpg", "google", "grpc", "nats", "redis")


def test_imports_go_downward_only() -> None:
    """The layers of ARCHITECTURE.md hold, and the pure core does no I/O (import-linter)."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_each_driver_is_imported_by_one_adapter_of_a_port() -> None:
    """What an engine's driver can do is known to one adapter of each port alone.

    An adapter's files begin with its name: ``redis.py``, ``redis_slots.py``.
    """
    importers = defaultdict(list)
    for path in sorted((ROOT / "src/pokebridge").rglob("*.py")):
        for module in _imported_modules(ast.parse(path.read_text())):
            driver = module.partition(".")[0]
            if driver in DRIVERS and "testing" not in path.parts:
                importers[path.parent.name, driver].append(path.stem.partition("_")[0])
    shared = {key: names for key, names in importers.items() if len(set(names)) > 1}
    assert not shared


def test_no_module_imports_itself_through_others() -> None:
    """There is no import circle, not even one that only a type checker follows."""
    files = {
        _module_name(path): path
        for root in ("src/pokebridge", "simulation")
        for path in (ROOT / root).rglob("*.py")
    }
    imports = {
        name: set(_modules_of(ast.parse(path.read_text()), files)) - {name}
        for name, path in files.items()
    }
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(error.args[1])}")


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[parts[0] == "src" :]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _modules_of(tree: ast.Module, known: Collection[str]) -> Iterator[str]:
    """The modules that ``tree`` imports names from; ``known`` tells modules from other names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else str(node.module) for name in inner]
        else:
            continue
        yield from (name for name in names if name in known)


def _imported_modules(tree: ast.Module) -> list[str]:
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return [
        module
        for node in imports
        for module in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [a.name for a in node.names]
        )
    ]


def test_handle_poke_and_the_session_map_know_nothing_of_phases() -> None:
    """All that they import, however far down, is poke, session and socket (docs/roadmap.md)."""
    ask = (
        "import sys, pokebridge.gateway.bridge, pokebridge.gateway.session_map\n"
        "print(*(name for name in sys.modules if name.startswith('pokebridge.')))"
    )
    result = subprocess.run([sys.executable, "-c", ask], check=True, capture_output=True, text=True)
    imported = {name.removeprefix("pokebridge.") for name in result.stdout.split()}
    assert imported <= {
        "backoff",
        "border",
        "errors",
        "framing",
        "gateway",
        "gateway.audiences",
        "gateway.bridge",
        "gateway.connection",
        "gateway.disconnects",
        "gateway.listener",
        "gateway.meter",
        "gateway.session_map",
        "gateway.wheel",
        "model",
        "session",
        "supervisor",
        "telemetry",
        "wire",
    }
