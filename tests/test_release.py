"""``make release``: all that a release consists of, and nothing is uploaded."""

import hashlib
import json
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.missing import require
from tests.support.npm import CLIENT, ROOT
from tools.release import CHART, ReleaseError, release, sbom, set_version

VERSION = "9.8.7"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What is committed, in a clone, with the tools of the client's build."""
    root = tmp_path / "checkout"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(root)], check=True)
    (root / "clients/js/node_modules").symlink_to(CLIENT / "node_modules")
    (root / ".git/info/exclude").write_text("node_modules\n")  # a link is no directory to git
    return root


@pytest.mark.long
def test_a_release_is_built(checkout: Path) -> None:
    """Wheel, source and npm package have the version and the licence; the sums are right."""
    require("npm")
    folder = release(checkout, VERSION)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        f"pokebridge-{VERSION}-py3-none-any.whl",
        f"pokebridge-{VERSION}.tar.gz",
        f"pokebridge-client-{VERSION}.tgz",
        f"pokebridge-{VERSION}.cdx.json",
        "SHA256SUMS",
    }
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    with zipfile.ZipFile(folder / f"pokebridge-{VERSION}-py3-none-any.whl") as wheel:
        inside = set(wheel.namelist())
    licences = f"pokebridge-{VERSION}.dist-info/licenses"
    assert {f"{licences}/LICENSE", f"{licences}/NOTICE", "pokebridge/py.typed"} <= inside
    assert "pokebridge/console/static/console/index.html" in inside
    assert not [name for name in inside if name.startswith(("tests", "simulation", "tools"))]
    with tarfile.open(folder / f"pokebridge-client-{VERSION}.tgz") as package:
        manifest = package.extractfile("package/package.json")
        assert manifest is not None
        assert json.load(manifest)["version"] == VERSION
        assert {"package/dist/server.js", "package/dist/server.cjs", "package/LICENSE"} <= set(
            package.getnames()
        )
    with pytest.raises(ReleaseError, match="exists"):
        release(checkout, VERSION)


def test_the_version_is_set_everywhere(tmp_path: Path) -> None:
    """It is set once in both packages, the chart and the changelog. An empty changelog fails."""
    (tmp_path / "clients/js").mkdir(parents=True)
    (tmp_path / CHART).parent.mkdir(parents=True)
    names = ("pyproject.toml", "CHANGELOG.md", "clients/js/package.json", str(CHART))
    for name in (*names, "clients/js/package-lock.json"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    set_version(tmp_path, VERSION, "2030-01-02")
    for name in names:
        assert VERSION in (tmp_path / name).read_text()
    assert (
        f"## [Unreleased]\n\n## [{VERSION}] - 2030-01-02\n"
        in (tmp_path / "CHANGELOG.md").read_text()
    )
    with pytest.raises(ReleaseError, match="has a section for"):
        set_version(tmp_path, VERSION, "2030-01-02")
    with pytest.raises(ReleaseError, match="say what is new"):
        set_version(tmp_path, "9.9.9", "2030-01-02")


def test_the_bill_names_what_the_lock_names() -> None:
    """Every dependency that `make run` installs, with its hashes."""
    lock = (ROOT / "requirements-run.lock").read_text()
    components = {each["name"]: each for each in sbom(lock, VERSION)["components"]}
    assert {"uvicorn", "msgspec", "pyjwt"} <= components.keys()
    assert all(each["hashes"] for each in components.values())


@pytest.mark.parametrize("version", ["", "1.2", "v1.2.3", "1.2.3rc1"])
def test_what_is_no_version(version: str) -> None:
    """It is refused before anything is touched."""
    with pytest.raises(ReleaseError, match="must be like"):
        release(ROOT, version)


def test_the_image_has_what_the_build_reads() -> None:
    """The files that pyproject.toml names for the wheel are copied into the image's build."""
    copied = (ROOT / "Dockerfile").read_text()
    assert "COPY README.md LICENSE NOTICE ./" in copied
