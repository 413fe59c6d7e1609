"""Origins: their normal form, patterns, and the server's own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pokebridge.origins import is_allowed, is_own, normal_origin


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("https://a.example", "https://a.example"),
        ("HTTPS://A.Example", "https://a.example"),
        ("https://a.example:443", "https://a.example"),
        ("http://a.example:80", "http://a.example"),
        ("http://a.example:443", "http://a.example:443"),
        ("https://a.example:8443", "https://a.example:8443"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
        ("https://*.Example.com:443", "https://*.example.com"),
        ("http://[::1]:8080", "http://[::1]:8080"),
        ("https://[2001:DB8:0:0:0:0:0:1]", "https://[2001:db8::1]"),
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("app://b", "app://b"),
        ("chrome-extension://abcdef", "chrome-extension://abcdef"),
    ],
)
def test_the_normal_form_is_what_browsers_send(text: str, normal: str) -> None:
    """Case, default ports and the spelling of a host make no difference."""
    assert normal_origin(text) == normal
    assert is_allowed(text, {normal})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "*",
        "null",
        "a.example",
        "https://",
        "https://a.example/",
        "https://a.example/path",
        "https://a.example?x",
        "https://a.example#x",
        "https://user@a.example",
        "https://a.example:port",
        "https://a.example:",
        "https://a.example:99999",
        "https://*",
        "https://*.",
        "https://a.*.example",
        "https://*a.example",
        "https://a b.example",
        "https://[::1",
        "https://[:::]",
        "https://[1::2::3]",
        "https://127.1",
        "https://127.0.0.256",
        "https://0x7f000001",
        "https://a%2eexample",
        "https://straße.example",
        "https://" + "a." * 5000 + "example",
        "https://" + "ü" * 100 + ".example",
    ],
)
def test_what_is_no_origin_is_refused(text: str) -> None:
    """Nothing that no browser would ever send is accepted."""
    with pytest.raises(ValueError, match=r"."):
        normal_origin(text)
    assert not is_allowed(text, {text})
    assert not is_own(text, text.partition("://")[2])


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("https://a.example.com", True),
        ("https://a.b.example.com", True),
        ("https://A.EXAMPLE.COM:443", True),
        ("https://example.com", False),
        ("https://badexample.com", False),
        ("http://a.example.com", False),
        ("https://a.example.com:8443", False),
        ("https://a.example.com.evil.example", False),
        ("https://evil.example/.example.com", False),
        ("https://evil.example?.example.com", False),
        ("https://*.example.com", True),
    ],
)
def test_a_pattern_matches_every_host_below(origin: str, *, allowed: bool) -> None:
    """One star stands for the labels before a domain, and for nothing else."""
    assert is_allowed(origin, {"https://*.example.com"}) == allowed


@pytest.mark.parametrize(
    ("origin", "host", "own"),
    [
        ("http://localhost:8080", "localhost:8080", True),
        ("https://bridge.example.com", "bridge.example.com", True),
        ("https://bridge.example.com", "Bridge.example.com:443", True),
        ("http://[::1]:8080", "[::1]:8080", True),
        ("https://bridge.example.com", "bridge.example.com:8080", False),
        ("https://evil.example", "bridge.example.com", False),
        ("null", "null", False),
        ("https://bridge.example.com", "", False),
    ],
)
def test_the_own_origin_is_that_of_the_host(origin: str, host: str, *, own: bool) -> None:
    """A page that the server itself could have served, whatever the scheme before a proxy."""
    assert is_own(origin, host) == own


@given(st.text(), st.text())
def test_any_text_is_an_origin_or_not(origin: str, host: str) -> None:
    """Strangers write these headers: no text raises anything."""
    is_own(origin, host)
    is_allowed(origin, {"https://*.example.com"})
