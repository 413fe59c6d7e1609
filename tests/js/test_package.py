"""What is published: small, alone, typed, and of the same behaviour as the Python client."""

import gzip
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pokebridge import console
from tests.support.missing import require

VENDORED = Path(console.__file__).parent / "static/vendor/pokebridge-client/index.js"
VECTORS = Path(__file__).parents[1] / "vectors" / "client"
MAX_GZIPPED_BYTES = 11 * 1024


def npm(directory: Path, *arguments: str) -> str:
    """What an npm command prints."""
    done = subprocess.run(
        [require("npm"), *arguments], cwd=directory, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def manifest(client_package: Path) -> dict[str, Any]:
    """``package.json``."""
    return dict(json.loads((client_package / "package.json").read_text()))


def test_the_core_does_what_the_scenarios_say(client_package: Path) -> None:
    """Every scenario that the Python client's core passes, run by Node's own test runner."""
    files = [*VECTORS.glob("*.json"), *(VECTORS.parent / "listening").glob("*.json")]
    scenarios = sum(len(json.loads(path.read_text())["scenarios"]) for path in files)
    assert scenarios > 100
    report = npm(client_package, "test", "--silent")
    assert f"# pass {scenarios}\n" in report


def test_types(client_package: Path) -> None:
    """The sources and the API as its users call it, wrong calls included."""
    tsc = client_package / "node_modules" / ".bin" / "tsc"
    subprocess.run([tsc], cwd=client_package, check=True)


def test_size(client_package: Path) -> None:
    """The whole client, as a browser loads it."""
    dist = client_package / "dist"
    client = len(gzip.compress((dist / "index.js").read_bytes()))
    hook = len(gzip.compress((dist / "react.js").read_bytes()))
    assert client + hook < MAX_GZIPPED_BYTES


def test_it_needs_nothing_else(client_package: Path, manifest: dict[str, Any]) -> None:
    """No dependency at run time: the peers are there for those who want them."""
    assert "dependencies" not in manifest
    assert all(peer["optional"] for peer in manifest["peerDependenciesMeta"].values())
    assert manifest["peerDependencies"].keys() == manifest["peerDependenciesMeta"].keys()
    assert "import" not in (client_package / "dist" / "index.js").read_text()


def test_what_is_packed(client_package: Path, manifest: dict[str, Any]) -> None:
    """Every file that the manifest names is in the package, and no source, test or build."""
    packed = json.loads(npm(client_package, "pack", "--dry-run", "--json", "--ignore-scripts"))
    package = packed[0] if isinstance(packed, list) else packed[manifest["name"]]
    files = {file["path"] for file in package["files"]}
    named = {path.removeprefix("./") for path in _paths(manifest["exports"])}
    named |= {manifest["main"].removeprefix("./"), manifest["types"].removeprefix("./")}
    assert named <= files
    assert {path for path in files if not path.startswith("dist/")} == {
        "LICENSE",
        "README.md",
        "package.json",
    }


def _paths(ways: Any) -> Iterator[str]:
    if isinstance(ways, str):
        yield ways
    else:
        for way in ways.values():
            yield from _paths(way)


USE = """
import { connect, type Client } from "@pokebridge/client";
import { usePokebridge } from "@pokebridge/client/react";
import { Publisher, type Receipt } from "@pokebridge/client/server";

export const client: Client = connect({ url: "https://a", token: "a.b.c", onPoke: () => {} });
export const hook: (options: null) => string = usePokebridge;
const publisher = new Publisher({ url: "https://a", token: "a" });
export const sent: Promise<Receipt> = publisher.send("bob", 1);
// @ts-expect-error: the types are there, so this is found
client.nothing();
"""


@pytest.mark.parametrize(
    ("compiler", "module", "resolution", "name"),
    [
        ("typescript", "esnext", "bundler", "use.ts"),
        pytest.param("typescript", "nodenext", "nodenext", "use.mts", marks=pytest.mark.long),
        ("typescript", "nodenext", "nodenext", "use.cts"),
        pytest.param("typescript-5", "node16", "node16", "use.cts", marks=pytest.mark.long),
        ("typescript-5", "commonjs", "node", "use.ts"),
    ],
)
def test_types_resolve(
    client_package: Path, tmp_path: Path, compiler: str, module: str, resolution: str, name: str
) -> None:
    """TypeScript finds the types of all three entries, however a project resolves modules."""
    installed = client_package / "node_modules"
    modules = tmp_path / "node_modules"
    (modules / "@pokebridge").mkdir(parents=True)
    (modules / "@types").symlink_to(installed / "@types")
    (modules / "csstype").symlink_to(installed / "csstype")
    package = modules / "@pokebridge" / "client"
    package.mkdir()
    shutil.copy(client_package / "package.json", package)
    (package / "dist").symlink_to(client_package / "dist")
    (tmp_path / name).write_text(USE)
    flags = ["--module", module, "--moduleResolution", resolution, "--target", "es2022"]
    checks = ["--noEmit", "--strict", "--types", "node", name]
    tsc = next((installed / compiler / "bin").glob("tsc*"))
    command = [require("node"), str(tsc), *flags, *checks]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_pack_builds(client_package: Path, tmp_path: Path) -> None:
    """``npm pack`` in a checkout that was never built makes a package with the code in it."""
    checkout = tmp_path / "js"
    leave_out = shutil.ignore_patterns("dist", "build", "node_modules")
    shutil.copytree(client_package, checkout, ignore=leave_out)
    (checkout / "node_modules").symlink_to(client_package / "node_modules")
    npm(checkout, "pack", "--silent")
    with tarfile.open(next(checkout.glob("*.tgz"))) as package:
        assert {"package/dist/index.js", "package/dist/index.d.cts"} <= set(package.getnames())


def test_the_pages_use_this_client(client_package: Path, tmp_path: Path) -> None:
    """The vendored copy of the console and the playground equals a fresh build."""
    node = require("node")
    subprocess.run([node, "build.mjs", "vendor", tmp_path], cwd=client_package, check=True)
    current = (tmp_path / "index.js").read_bytes()
    assert current == VENDORED.read_bytes(), "run `npm run vendor` in clients/js"
    assert current.startswith(b"/*! @pokebridge/client ")
