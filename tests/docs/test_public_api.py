"""What is public is listed in docs/api.md, and does not change without a line in the CHANGELOG."""

import re
import shutil
import zipfile
from pathlib import Path

import griffe
import pytest

from tools import api_docs

ROOT = Path(__file__).parents[2]
RELEASE = ROOT / "tests" / "compat" / "pokebridge-0.1.0-py3-none-any.whl"


@pytest.fixture(scope="module")
def package() -> griffe.Module:
    """The sources, read and not imported."""
    return api_docs.load()


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> griffe.Module:
    """The last release."""
    folder = tmp_path_factory.mktemp("release")
    zipfile.ZipFile(RELEASE).extractall(folder)
    return api_docs.load(folder)


def test_the_page_is_the_codes(package: griffe.Module) -> None:
    """docs/api.md is what `make docs` makes of the sources."""
    assert api_docs.PAGE.read_text() == api_docs.render(package), "run `make docs`"


def test_everything_public_is_explained(package: griffe.Module) -> None:
    """Each public module has an ``__all__``, and each public name a docstring."""
    for name in api_docs.PUBLIC:
        assert package[name.removeprefix("pokebridge.")].exports, f"{name} has no __all__"
    silent = [name for name, found in api_docs.public_objects(package) if found.docstring is None]
    assert not silent


def test_a_change_of_the_public_surface_is_in_the_changelog(
    package: griffe.Module, release: griffe.Module
) -> None:
    """A public name that was added, or broken since the last release, is named under Unreleased."""
    unreleased = (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1]
    words = set(re.findall(r"\w+", unreleased))
    missing = {name for name in _changed(package, release) if name.rpartition(".")[2] not in words}
    assert not missing, "name them in CHANGELOG.md, under Unreleased"


def _changed(package: griffe.Module, release: griffe.Module) -> set[str]:
    """Names that were added, removed, or changed so that a caller breaks.

    Release 0.1.0 said only of some modules what is public: for the others the present list holds.
    """
    exports = api_docs.exports_of(package)
    old = {name: names or exports[name] for name, names in api_docs.exports_of(release).items()}
    before, after = api_docs.surface(release, old), api_docs.surface(package)
    public = {found.path for _, found in api_docs.public_objects(release, old)}
    broken = {
        breakage.obj.path
        for breakage in griffe.find_breaking_changes(release, package)
        if _is_within(breakage.obj.path, public)
    }
    return (before ^ after) | broken


def _is_within(path: str, objects: set[str]) -> bool:
    """Whether ``path`` is public; the checks of a contract suite are not, though they are in it."""
    parent, _, name = path.rpartition(".")
    return path in objects or (parent in objects and not name.startswith(("_", "test_")))


def test_a_change_is_noticed(package: griffe.Module, tmp_path: Path) -> None:
    """A removed name, an added one and a changed signature would be found."""
    source = tmp_path / "pokebridge"
    shutil.copytree(ROOT / "src" / "pokebridge", source, ignore=shutil.ignore_patterns("static"))
    client = source / "client" / "shell.py"
    text = client.read_text()
    assert "    async def wait_stopped(self)" in text
    client.write_text(
        text.replace("    async def wait_stopped(self)", "    async def wait_ended(self, why: str)")
    )
    changed = {name.rpartition(".")[2] for name in _changed(api_docs.load(tmp_path), package)}
    assert changed == {"wait_stopped", "wait_ended"}
