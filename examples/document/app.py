"""Documents that several users write together, in the app's own tables. The bridge has no mailbox.

A document is a recipient, as a user is. A page listens to the document that it shows, beside its
user. A change and the pokes that it causes are committed together, so a poke is never forgotten.
"""

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
from fastapi import Body, Depends, FastAPI, HTTPException, Query
from fastapi.responses import FileResponse

from pokebridge.errors import PokebridgeError, UnavailableError
from pokebridge.publisher import HttpPublisher

HERE = Path(__file__).parent
BRIDGE = os.environ.get("BRIDGE_URL", "http://127.0.0.1:8080")
DATABASE = Path(os.environ.get("DOCUMENTS_DB", "var/documents.db"))
TABLES = """
CREATE TABLE IF NOT EXISTS documents (id INTEGER PRIMARY KEY AUTOINCREMENT, title TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS members (
    user TEXT NOT NULL, document INTEGER NOT NULL, PRIMARY KEY (user, document)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS paragraphs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, document INTEGER NOT NULL, text TEXT NOT NULL,
    revision INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS paragraphs_by_revision ON paragraphs (document, revision);
CREATE TABLE IF NOT EXISTS owed (
    id INTEGER PRIMARY KEY AUTOINCREMENT, recipient TEXT NOT NULL UNIQUE);
"""
RETRY_S = 1.0

Text = Annotated[str, Body(embed=True, max_length=10_000)]


@contextmanager
def _database() -> Iterator[sqlite3.Connection]:
    """A connection, committed at the end of the block."""
    with closing(sqlite3.connect(DATABASE)) as connection, connection:
        yield connection


def _owe(database: sqlite3.Connection, recipient: str) -> None:
    """Record a poke for ``recipient``, committed with the change that causes it."""
    database.execute("INSERT OR REPLACE INTO owed (recipient) VALUES (?)", (recipient,))
    app.state.is_owed.set()


async def _pay(publisher: HttpPublisher) -> None:
    """Publish the recorded pokes, and repeat each until the bridge has accepted it."""
    while True:
        app.state.is_owed.clear()
        with _database() as database:
            owed = database.execute("SELECT id, recipient FROM owed LIMIT 100").fetchall()
        try:
            await asyncio.gather(*(publisher.poke(recipient) for _, recipient in owed))
        except PokebridgeError:
            await asyncio.sleep(RETRY_S)
            continue
        with _database() as database:  # a later change has replaced this id
            database.executemany("DELETE FROM owed WHERE id = ?", [(number,) for number, _ in owed])
        if not owed:
            await app.state.is_owed.wait()


async def _token(recipient: str, scope: str = "") -> str:
    """A token. Your app signs its own; this one asks a development instance (docs/backend.md)."""
    try:
        async with httpx.AsyncClient() as http:
            wanted = {"sub": recipient, "scope": scope}
            answer = await http.post(f"{BRIDGE}/v1/dev/token", json=wanted)
            return str(answer.raise_for_status().json()["token"])
    except httpx.HTTPError as error:
        raise UnavailableError(f"no token from {BRIDGE}: {error}") from error


async def _client_token(recipient: str) -> dict[str, str]:
    try:
        return {"token": await _token(recipient)}
    except UnavailableError as error:
        raise HTTPException(503, str(error)) from error


@asynccontextmanager
async def _life(app: FastAPI) -> AsyncIterator[None]:
    DATABASE.parent.mkdir(parents=True, exist_ok=True)
    with _database() as database:
        database.executescript(TABLES)
    app.state.is_owed = asyncio.Event()
    async with HttpPublisher(BRIDGE, lambda: _token("urn:service:documents", "poke")) as publisher:
        paying = asyncio.create_task(_pay(publisher))
        yield
        paying.cancel()


app = FastAPI(lifespan=_life)


# -- who may what ---------------------------------------------------------------------------------


def _user(user: Annotated[str, Query(pattern="^[a-z]{1,32}$")]) -> str:
    """Your app takes the user from its own session, never from the URL."""
    return user


