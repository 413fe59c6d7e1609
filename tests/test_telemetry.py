"""The log: one form for all, and no secret in it. The metrics: one name each."""

import json
import logging
from typing import Any

import pytest
import structlog

from pokebridge.telemetry import Metric, configure_logging, hide_secrets

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJib2IifQ.c2lnbmF0dXJl"


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """What was logged, as objects; nothing may have gone to stdout."""
    captured = capsys.readouterr()
    assert captured.out == ""
    return [json.loads(line) for line in captured.err.splitlines()]


def test_structlog_and_stdlib_come_out_alike(capsys: pytest.CaptureFixture[str]) -> None:
    """Each line is a JSON object with the same fields, from either library."""
    configure_logging("json", "info")
    structlog.get_logger("pokebridge.x").info("opened", sessions=3)
    logging.getLogger("uvicorn.error").error("bad %s", "thing", extra={"port": 1})
    ours, theirs = lines(capsys)
    assert ours["timestamp"] <= theirs["timestamp"]
    del ours["timestamp"], theirs["timestamp"]
    assert ours == {"message": "opened", "level": "info", "logger": "pokebridge.x", "sessions": 3}
    assert theirs == {
        "message": "bad thing",
        "level": "error",
        "logger": "uvicorn.error",
        "port": 1,
    }


def test_a_traceback_stays_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A log collector reads lines."""
    configure_logging("json", "info")
    try:
        int(JWT)
    except ValueError:
        structlog.get_logger("pokebridge.x").exception("failed")
    (line,) = lines(capsys)
    assert "ValueError" in line["exception"]
    assert "[hidden]" in line["exception"]
    assert JWT not in line["exception"]


def test_console_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    """The other form, with the same secrets hidden."""
    configure_logging("console", "info")
    forged = "i-2\n2026-11-27 [info     ] listening\x1b[2J"
    structlog.get_logger("pokebridge.x").warning("refused", token=JWT, peer=forged, names=[forged])
    written = capsys.readouterr().err
    assert "refused" in written
    assert "token=[hidden]" in written
    assert written.count("\n") == 1
    assert "\x1b" not in written


@pytest.mark.parametrize(("level", "expected"), [("debug", 3), ("INFO", 2), ("error", 1)])
def test_the_level_holds_for_both(
    capsys: pytest.CaptureFixture[str], level: str, expected: int
) -> None:
    """Below the level nothing is written; the last configuration counts."""
    configure_logging("json", "debug")
    configure_logging("json", level)
    for logger in (structlog.get_logger("pokebridge.x"), logging.getLogger("lib")):
        logger.debug("a")
        logger.info("b")
        logger.error("c")
    assert len(lines(capsys)) == 2 * expected


def test_there_is_no_access_log(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither uvicorn nor httpx logs requests: both would log URLs."""
    configure_logging("json", "info")
    logging.getLogger("uvicorn.access").info("GET /?access_token=x")
    logging.getLogger("httpx").info("HTTP Request: GET /?access_token=x")
    assert lines(capsys) == []


@pytest.mark.parametrize(
    "event",
    [
        {"token": "hunter2"},
        {"access_token": "hunter2"},
        {"jwt_secret": "hunter2"},
        {"Authorization": "Bearer hunter2"},
        {"headers": {"authorization": "hunter2"}},
        {"headers": [{"token": "hunter2"}]},
        {"event": "GET /v1/connect?access_token=hunter2 HTTP/1.1"},
        {"event": "wss://h/v1/connect?device=a&access_token=hunter2"},
        {"event": "authorization: bearer hunter2"},
        {"event": "protocols: pokebridge.v1, bearer.hunter2"},
        {"url": "nats://user:hunter2@host:4222"},
        {"url": "redis://:hunter2@host/0"},
        {"error": ValueError("/x?token=hunter2")},
    ],
)
def test_secrets_are_hidden(event: dict[str, Any]) -> None:
    """By name, and by what they look like inside a text."""
    hidden = hide_secrets(None, "info", event)
    assert "hunter2" not in str(hidden)
    assert "[hidden]" in str(hidden)


def test_what_is_no_secret_is_left_alone() -> None:
    """Recipients, numbers and plain questions stay readable."""
    event = {"recipient": "urn:user:bob", "n": 1, "ok": True, "x": None, "event": "why? so: a=b"}
    assert hide_secrets(None, "info", dict(event)) == event
    assert JWT not in str(hide_secrets(None, "info", {"event": f"bad {JWT}!"}))


def test_every_metric_has_a_proper_name() -> None:
    """Prefix and units as Prometheus wants them, and no name twice."""
    assert len(set(Metric)) == len(Metric.__members__)
    assert all(metric.startswith("pokebridge_") and metric.islower() for metric in Metric)
    assert all(metric.meaning for metric in Metric)
