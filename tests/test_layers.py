"""The architecture's walls, as tests."""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
DRIVERS = ("asyncpg", "google", "grpc", "nats", "redis")


def test_imports_go_downward_only() -> None:
    """The layers of ARCHITECTURE.md hold, and the pure core does no I/O (import-linter)."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_each_driver_is_imported_in_one_file_of_a_port() -> None:
    """What an engine's driver can do is known to one adapter alone: one file in each port."""
    importers = defaultdict(list)
    for path in sorted((ROOT / "src/pokebridge").rglob("*.py")):
        for module in _imported_modules(ast.parse(path.read_text())):
            driver = module.partition(".")[0]
            if driver in DRIVERS and "testing" not in path.parts:
                importers[path.parent.name, driver].append(path.name)
    shared = {key: files for key, files in importers.items() if len(set(files)) > 1}
    assert not shared


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
        "errors",
        "framing",
        "gateway",
        "gateway.bridge",
        "gateway.connection",
        "gateway.meter",
        "gateway.session_map",
        "gateway.wheel",
        "model",
        "session",
        "telemetry",
        "wire",
    }
