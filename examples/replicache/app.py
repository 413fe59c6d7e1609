"""Push and pull as Replicache calls them, and pokes after changes. The bridge keeps no messages.

Replicache (https://doc.replicache.dev/reference/server-pull) asks with the ``cookie`` of its last
pull and gets a patch; a poke tells it when to ask. Its cookie is our version: the number of the
newest change in the space. Here the space is one list of todos, kept in memory.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field

from pokebridge.errors import PokebridgeError, UnavailableError
from pokebridge.publisher import HttpPublisher

BRIDGE = os.environ.get("BRIDGE_URL", "http://127.0.0.1:8080")
PAGE = Path(__file__).parent / "web" / "dist"
SPACE = "urn:space:todos"
"""Whom to poke: all who look at the list connect with a token for it."""
REPEAT_AFTER_S = 1.0


ClientGroup = Annotated[str, Field(alias="clientGroupID")]
"""One browser profile. Its clients, tabs mostly, number their mutations each for itself."""


class Mutation(BaseModel):
    """A change that a client has already made to its own copy."""

    id: int
    name: str
    args: dict[str, Any]
    client: Annotated[str, Field(alias="clientID")]


class Push(BaseModel):
    """Mutations in order."""

    group: ClientGroup
    mutations: list[Mutation]


class Pull(BaseModel):
    """``cookie`` is the version that the client has; ``None`` when it has nothing."""

    group: ClientGroup
    cookie: int | None


@dataclass
class Space:
    """The todos, when each changed, and the last mutation of each client."""

    born: int
    """The version to begin with: above all that an earlier life of the app has given out."""
    version: int = field(init=False)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while somebody is still to be poked."""
    todos: dict[str, tuple[int, dict[str, Any] | None]] = field(default_factory=dict)
    """Key → the version that it changed at, and its value; ``None`` once it is deleted."""
    last_mutations: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    """Group and client → the version, and the number of the mutation."""

    def __post_init__(self) -> None:
        """Begin."""
        self.version = self.born

    def apply(self, group: str, mutation: Mutation) -> None:
        """Apply a mutation unless it was applied before, because a push may come twice."""
        _, last = self.last_mutations.get((group, mutation.client), (0, 0))
        if mutation.id <= last:
            return
        self.version += 1
        key = f"todo/{mutation.args['id']}"
        value = None if mutation.name == "deleteTodo" else mutation.args
        self.todos[key] = (self.version, value)
        self.last_mutations[group, mutation.client] = (self.version, mutation.id)
        self.changed.set()

    def since(self, group: str, cookie: int) -> dict[str, Any]:
        """What changed after ``cookie``, as a patch; what an earlier life knew goes."""
        patch: list[dict[str, Any]] = [{"op": "clear"}] if cookie < self.born else []
        for key, (version, value) in self.todos.items():
            if version > cookie:
                put = {"op": "put", "key": key, "value": value}
                patch.append({"op": "del", "key": key} if value is None else put)
        return {
            "cookie": self.version,
            "lastMutationIDChanges": {
                client: number
                for (its_group, client), (version, number) in self.last_mutations.items()
                if its_group == group and version > cookie
            },
            "patch": patch,
        }


space = Space(born=time.time_ns() // 1_000_000)


async def _token() -> str:
    """A token that allows pokes: your own service signs it, or a development instance does."""
    if given := os.environ.get("POKEBRIDGE_TOKEN"):
        return given
    wanted = {"sub": "urn:service:todos", "scope": "poke"}
    try:
        async with httpx.AsyncClient() as http:
            answer = await http.post(f"{BRIDGE}/v1/dev/token", json=wanted)
            return str(answer.raise_for_status().json()["token"])
    except httpx.HTTPError as error:
        raise UnavailableError(f"no token from {BRIDGE}: {error}") from error


async def _poke_on_changes(publisher: HttpPublisher) -> None:
    """Poke until the bridge has accepted it. Changes in between need no further poke."""
    while True:
        await space.changed.wait()
        space.changed.clear()
        try:
            await publisher.poke(SPACE)
        except PokebridgeError:  # the bridge is away
            space.changed.set()
            await asyncio.sleep(REPEAT_AFTER_S)


@asynccontextmanager
async def _life(_app: FastAPI) -> AsyncIterator[None]:
    # The bridge may start later: each poke asks for a token, and is repeated until it is taken.
    async with HttpPublisher(BRIDGE, _token) as publisher:
        poking = asyncio.create_task(_poke_on_changes(publisher))
        yield
        poking.cancel()


app = FastAPI(lifespan=_life)


@app.post("/replicache/push")
async def push(pushed: Push) -> dict[str, Any]:
    """Apply the mutations. Everybody who views the list is poked, also the sender."""
    for mutation in pushed.mutations:
        space.apply(pushed.group, mutation)
    return {}


@app.post("/replicache/pull")
async def pull(asked: Pull) -> dict[str, Any]:
    """Return the patch from the client's version to the server's."""
    return space.since(asked.group, asked.cookie or 0)


if PAGE.is_dir():  # it is built
    app.mount("/", StaticFiles(directory=PAGE, html=True))
else:

    @app.get("/")
    async def no_page() -> PlainTextResponse:
        """Say how to build the page."""
        return PlainTextResponse("Run npm ci && npm run build in examples/replicache/web first.\n")
