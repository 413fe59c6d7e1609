"""Wakes phones through Firebase Cloud Messaging when their owner has not pulled.

pokebridge's webhook says who. Which phones those are is this app's own table: it is told by the
phones, when somebody logs in, and by FCM, when a token is no longer any phone's.
"""

import asyncio
import base64
import hashlib
import hmac
import os
import sqlite3
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import google.auth
import google.auth.transport.requests
import httpx
from fastapi import FastAPI, HTTPException, Request, Response
from pydantic import BaseModel

try:
    SECRET = os.environ["POKEBRIDGE_PUSH_WEBHOOK_SECRET"]
    PROJECT = os.environ["FCM_PROJECT"]
except KeyError as error:
    sys.exit(f"set the environment variable {error.args[0]}: README.md shows it")
FCM = os.environ.get("FCM_URL", "https://fcm.googleapis.com")
DATABASE = Path(os.environ.get("DEVICES_DB", "var/devices.db"))
SCOPE = "https://www.googleapis.com/auth/firebase.messaging"
TABLES = """
CREATE TABLE IF NOT EXISTS devices (
    token TEXT PRIMARY KEY, owner TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS devices_by_owner ON devices (owner);
CREATE TABLE IF NOT EXISTS woken (
    push TEXT NOT NULL, token TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (push, token));
CREATE INDEX IF NOT EXISTS woken_by_age ON woken (at);
"""
# pokebridge tries a push for about a day; its id stays the same.
WOKEN_KEPT_S = 3 * 24 * 3600.0
SIGNATURE_AGE_S = 300.0


class Device(BaseModel):
    """Whose it is, and the registration token that the Firebase SDK gave it."""

    owner: str
    token: str


class Push(BaseModel):
    """The recipient that has not pulled, and the newest version of its messages."""

    recipient: str
    version: int


app = FastAPI(title="Pushes by FCM")


@contextmanager
def _database() -> Iterator[sqlite3.Connection]:
    """A connection, committed at the end of the block."""
    DATABASE.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(DATABASE)) as connection, connection:
        connection.executescript(TABLES)
        yield connection


@app.post("/devices", status_code=HTTPStatus.NO_CONTENT)
def add_device(device: Device) -> None:
    """Register a phone. Your own login comes first, and determines ``owner``."""
    with _database() as database:
        database.execute(
            "INSERT OR REPLACE INTO devices VALUES (?, ?)", (device.token, device.owner)
        )


@app.post("/pushes")
async def push(request: Request) -> Response:
    """Pokebridge's webhook: wake every phone of the recipient that this push has not woken yet.

    2xx when all is done; else pokebridge tries again, with the same id.
    """
    body = await request.body()
    if not _is_genuine(request.headers, body):
        raise HTTPException(HTTPStatus.UNAUTHORIZED, "the signature is not pokebridge's")
    push_id, wanted = request.headers["webhook-id"], Push.model_validate_json(body)
    access_token = await asyncio.to_thread(_access_token)
    async with httpx.AsyncClient(base_url=FCM, timeout=8.0) as fcm:
        fcm.headers["authorization"] = f"Bearer {access_token}"
        tokens = _tokens_to_wake(wanted.recipient, push_id)
        woken = await asyncio.gather(*(_wake(fcm, push_id, token, wanted) for token in tokens))
    return Response(status_code=HTTPStatus.NO_CONTENT if all(woken) else HTTPStatus.BAD_GATEWAY)


def _is_genuine(headers: Mapping[str, str], body: bytes) -> bool:
    """Standard Webhooks' signature, as docs/push-fallback.md shows it."""
    try:
        push_id, stamp = headers["webhook-id"], headers["webhook-timestamp"]
        given = headers["webhook-signature"].split()
        is_recent = abs(time.time() - int(stamp)) < SIGNATURE_AGE_S
    except (KeyError, ValueError):
        return False
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    digest = hmac.new(key, f"{push_id}.{stamp}.".encode() + body, hashlib.sha256).digest()
    expected = "v1," + base64.b64encode(digest).decode()
    return is_recent and any(hmac.compare_digest(expected, each) for each in given)


def _access_token() -> str:
    """Of the service account that GOOGLE_APPLICATION_CREDENTIALS names; an hour's, cached."""
    global _credentials
    if _credentials is None:
        _credentials, _ = google.auth.default(scopes=[SCOPE])
    if not _credentials.valid:
        _credentials.refresh(google.auth.transport.requests.Request())
    return str(_credentials.token)


_credentials: Any = None


def _tokens_to_wake(owner: str, push_id: str) -> list[str]:
    with _database() as database:
        database.execute("DELETE FROM woken WHERE at < ?", (time.time() - WOKEN_KEPT_S,))
        rows = database.execute(
            "SELECT token FROM devices WHERE owner = ?"
            " AND token NOT IN (SELECT token FROM woken WHERE push = ?)",
            (owner, push_id),
        )
        return [token for (token,) in rows]


async def _wake(fcm: httpx.AsyncClient, push_id: str, token: str, wanted: Push) -> bool:
    """Whether it is done: FCM accepted it, or no longer knows the phone."""
    message = {
        "token": token,
        "data": {"type": "pull", "version": str(wanted.version)},
        "android": {"priority": "HIGH", "collapse_key": "pull"},
        "apns": {
            "headers": {"apns-push-type": "background", "apns-priority": "5"},
            "payload": {"aps": {"content-available": 1}},
        },
    }
    try:
        answer = await fcm.post(f"/v1/projects/{PROJECT}/messages:send", json={"message": message})
    except httpx.HTTPError:
        return False
    with _database() as database:
        if answer.is_success:
            database.execute(
                "INSERT OR REPLACE INTO woken VALUES (?, ?, ?)", (push_id, token, time.time())
            )
        elif "UNREGISTERED" in answer.text:  # the app is gone from it, or has a new token
            database.execute("DELETE FROM devices WHERE token = ?", (token,))
        else:
            return False
    return True
