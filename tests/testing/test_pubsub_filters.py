"""The test server's filters are those that Google documents."""

from collections.abc import Mapping
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pokebridge.testing.pubsub.filters import (
    MAX_FILTER_SIZE_BYTES,
    And,
    Equals,
    Filter,
    FilterError,
    HasKey,
    HasPrefix,
    Not,
    Or,
    matches,
    parse_filter,
)

KEYS = st.sampled_from(["shard", "a-b", "a_b", "7", "-x", "iana.org/language_tag", 'q"', "é", ""])
VALUES = st.sampled_from(
    ["", "4", "42", "com", 'a"b\\c', "tab\tline\n", "\u307f\u3093\u306a", "\x07"]
)
ATTRIBUTES = st.dictionaries(KEYS, VALUES, max_size=4)
COMPARISONS = (
    st.builds(HasKey, KEYS) | st.builds(Equals, KEYS, VALUES) | st.builds(HasPrefix, KEYS, VALUES)
)


def _nested(inner: st.SearchStrategy[Filter]) -> st.SearchStrategy[Filter]:
    terms = st.lists(inner, min_size=2, max_size=3).map(tuple)
    return st.builds(Not, inner) | st.builds(And, terms) | st.builds(Or, terms)


FILTERS = st.recursive(COMPARISONS, _nested, max_leaves=5)


def quoted(text: str) -> str:
    """``text`` as a string literal, with an escape for whatever may need one."""
    escaped = "".join(
        char if char.isalnum() and char.isascii() else f"\\u{ord(char):04x}" for char in text
    )
    return f'"{escaped}"'


def spell(expression: Filter) -> str:
    """A text of the documented grammar that means ``expression``."""
    match expression:
        case HasKey(key):
            return f"attributes:{quoted(key)}"
        case Equals(key, value):
            return f"attributes.{quoted(key)} = {quoted(value)}"
        case HasPrefix(key, prefix):
            return f"hasPrefix(attributes.{quoted(key)}, {quoted(prefix)})"
        case Not(term):
            return f"NOT ({spell(term)})"
        case And(terms):
            return " AND ".join(f"({spell(term)})" for term in terms)
        case Or(terms):
            return "(" + ") OR (".join(spell(term) for term in terms) + ")"


def oracle(expression: Filter, attributes: Mapping[str, str]) -> bool:
    """What ``expression`` means, said in Python and evaluated by Python."""

    def say(part: Filter) -> str:
        match part:
            case HasKey(key):
                return f"({key!r} in a)"
            case Equals(key, value):
                return f"(a.get({key!r}) == {value!r})"
            case HasPrefix(key, prefix):
                return f"({key!r} in a and a[{key!r}][:{len(prefix)}] == {prefix!r})"
            case Not(term):
                return f"(not {say(term)})"
            case And(terms):
                return "(" + " and ".join(map(say, terms)) + ")"
            case Or(terms):
                return "(" + " or ".join(map(say, terms)) + ")"

    return bool(eval(say(expression), {"a": dict(attributes)}))


@given(FILTERS)
def test_what_is_spelt_is_what_is_read(expression: Filter) -> None:
    """Every filter can be written down and is read back as the same, unless it is too long."""
    text = spell(expression)
    if len(text) <= MAX_FILTER_SIZE_BYTES:
        assert parse_filter(text) == expression
    else:
        with pytest.raises(FilterError, match="longer"):
            parse_filter(text)


@given(FILTERS, ATTRIBUTES)
def test_filters_mean_what_they_say(expression: Filter, attributes: dict[str, str]) -> None:
    """Evaluation agrees with Python's own and, or, not, in, == and prefixes."""
    assert matches(expression, attributes) == oracle(expression, attributes)


@given(st.text(max_size=40) | st.text('attributes.:()"=!-ANDORT \\x', max_size=40))
def test_any_text_is_a_filter_or_an_error(text: str) -> None:
    """No text makes the parser fail in another way than by saying so."""
    with suppress(FilterError):
        parse_filter(text)


DOMAIN_COM = Equals("domain", "com")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("attributes:domain", HasKey("domain")),
        ('attributes:"iana.org/language_tag"', HasKey("iana.org/language_tag")),
        (r'attributes:"\u307F\u3093\u306A"', HasKey("みんな")),
        ('attributes.domain = "com"', DOMAIN_COM),
        ('attributes.domain="com"', DOMAIN_COM),
        ('attributes.domain != "com"', Not(DOMAIN_COM)),
        ('NOT attributes.domain = "com"', Not(DOMAIN_COM)),
        ('-attributes.domain = "com"', Not(DOMAIN_COM)),
        ("NOT NOT attributes:a", Not(Not(HasKey("a")))),
        ("attributes:-", HasKey("-")),
        ('hasPrefix(attributes.domain, "co")', HasPrefix("domain", "co")),
        ("attributes:a AND attributes:b AND attributes:c", And(tuple(map(HasKey, "abc")))),
        (
            'attributes:a AND (attributes.domain = "com" OR NOT attributes:b)',
            And((HasKey("a"), Or((DOMAIN_COM, Not(HasKey("b")))))),
        ),
        ("(attributes:a)AND(attributes:b)", And((HasKey("a"), HasKey("b")))),
        (r'attributes.a = "\x41\101\n\"\\"', Equals("a", 'AA\n"\\')),
        ('attributes.shard = "42"', Equals("shard", "42")),
        ("NOT attributes:shard", Not(HasKey("shard"))),
    ],
)
def test_documented_forms_are_read(text: str, expected: Filter) -> None:
    """The forms of Google's documentation, and the two that the adapter uses."""
    assert parse_filter(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "bogus",
        "attributes",
        "attributes.",
        "attributes.domain",
        "attributes.domain = com",
        "attributes.domain = 'com'",
        'attributes.domain == "com"',
        'attributes.domain < "com"',
        'attributes.domain = "com',
        r'attributes.domain = "\q"',
        'attributes:a.b = "c"',
        "attributes:a AND attributes:b OR attributes:c",
        "attributes:a OR attributes:b AND attributes:c",
        "attributes:a and attributes:b",
        "attributes:a attributes:b",
        "attributes:a AND",
        "AND attributes:a",
        "(attributes:a",
        "attributes:a)",
        'hasPrefix(attributes.a "b")',
        'hasPrefix(a, "b")',
        'hasSuffix(attributes.a, "b")',
        'hasprefix(attributes.a, "b")',
        "NOT",
        'data = "x"',
    ],
)
def test_what_google_refuses_is_refused(text: str) -> None:
    """Malformed filters, and AND mixed with OR, are errors."""
    with pytest.raises(FilterError):
        parse_filter(text)


def test_inequality_matches_messages_without_the_attribute() -> None:
    """``!=`` is the complement of ``=``, as in Google's table of forms."""
    assert matches(parse_filter('attributes.a != "b"'), {})
    assert matches(parse_filter('attributes.a != "b"'), {"a": "c"})
    assert not matches(parse_filter('attributes.a != "b"'), {"a": "b"})


@pytest.mark.parametrize(
    "text",
    [
        "(" * 122 + "attributes:a" + ")" * 122,
        f'attributes:"{"é" * 121}"',
        "NOT " * 61 + "attributes:a",
    ],
)
def test_the_length_is_limited_in_bytes(text: str) -> None:
    """Up to 256 bytes of UTF-8 are read, however deep they nest; one more is refused."""
    longest = text + " " * (MAX_FILTER_SIZE_BYTES - len(text.encode()))
    assert parse_filter(longest) == parse_filter(text)
    with pytest.raises(FilterError, match="longer"):
        parse_filter(longest + " ")
