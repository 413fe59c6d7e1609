"""A stand-in for Google's servers, as far as the FCM example calls them."""

import asyncio
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.support import free_port

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

    def write_account(self, path: Path) -> None:
        """Write the file of a service account whose tokens come from here."""
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
            "token_uri": f"{self.url}/token",
        }
        path.write_text(json.dumps(account))

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
