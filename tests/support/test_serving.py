"""Served instances are real processes: reachable, killed, restarted, and their logs are at hand."""

import asyncio
import signal

import httpx
import pytest

from tests.support import Daemon, Serve


def test_an_instance_serves_its_api(serve: Serve) -> None:
    """The helper's own tokens are accepted, with the scope that was asked for."""
    instance = serve(mailbox="memory://")
    with instance.http("urn:user:alice", scope="send") as http:
        sent = http.post("/v1/messages", json={"recipient": "urn:user:bob", "body": "hello"})
    assert (sent.status_code, sent.json()["version"]) == (202, 1)
    with instance.http("urn:user:bob") as http:
        assert [message["body"] for message in http.get("/v1/messages").json()["messages"]] == [
            "hello"
        ]
        assert http.post("/v1/pokes", json={"recipient": "urn:user:bob"}).status_code == 403
    with instance.http() as http:
        assert http.get("/v1/messages").status_code == 401
    assert "listening" in instance.log()


async def test_what_is_durable_outlives_a_kill(serve: Serve) -> None:
    """Killed and restarted, the same URL answers, tokens still hold, and the message is there."""
    instance = serve(mailbox="sqlite:///mailbox.db")
    async with instance.async_http("urn:user:bob", scope="send") as http:
        await http.post("/v1/messages", json={"recipient": "urn:user:bob", "body": 1})
        await asyncio.to_thread(instance.kill)
        with pytest.raises(httpx.ConnectError):
            await http.get("/healthz")
        await asyncio.to_thread(instance.restart)
        assert len((await http.get("/v1/messages")).json()["messages"]) == 1


def test_an_instance_stops_in_good_order(serve: Serve) -> None:
    """SIGTERM ends it with status 0."""
    instance = serve(mailbox="memory://")
    assert instance.rss_bytes() > 10_000_000
    assert instance.terminate() == 0


def test_settings_reach_the_instance(serve: Serve, nats_server: Daemon) -> None:
    """Flags and settings are the instance's; a wrong one shows in the failed start."""
    instance = serve("--instance", "a", mailbox="memory://", transport=nats_server.url)
    with instance.http("urn:user:bob") as http:
        assert http.get("/v1/connect-info").json()["instance"] == "a"
    with pytest.raises(RuntimeError, match="SHARD_COUNT"):
        serve(mailbox="memory://", shard_count=-1)


def test_signals_can_be_sent_to_the_process(serve: Serve) -> None:
    """``pid`` is the server's own."""
    instance = serve(mailbox="memory://")
    instance.kill()
    assert instance.terminate() == -signal.SIGKILL