def _member(user: Annotated[str, Depends(_user)], document: int) -> str:
    """A user who may read and write ``document``."""
    with _database() as database:
        found = database.execute(
            "SELECT 1 FROM members WHERE user = ? AND document = ?", (user, document)
        ).fetchone()
    if not found:
        raise HTTPException(404, f"{user} has no document {document}")
    return user


User = Annotated[str, Depends(_user)]
Member = Annotated[str, Depends(_member)]


@app.post("/token")
async def user_token(user: User) -> dict[str, str]:
    """Return the token with which the page gets pokes for its user."""
    return await _client_token(f"urn:user:{user}")


@app.post("/documents/{document}/token")
async def document_token(document: int, _: Member) -> dict[str, str]:
    """Return the token with which it gets pokes for the document. Only members get one."""
    return await _client_token(f"urn:doc:{document}")


# -- the documents --------------------------------------------------------------------------------


@app.get("/documents")
async def documents(user: User) -> list[dict[str, Any]]:
    """The documents of a user."""
    with _database() as database:
        rows = database.execute(
            "SELECT id, title FROM documents JOIN members ON document = id WHERE user = ?"
            " ORDER BY id",
            (user,),
        ).fetchall()
    return [{"id": number, "title": title} for number, title in rows]


@app.post("/documents", status_code=201)
async def create(user: User, text: Text) -> dict[str, int]:
    """Create a document with the title ``text``. Only its user sees it."""
    with _database() as database:
        number = database.execute(
            "INSERT INTO documents (title) VALUES (?) RETURNING id", (text,)
        ).fetchone()[0]
        _admit(database, user, number)
    return {"id": number}


@app.put("/documents/{document}/members/{guest}", status_code=204)
async def share(document: int, guest: str, _: Member) -> None:
    """Let ``guest`` read and write it. A poke makes the guest's pages load the list again."""
    with _database() as database:
        _admit(database, guest, document)


def _admit(database: sqlite3.Connection, user: str, document: int) -> None:
    database.execute("INSERT OR IGNORE INTO members VALUES (?, ?)", (user, document))
    _owe(database, f"urn:user:{user}")


@app.get("/documents/{document}")
async def changes(
    document: int, _: Member, after: Annotated[int, Query(ge=0)] = 0
) -> dict[str, Any]:
    """The paragraphs that were written after revision ``after``, and the newest revision."""
    with _database() as database:
        rows = database.execute(
            "SELECT id, text, revision FROM paragraphs WHERE document = ? AND revision > ?"
            " ORDER BY revision",
            (document, after),
        ).fetchall()
    return {
        "revision": rows[-1][2] if rows else after,
        "paragraphs": [{"id": number, "text": text} for number, text, _ in rows],
    }


@app.post("/documents/{document}/paragraphs", status_code=204)
async def add(document: int, _: Member, text: Text) -> None:
    """Append a paragraph."""
    with _database() as database:
        database.execute(
            "INSERT INTO paragraphs (document, text, revision) VALUES (?1, ?2, 1 + ifnull("
            " (SELECT max(revision) FROM paragraphs WHERE document = ?1), 0))",
            (document, text),
        )
        _owe(database, f"urn:doc:{document}")


@app.put("/documents/{document}/paragraphs/{paragraph}", status_code=204)
async def write(document: int, paragraph: int, _: Member, text: Text) -> None:
    """Replace a paragraph. If two users do so at once, the later one wins."""
    with _database() as database:
        database.execute(
            "UPDATE paragraphs SET text = ?3, revision = 1 +"
            " (SELECT max(revision) FROM paragraphs WHERE document = ?1)"
            " WHERE document = ?1 AND id = ?2",
            (document, paragraph, text),
        )
        _owe(database, f"urn:doc:{document}")


# -- the page -------------------------------------------------------------------------------------


@app.get("/")
async def page() -> FileResponse:
    """The page."""
    return FileResponse(HERE / "index.html")


@app.get("/pokebridge.js")
async def client() -> FileResponse:
    """The built client, one file."""
    return FileResponse(HERE.parents[1] / "clients" / "js" / "dist" / "index.js")
