"""docs/security.md states the limits that the code has."""

from pathlib import Path

import pytest

from pokebridge import key_set, tokens, wire
from pokebridge.api import app, pokes
from pokebridge.framing import MAX_FRAMES_PER_MESSAGE, MAX_MESSAGE_BYTES
from pokebridge.gateway.admission import FAILED_HANDSHAKES_PER_ADDRESS
from pokebridge.server import http
from pokebridge.session import Timing
from pokebridge.settings import Settings
from pokebridge.submission import MAX_BODY_BYTES, MAX_BODY_DEPTH

PAGE = (Path(__file__).parents[2] / "docs/security.md").read_text()
ROWS = {
    cells[1].strip(): cells[2].strip()
    for line in PAGE.splitlines()
    if len(cells := line.split("|")) > 4
}


@pytest.mark.parametrize(
    ("row", "limit"),
    [
        (
            "head of a request, with trailers and the framing of chunks",
            f"{http.MAX_HEAD_BYTES} bytes",
        ),
        (
            (
                "time for the head of a request to arrive, and for each"
                f" {http.SLOW_BODY_BYTES // 1024} KiB of its body"
            ),
            f"{http.REQUEST_TIMEOUT_S:g} s",
        ),
        ("time between two requests of a connection", f"{http.KEEP_ALIVE_S:g} s"),
        ("time in which a peer reads nothing of its answer", f"{http.UNREAD_TIMEOUT_S:g} s"),
        ("body of `POST /v1/messages` and all other calls", f"{app.BODY_CAP_BYTES} bytes"),
        ("body of `POST /v1/pokes`", f"{pokes.POKES_CAP_BYTES} bytes"),
        ("a message's own body", f"{MAX_BODY_BYTES} bytes, nested {MAX_BODY_DEPTH} deep"),
        ("handshakes without, of an address", f"{FAILED_HANDSHAKES_PER_ADDRESS} in two seconds"),
        ("a token, wherever it comes from", f"{tokens.MAX_TOKEN_BYTES} bytes"),
        (
            "a key set",
            (
                f"{key_set.MAX_KEY_SET_BYTES} bytes, {key_set.MAX_KEYS} keys,"
                f" {key_set.KEYS_TIMEOUT_S:g} s for the whole answer, not compressed"
            ),
        ),
        ("keys that a token is tried with", f"{key_set.MAX_CANDIDATE_KEYS}"),
        ("keys while their endpoint is down", f"{key_set.KEYS_KEPT_S:.0f} s"),
        (
            "a client's message on the socket",
            f"{wire.MAX_TEXT_BYTES} bytes, with a token {MAX_MESSAGE_BYTES}",
        ),
        ("frames of a message", f"{MAX_FRAMES_PER_MESSAGE}"),
        ("frames of a session between two pings", f"{Timing().max_messages_per_ping}"),
    ],
)
def test_a_limit_is_as_the_page_says(row: str, limit: str) -> None:
    """Each row has the number of the code."""
    assert ROWS[row] == limit


def test_the_settings_defaults_are_as_the_page_says() -> None:
    """A row that names a setting has its default."""
    settings = Settings(jwt_secret="0" * 32)  # type: ignore[arg-type] # a plain text is taken
    for name in (
        "max_connections_per_address",
        "max_sessions_per_address",
        "max_sessions_per_recipient",
        "handshakes_per_s",
    ):
        assert f"`{name}` ({getattr(settings, name)})" in PAGE
