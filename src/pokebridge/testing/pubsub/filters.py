"""The filter language of Pub/Sub subscriptions, parsed and evaluated as Google documents it.

    filter     = expression
    expression = term { "AND" term } | term { "OR" term }     never both without parentheses
    term       = ( "NOT" | "-" ) term | "(" expression ")" | comparison
    comparison = "attributes" ":" key                         the attribute is there
               | "attributes" "." key ( "=" | "!=" ) string
               | "hasPrefix" "(" "attributes" "." key "," string ")"
    key        = letters, digits, "_" and "-" | string
    string     = '"' ... '"' with the escapes of C

Operators are upper case; keys and values are compared exactly. ``!=`` and NOT also match messages
without the attribute. Source: "Filter messages from a subscription" in Google's documentation.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

MAX_FILTER_SIZE_BYTES = 256


class FilterError(ValueError):
    """The text is no filter; the message says where and why."""


@dataclass(frozen=True, slots=True)
class HasKey:
    """``attributes:key``."""

    key: str


@dataclass(frozen=True, slots=True)
class Equals:
    """``attributes.key = "value"``."""

    key: str
    value: str


@dataclass(frozen=True, slots=True)
class HasPrefix:
    """``hasPrefix(attributes.key, "prefix")``."""

    key: str
    prefix: str


@dataclass(frozen=True, slots=True)
class Not:
    """``NOT term``; also ``!=``, as its opposite."""

    term: "Filter"


@dataclass(frozen=True, slots=True)
class And:
    """``a AND b AND …``."""

    terms: tuple["Filter", ...]


@dataclass(frozen=True, slots=True)
class Or:
    """``a OR b OR …``."""

    terms: tuple["Filter", ...]


Filter = HasKey | Equals | HasPrefix | Not | And | Or


def matches(expression: Filter, attributes: Mapping[str, str]) -> bool:
    """Whether a message with ``attributes`` passes."""
    match expression:
        case HasKey(key):
            return key in attributes
        case Equals(key, value):
            return attributes.get(key) == value
        case HasPrefix(key, prefix):
            return key in attributes and attributes[key].startswith(prefix)
        case Not(term):
            return not matches(term, attributes)
        case And(terms):
            return all(matches(term, attributes) for term in terms)
        case Or(terms):
            return any(matches(term, attributes) for term in terms)


def parse_filter(text: str) -> Filter:
    """Parse ``text`` as a filter.

    Raises:
        FilterError: ``text`` is no valid filter, or is longer than 256 bytes.
    """
    if len(text.encode()) > MAX_FILTER_SIZE_BYTES:
        raise FilterError(f"longer than {MAX_FILTER_SIZE_BYTES} bytes")
    parser = _Parser(text)
    expression = parser.expression()
    parser.expect_end()
    return expression


_SPACE = re.compile(r"\s*")
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_KEY = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(r'"((?:[^"\\\n]|\\.)*)"')
_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|[xX]([0-9A-Fa-f]{2})|([0-7]{3})|(.))")
_CONTROLS = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_LITERALS = "\\\"'`?"


class _Parser:
    """Recursive descent; at most two frames a parenthesis, and the text is short."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def expression(self) -> Filter:
        terms = [self._term()]
        operator = following = self._take_word("AND", "OR")
        while following is not None:
            if following != operator:
                raise self._error("AND and OR can't be mixed without parentheses")
            terms.append(self._term())
            following = self._take_word("AND", "OR")
        if operator is None:
            return terms[0]
        return And(tuple(terms)) if operator == "AND" else Or(tuple(terms))

    def expect_end(self) -> None:
        self._skip_space()
        if self._at != len(self._text):
            raise self._error("expected AND, OR or the end")

    def _term(self) -> Filter:
        if self._take("-") or self._take_word("NOT"):
            return Not(self._term())
        if self._take("("):
            expression = self.expression()
            self._expect(")")
            return expression
        if self._take_word("hasPrefix"):
            return self._prefix()
        if self._take_word("attributes"):
            return self._comparison()
        raise self._error("expected attributes, hasPrefix, NOT or (")

    def _prefix(self) -> Filter:
        self._expect("(")
        if not self._take_word("attributes"):
            raise self._error("expected attributes")
        self._expect(".")
        key = self._key()
        self._expect(",")
        prefix = self._string()
        self._expect(")")
        return HasPrefix(key, prefix)

    def _comparison(self) -> Filter:
        if self._take(":"):
            return HasKey(self._key())
        self._expect(".")
        key = self._key()
        if self._take("!="):
            return Not(Equals(key, self._string()))
        self._expect("=")
        return Equals(key, self._string())

    def _key(self) -> str:
        self._skip_space()
        if self._text.startswith('"', self._at):
            return self._string()
        found = self._match(_KEY)
        if found is None:
            raise self._error("expected an attribute's key")
        return found.group()

    def _string(self) -> str:
        self._skip_space()
        found = self._match(_STRING)
        if found is None:
            raise self._error('expected a string in "double quotes"')
        return _ESCAPE.sub(self._unescape, found.group(1))

    def _unescape(self, escape: re.Match[str]) -> str:
        code_point, byte, octal, letter = escape.groups()
        if letter is None:
            return chr(int(octal, 8) if octal else int(code_point or byte, 16))
        if letter in _LITERALS:
            return str(letter)
        if letter not in _CONTROLS:
            raise self._error(f"\\{letter} is not a valid escape")
        return _CONTROLS[letter]

    def _take_word(self, *words: str) -> str | None:
        self._skip_space()
        found = _WORD.match(self._text, self._at)
        if found is None or found.group() not in words:
            return None
        self._at = found.end()
        return found.group()

    def _take(self, token: str) -> bool:
        self._skip_space()
        if not self._text.startswith(token, self._at):
            return False
        self._at += len(token)
        return True

    def _expect(self, token: str) -> None:
        if not self._take(token):
            raise self._error(f"expected {token}")

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self._text, self._at)
        if found is not None:
            self._at = found.end()
        return found

    def _skip_space(self) -> None:
        self._match(_SPACE)

    def _error(self, problem: str) -> FilterError:
        return FilterError(f"{problem} at character {self._at + 1}")
