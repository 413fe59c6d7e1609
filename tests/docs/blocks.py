"""The code blocks of all pages, and the commands in them."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"(?:^    .*\n)+", re.MULTILINE)
_SHELL = re.compile(
    r"^(?:export \w+=|make \w|curl |(?:\w+=\S+ )*(?:\.venv/bin/)?pokebridge )", re.MULTILINE
)
_RANDOM = re.compile(r"\$\((openssl rand [^()]*)\)")
_ASSIGNMENT = re.compile(r"(\w+)=(.*)", re.DOTALL)


class Block(NamedTuple):
    """A fenced block, or an indented one with a command that a reader of ours types."""

    page: Path
    language: str
    text: str


class Command(NamedTuple):
    """A ``pokebridge`` command as a page prints it, and the variables that it finds set."""

    page: Path
    arguments: tuple[str, ...]
    variables: dict[str, str]


def pages() -> list[Path]:
    """Every page that a user reads."""
    folders = (ROOT / "docs", ROOT / "examples", ROOT / "deploy", ROOT / "clients" / "js")
    nested = (page for folder in folders for page in sorted(folder.rglob("*.md")))
    return [*sorted(ROOT.glob("*.md")), *(page for page in nested if not _is_foreign(page))]


def _is_foreign(page: Path) -> bool:
    return "node_modules" in page.parts


def blocks(page: Path) -> list[Block]:
    """The blocks of ``page``, in order."""
    text = page.read_text()
    found = [(each.start(), each[1], each[2]) for each in _FENCE.finditer(text)]
    rest = _FENCE.sub(lambda fenced: "\n" * len(fenced[0]), text)  # every position stays
    for each in _INDENTED.finditer(rest):
        body = re.sub("^    ", "", each[0], flags=re.MULTILINE)
        if _SHELL.search(body):
            found.append((each.start(), "sh", body))
    return [Block(page, language, body) for _, language, body in sorted(found)]


def all_blocks(language: str) -> list[Block]:
    """The blocks in ``language`` of all pages."""
    return [block for page in pages() for block in blocks(page) if block.language == language]


def commands(page: Path) -> Iterator[Command]:
    """The ``pokebridge`` commands of ``page``, as one shell runs its blocks in order."""
    exported: dict[str, str] = {}
    for block in blocks(page):
        if block.language == "sh":
            for line in _lines(block.text):
                yield from _commands_in(page, line, exported)


def _lines(script: str) -> list[str]:
    """Its lines, with those that a backslash continues put together, and those in ``$( … )``."""
    text = _RANDOM.sub(lambda found: _output(found[1]), script.replace("\\\n", " "))
    return [*re.findall(r"\$\(((?:\.venv/bin/)?pokebridge [^()]*)\)", text), *text.splitlines()]


def _output(command: str) -> str:
    return subprocess.run(
        command.split(), capture_output=True, text=True, check=True
    ).stdout.strip()


def _commands_in(page: Path, line: str, exported: dict[str, str]) -> Iterator[Command]:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # a quote that goes on in the next line: none of ours does
        return
    is_export = words[:1] == ["export"]
    variables = exported if is_export else dict(exported)
    for position, word in enumerate(words[is_export:]):
        if (found := _ASSIGNMENT.fullmatch(word)) is None:
            if word.removeprefix(".venv/bin/") == "pokebridge":
                rest = words[is_export:][position + 1 :]
                yield Command(page, tuple(_one_command(rest)), variables)
            return
        variables[found[1]] = found[2]


def _one_command(words: list[str]) -> Iterator[str]:
    """The words before a pipe, a redirection or what makes a job of it."""
    for word in words:
        if word in {"|", "&", "&&", ";", ">"}:
            return
        yield word
