"""A FastAPI app with its own table, which pokes after its commit. The bridge keeps no messages.

A note that is added for Bob wakes his clients, and they ask this app what is new. The column
``poked`` is what makes the poke certain: whatever dies between the commit and the poke, the sweep
finds what is owed.
"""

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import httpx
from fastapi import FastAPI, Query
from pydantic import BaseModel

from pokebridge.errors import PokebridgeError, UnavailableError
from pokebridge.publisher import HttpPublisher

BRIDGE = os.environ.get("BRIDGE_URL", "http://127.0.0.1:8080")
DATABASE = Path(os.environ.get("NOTES_DB", "var/notes.db"))
TABLE = """
CREATE TABLE IF NOT EXISTS notes (
    id INTEGER PRIMARY KEY AUTOINCREMENT, owner TEXT NOT NULL, text TEXT NOT NULL,
    poked INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS notes_by_owner ON notes (owner, id);
CREATE INDEX IF NOT EXISTS notes_not_poked ON notes (id) WHERE NOT poked;
"""
SWEEP_EVERY_S = 1.0


class NewNote(BaseModel):
    """The owner and the text of a note."""

    owner: str
    text: str


@contextmanager
def _database() -> Iterator[sqlite3.Connection]:
    """A connection, committed at the end of the block."""
    with closing(sqlite3.connect(DATABASE)) as connection, connection:
        yield connection


async def _token() -> str:
    """A token that allows pokes: your own service signs it, or a development instance does."""
    if given := os.environ.get("POKEBRIDGE_TOKEN"):
        return given
    wanted = {"sub": "urn:service:notes", "scope": "poke"}
    try:
        async with httpx.AsyncClient() as http:
            answer = await http.post(f"{BRIDGE}/v1/dev/token", json=wanted)
            return str(answer.raise_for_status().json()["token"])
    except httpx.HTTPError as error:
        raise UnavailableError(f"no token from {BRIDGE}: {error}") from error


async def _poke(publisher: HttpPublisher, owner: str, newest: int) -> None:
    await publisher.poke(owner)
    with _database() as database:
        database.execute(
            "UPDATE notes SET poked = 1 WHERE owner = ? AND id <= ? AND NOT poked", (owner, newest)
        )


async def _sweep(publisher: HttpPublisher) -> None:
    """Poke for committed notes whose poke failed, because a process died or the bridge was away."""
    while True:
        with _database() as database:
            owed = database.execute(
                "SELECT owner, max(id) FROM notes WHERE NOT poked GROUP BY owner LIMIT 100"
            ).fetchall()
        for owner, newest in owed:
            try:
                await _poke(publisher, owner, newest)
            except PokebridgeError:
                break  # the bridge is away: next time
        await asyncio.sleep(SWEEP_EVERY_S)


@asynccontextmanager
async def _life(app: FastAPI) -> AsyncIterator[None]:
    DATABASE.parent.mkdir(parents=True, exist_ok=True)
    with _database() as database:
        database.executescript(TABLE)
    # The bridge may start later: each poke asks for a token, and the sweep repeats what failed.
    async with HttpPublisher(BRIDGE, _token) as publisher:
        app.state.publisher = publisher
        sweep = asyncio.create_task(_sweep(publisher))
        yield
        sweep.cancel()


app = FastAPI(lifespan=_life)


@app.post("/notes", status_code=201)
async def add(note: NewNote) -> dict[str, Any]:
    """Commit first, then poke, so that a pull after the poke finds the note."""
    with _database() as database:
        number = database.execute(
            "INSERT INTO notes (owner, text) VALUES (?, ?) RETURNING id", (note.owner, note.text)
        ).fetchone()[0]
    with suppress(PokebridgeError):  # it is committed, and the sweep will poke
        await _poke(app.state.publisher, note.owner, number)
    return {"id": number}


@app.get("/notes")
def since(owner: str, after: Annotated[int, Query(ge=0)] = 0) -> list[dict[str, Any]]:
    """The notes of ``owner`` that came after ``after``: small, by cursor, and often empty."""
    with _database() as database:
        rows = database.execute(
            "SELECT id, text FROM notes WHERE owner = ? AND id > ? ORDER BY id LIMIT 100",
            (owner, after),
        ).fetchall()
    return [{"id": number, "text": text} for number, text in rows]
