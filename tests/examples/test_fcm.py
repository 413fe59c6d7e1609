"""The FCM example: the real app, between a real instance and a stand-in for Google's servers."""

import asyncio
import json
import os
import sqlite3
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from pokebridge.testing.mailbox_kit import ALICE, BOB, EVE
from tests.support import Daemon, Serve, free_port, wait_until
from tests.support.stream_server import stream_server

EXAMPLE = Path(__file__).parents[2] / "examples" / "fcm"
SECRET = "whsec_" + "b2xkIHNlY3JldHMgYXJlIGJhZCBvbmVz"
UNREGISTERED = {"error": {"code": 404, "details": [{"errorCode": "UNREGISTERED"}]}}


class Google:
    """The two calls that the app makes of Google: a service account's token, and FCM's send."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.woken: Counter[str] = Counter()
        self.messages: list[dict[str, object]] = []
        self.failing: set[str] = set()
        self.gone: set[str] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {n.lower(): v for n, _, v in (line.partition(": ") for line in head[1:-2])}
        body = await reader.readexactly(int(headers["content-length"]))
        if " /token " in head[0]:
            status: int = 200
            answer: Mapping[str, object] = {"access_token": "ya29.x", "expires_in": 3600}
        else:
            assert " /v1/projects/my-project/messages:send " in head[0]
            assert headers["authorization"] == "Bearer ya29.x"
            status, answer = self._send(json.loads(body)["message"])
        text = json.dumps(answer).encode()
        writer.write(
            f"HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-type: application/json\r\n"
            f"content-length: {len(text)}\r\n\r\n".encode()
            + text
        )

    def _send(self, message: dict[str, object]) -> tuple[int, Mapping[str, object]]:
        token = str(message["token"])
        if token in self.gone:
            return 404, UNREGISTERED
        if token in self.failing:
            self.failing.discard(token)
            return 503, {"error": {"code": 503}}
        self.woken[token] += 1
        self.messages.append(message)
        return 200, {"name": "projects/my-project/messages/1"}


@pytest.fixture
async def google() -> AsyncIterator[Google]:
    """Google."""
    google = Google()
    async with stream_server(google.serve, port=google.port):
        yield google


@pytest.fixture
def app(google: Google, tmp_path: Path) -> Iterator[Daemon]:
    """The example's app, with a service account whose tokens come from ``google``."""
    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    account = {
        "type": "service_account",
        "project_id": "my-project",
        "private_key": key.decode(),
        "client_email": "pushes@my-project.iam.gserviceaccount.com",
        "token_uri": f"{google.url}/token",
    }
    path = tmp_path / "service-account.json"
    path.write_text(json.dumps(account))
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
