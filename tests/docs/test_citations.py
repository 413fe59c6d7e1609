"""Every document, section, file and heading that the project cites is in the repository."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {
    ".py",
    ".ts",
    ".tsx",
    ".js",
    ".mjs",
    ".md",
    ".yml",
    ".yaml",
    ".toml",
    ".c",
    ".conf",
    ".cfg",
}
# The folders from which a citation may start, besides the folder of its own file.
BUILT = re.compile(r"(^|/)(dist|build|node_modules|var)/")  # not in the repository
BASES = (
    ROOT,
    ROOT / "docs",
    ROOT / "src" / "pokebridge",
    ROOT / "tests",
    ROOT / "clients" / "js",
    ROOT / "deploy",
)
DOCUMENT = re.compile(r"(?<![\w/.:\"-])((?:[\w.-]+/)*[\w-]+\.md)\b(?:[`)\]]*,? section (\d+))?")
FILE = re.compile(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|ts|js|mjs|toml|c|conf|cfg|yml|yaml|json))`")
LINK_TEXT = re.compile(r"\[[^\]]*\](?=\()")  # the link itself is held by its own test
LINK = re.compile(r"\]\((?!https?://|mailto:)([^)\s]+)\)")
# Titles of documents that no reader of this repository can open.
UNOPENABLE = re.compile(
    r"\bthe seed's?\b|\barchitecture, section \d|\bseed,? section \d", re.IGNORECASE
)


def _tracked() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True
    ).stdout
    paths = (ROOT / name for name in listing.decode().split("\0") if name)
    return [
        path
        for path in paths
        if path.suffix in SOURCES and path.is_file() and path != Path(__file__)
    ]


def _found(name: str, citing: Path) -> Path | None:
    candidates = [citing.parent / name, *(base / name for base in BASES)]
    return next((path for path in candidates if path.exists()), None)


def _broken(path: Path) -> Iterator[str]:
    where = path.relative_to(ROOT)
    for number, line in enumerate(path.read_text().splitlines(), 1):
        for name, section in DOCUMENT.findall(LINK_TEXT.sub("", line)):
            document = _found(name, path)
            if document is None:
                yield f"{where}:{number} cites {name}, which does not exist"
            elif section and not _has_section(document, section):
                yield f"{where}:{number} cites section {section} of {name}, which has none"
        for name in FILE.findall(line):
            if _found(name, path) is None and not BUILT.search(name):
                yield f"{where}:{number} names {name}, which does not exist"


def _has_section(document: Path, number: str) -> bool:
    return re.search(rf"^## {number}\. ", document.read_text(), re.MULTILINE) is not None


def test_every_cited_document_and_file_exists() -> None:
    """A document, a numbered section or a file that a comment or a page names can be opened."""
    assert not [problem for path in _tracked() for problem in _broken(path)]


def test_nothing_cites_what_a_reader_cannot_open() -> None:
    """No sentence refers to a document that is not in the repository."""
    assert not [
        f"{path.relative_to(ROOT)}:{number}"
        for path in _tracked()
        if "simulation" not in path.parts  # its seeds are numbers
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if UNOPENABLE.search(line) and path.name != "simulation.md"
    ]


@pytest.mark.parametrize(
    "path", [path for path in _tracked() if path.suffix == ".md"], ids=lambda path: path.name
)
def test_links_lead_somewhere(path: Path) -> None:
    """A relative link finds its file, and the heading that it names."""
    for target in LINK.findall(path.read_text()):
        name, _, anchor = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), target
        assert not anchor or anchor in _anchors(linked.read_text()), target


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_a_broken_citation_is_found(tmp_path: Path) -> None:
    """The search would find a document, a section and a file that are missing."""
    page = ROOT / "docs" / "README.md"
    text = "see nowhere.md, protocol.md section 99 and `cluster/nowhere.py`"
    problems = [name for name, _ in DOCUMENT.findall(text) if _found(name, page) is None]
    assert problems == ["nowhere.md"]
    assert not _has_section(ROOT / "docs" / "protocol.md", "99")
    assert [name for name in FILE.findall(text) if _found(name, page) is None] == [
        "cluster/nowhere.py"
    ]
    assert UNOPENABLE.search("as the seed's plan has it")
