"""docs/logging.md lists every log event, with its level and its fields."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src/pokebridge"
LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}
KEY = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
ROW = re.compile(r"\| `(?P<key>[^`]+)` \| (?P<level>\w+) \| (?P<fields>[^|]*) \| [^|]+ \|")


class Logged(NamedTuple):
    """One call of a logger."""

    place: str
    level: str
    key: str | None
    """``None`` when it is not a constant."""
    fields: frozenset[str]
    is_open: bool
    """Whether more fields come from a mapping."""


def _modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(SRC.rglob("*.py")):
        text = path.read_text()
        if "structlog.get_logger(" in text:  # the client library logs as its host application does
            yield str(path.relative_to(SRC)), ast.parse(text)


def _is_logger(node: ast.expr) -> bool:
    return ast.unparse(node) in {"log", "_log", "logger"} or "get_logger(" in ast.unparse(node)


def _logged(place: str, tree: ast.Module) -> Iterator[Logged]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and _is_logger(node.func.value)
        ):
            first = node.args[0] if len(node.args) == 1 else None
            is_key = isinstance(first, ast.Constant) and isinstance(first.value, str)
            yield Logged(
                f"{place}:{node.lineno}",
                node.func.attr,
                first.value if is_key else None,  # type: ignore[union-attr] # it is a constant
                frozenset(keyword.arg for keyword in node.keywords if keyword.arg),
                any(keyword.arg is None for keyword in node.keywords),
            )


def _events() -> list[Logged]:
    return [each for place, tree in _modules() for each in _logged(place, tree)]


def _table() -> dict[str, tuple[str, frozenset[str]]]:
    rows = [ROW.fullmatch(line) for line in (ROOT / "docs/logging.md").read_text().splitlines()]
    return {
        row["key"]: (row["level"], frozenset(re.findall(r"`(\w+)`", row["fields"])))
        for row in rows
        if row
    }


def test_keys_are_constant_snake_case() -> None:
    """No key is computed, and none is a sentence: a filter must be able to match it."""
    assert not [each for each in _events() if each.level not in LEVELS]
    assert not [each for each in _events() if not (each.key and KEY.fullmatch(each.key))]


def test_the_table_lists_every_event() -> None:
    """Each event stands in the table with its level and fields, and no others do."""
    table, events = _table(), _events()
    assert {each.key for each in events} == table.keys()
    wrong = [
        each
        for each in events
        if each.key
        and (
            table[each.key][0] != each.level
            or not each.fields <= table[each.key][1]
            or not (each.is_open or each.fields == table[each.key][1])
        )
    ]
    assert not wrong


def test_the_table_is_sorted() -> None:
    """An event is found by its name."""
    assert list(_table()) == sorted(_table())


def test_loggers_have_one_name() -> None:
    """Each module has ``log = structlog.get_logger(__name__)``, and no other form."""
    wrong = [
        f"{place}:{node.lineno}"
        for place, tree in _modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and "get_logger" in ast.unparse(node)
        and ast.unparse(node) != "log = structlog.get_logger(__name__)"
    ]
    assert not wrong
