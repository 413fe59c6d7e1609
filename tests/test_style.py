"""The style's rules that no linter knows, as tests."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 500

# Written so that these patterns don't match this file.
FORBIDDEN = re.compile(
    r"https?://[a-z.]*(pythonhosted|pypi|npmjs|debian)\.[a-z]+"  # a registry's host
    r"|(^|[^\w.])/(w[o]rk|r[o]ot)/"  # a path of one machine
)
DURATION = re.compile(
    r"(^|_)(age|deadline|delay|duration|interval|lease|linger|period|timeout|ttl)$"
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _trees(*globs: str) -> Iterator[tuple[Path, ast.Module]]:
    for pattern in globs:
        for path in sorted(ROOT.glob(pattern)):
            if "node_modules" not in path.parts:
                yield path.relative_to(ROOT), ast.parse(path.read_text())


def _functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def _tracked_files() -> list[Path]:
    """What is in the repository, and what is about to be."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [path for name in listing.split("\0") if name and (path := ROOT / name).is_file()]


def test_every_module_says_what_it_is() -> None:
    """Every Python file with something in it begins with a docstring."""
    silent = [
        str(path)
        for path, tree in _trees("src/**/*.py", "tests/**/*.py", "benchmarks/**/*.py")
        if tree.body and not ast.get_docstring(tree)
    ]
    assert not silent


def test_every_test_says_what_it_proves() -> None:
    """Every test function has a docstring, those of the shipped contract suites included."""
    silent = [
        f"{path}:{function.lineno} {function.name}"
        for path, tree in _trees("tests/**/test_*.py", "src/pokebridge/testing/*.py")
        for function in _functions(tree)
        if function.name.startswith("test_") and not ast.get_docstring(function)
    ]
    assert not silent


def test_functions_fit_a_screen() -> None:
    """No function of the sources is longer than a screen."""
    long = [
        f"{path}:{function.lineno} {function.name}: {lines} lines"
        for path, tree in _trees("src/**/*.py")
        for function in _functions(tree)
        if (lines := (function.end_lineno or 0) - function.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not long


def test_files_hold_one_idea() -> None:
    """No file of the sources is longer than a reader's patience."""
    long = {
        str(path.relative_to(ROOT)): lines
        for path in SRC.rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > MAX_FILE_LINES
    }
    assert not long


def test_durations_end_in_their_unit() -> None:
    """A number that is a span of time says its unit last: ``timeout_s``."""
    unitless = [
        f"{path}:{line} {name}"
        for path, tree in _trees("src/**/*.py")
        for name, line in _declared_numbers(tree)
        if DURATION.search(name.lower())
    ]
    assert not unitless


def _declared_numbers(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            name, annotation = node.arg, node.annotation
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name, annotation = node.target.id, node.annotation
        else:
            continue
        if annotation and re.search(r"\b(int|float|_?Seconds)\b", ast.unparse(annotation)):
            yield name, node.lineno


def test_nothing_names_a_registry_or_this_machine() -> None:
    """No tracked file holds a package registry's host or a path that only one machine has."""
    named = []
    for path in _tracked_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # a picture or the like
        named += [
            f"{path.relative_to(ROOT)}:{number}"
            for number, line in enumerate(text.splitlines(), 1)
            if FORBIDDEN.search(line)
        ]
    assert not named


@pytest.mark.parametrize(
    "line",
    ["index = https://files.python" + "hosted.org/x", "see /wor" + "k/x", "cd (/roo" + "t/x)"],
)
def test_the_forbidden_is_recognised(line: str) -> None:
    """The search above would find what it looks for."""
    assert FORBIDDEN.search(line)


@pytest.mark.parametrize(
    ("name", "at_least"),
    [("requirements.lock", 50), ("requirements-run.lock", 20), ("requirements-helm.lock", 1)],
)
def test_a_lock_is_hashed_and_names_no_index(name: str, at_least: int) -> None:
    """Every locked release is pinned, with hashes, and the lock works with any mirror."""
    lock = (ROOT / name).read_text()
    assert "://" not in lock
    requirements = re.split(r"\n(?=\S)", lock.strip())
    assert len(requirements) > at_least
    unpinned = [
        requirement.splitlines()[0]
        for requirement in requirements
        if not re.match(r"[a-z0-9-]+==\S+ ", requirement) or "--hash=sha256:" not in requirement
    ]
    assert not unpinned


def test_both_locks_name_the_same_releases() -> None:
    """`make run` installs the releases that the tests use."""
    every, run = (
        set(re.findall(r"^\S+==\S+", (ROOT / name).read_text(), re.MULTILINE))
        for name in ("requirements.lock", "requirements-run.lock")
    )
    assert run < every
