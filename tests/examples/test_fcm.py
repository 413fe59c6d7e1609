"""The FCM example: the real app, between a real instance and a stand-in for Google's servers."""

import asyncio
import os
import sqlite3
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from pokebridge.testing.mailbox_kit import ALICE, BOB, EVE
from tests.examples.google import Google
from tests.support import Daemon, Serve, free_port, wait_until
from tests.support.stream_server import stream_server

EXAMPLE = Path(__file__).parents[2] / "examples" / "fcm"
SECRET = "whsec_" + "b2xkIHNlY3JldHMgYXJlIGJhZCBvbmVz"


@pytest.fixture
async def google() -> AsyncIterator[Google]:
    """Google."""
    google = Google()
    async with stream_server(google.serve, port=google.port):
        yield google


@pytest.fixture
def app(google: Google, tmp_path: Path) -> Iterator[Daemon]:
    """The example's app, with a service account whose tokens come from ``google``."""
    path = tmp_path / "service-account.json"
    google.write_account(path)
    port = free_port()
    daemon = Daemon(
        "fcm-app",
        [
            *(sys.executable, "-m", "uvicorn", "--app-dir", str(EXAMPLE)),
            *("app:app", "--port", f"{port}"),
        ],
        port=port,
        url=f"http://127.0.0.1:{port}",
        directory=tmp_path,
        env=os.environ
        | {
            "POKEBRIDGE_PUSH_WEBHOOK_SECRET": SECRET,
            "FCM_PROJECT": "my-project",
            "FCM_URL": google.url,
            "GOOGLE_APPLICATION_CREDENTIALS": str(path),
            "DEVICES_DB": str(tmp_path / "devices.db"),
        },
    )
    daemon.start()
    yield daemon
    daemon.kill()


async def test_sleeping_phones_are_woken(
    google: Google, app: Daemon, serve: Serve, tmp_path: Path
) -> None:
    """Both of Bob's are, once each, though one fails at first; one that is gone is forgotten.

    Eve's is not, and a request that is not signed is refused.
    """
    google.failing, google.gone = {"tablet"}, {"old"}
    async with httpx.AsyncClient(base_url=app.url, timeout=20) as http:
        for token, owner in {"phone": BOB, "tablet": BOB, "old": BOB, "eves": EVE}.items():
            answer = await http.post("/devices", json={"owner": owner, "token": token})
            assert answer.status_code == httpx.codes.NO_CONTENT
        forged = await http.post("/pushes", json={"recipient": BOB, "version": 1})
        assert forged.status_code == httpx.codes.UNAUTHORIZED
    instance = await asyncio.to_thread(
        serve,
        mailbox=f"sqlite:///{tmp_path}/mailbox.db",
        push_webhook_url=f"{app.url}/pushes",
        push_webhook_secret=SECRET,
        push_grace_s=0.2,
    )
    async with instance.async_http(ALICE, "send") as http:
        await http.post("/v1/messages", json={"recipient": BOB, "body": "secret"})

    async def is_sent() -> bool:
        async with instance.async_http() as http:
            return 'pushes_total{result="sent"} 1.0' in (await http.get("/metrics")).text

    await wait_until(is_sent, timeout_s=20)
    with closing(sqlite3.connect(tmp_path / "devices.db")) as database:
        left = database.execute("SELECT token FROM devices ORDER BY token").fetchall()
    assert left == [("eves",), ("phone",), ("tablet",)]
    assert google.woken == {"phone": 1, "tablet": 1}
    assert {str(message["data"]) for message in google.messages} == {
        str({"type": "pull", "version": "1"})
    }
