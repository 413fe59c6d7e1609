"""A pull endpoint as Replicache calls it, and pushes that poke. The bridge keeps no messages.

Replicache (https://doc.replicache.dev/reference/server-pull) asks with the ``cookie`` of its last
pull and gets a patch; a poke tells it when to ask. Its cookie is our version: the number of the
newest change in the space. Here the space is one list of todos, kept in memory.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from fastapi import FastAPI
from pydantic import BaseModel, Field

from pokebridge.publisher import HttpPublisher

BRIDGE = os.environ.get("BRIDGE_URL", "http://127.0.0.1:8080")
SPACE = "urn:space:todos"
"""Whom to poke: all who look at the list connect with a token for it."""


class Mutation(BaseModel):
    """What a client has done to its own copy already."""

    id: int
    name: str
    args: dict[str, Any]
    client_id: str = Field(alias="clientID")


class Push(BaseModel):
    """Mutations in order."""

    mutations: list[Mutation]


class Pull(BaseModel):
    """``cookie`` is the version that the client has; ``None`` when it has nothing."""

    cookie: int | None = None


@dataclass
class Space:
    """The todos, when each changed, and the last mutation of each client."""

    version: int = 0
    todos: dict[str, tuple[int, dict[str, Any] | None]] = field(default_factory=dict)
    """Key → the version that it changed at, and its value; ``None`` once it is deleted."""
    last_mutations: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Client → the version, and the number of the mutation."""

    def apply(self, mutation: Mutation) -> None:
        """Do it, unless it was done before: a push may come twice."""
        _, last = self.last_mutations.get(mutation.client_id, (0, 0))
        if mutation.id <= last:
            return
        self.version += 1
        key = f"todo/{mutation.args['id']}"
        value = None if mutation.name == "deleteTodo" else mutation.args
        self.todos[key] = (self.version, value)
        self.last_mutations[mutation.client_id] = (self.version, mutation.id)

    def since(self, cookie: int) -> dict[str, Any]:
        """What changed after ``cookie``, as a patch."""
        return {
            "cookie": self.version,
            "lastMutationIDChanges": {
                client: number
                for client, (version, number) in self.last_mutations.items()
                if version > cookie
            },
            "patch": [
                {"op": "del", "key": key}
                if value is None
                else {"op": "put", "key": key, "value": value}
                for key, (version, value) in self.todos.items()
                if version > cookie
            ],
        }


space = Space()


@asynccontextmanager
async def _life(app: FastAPI) -> AsyncIterator[None]:
    token = os.environ.get("POKEBRIDGE_TOKEN")
    if token is None:  # a development instance hands one out
        async with httpx.AsyncClient() as http:
            wanted = {"sub": "urn:service:todos", "scope": "poke", "ttl_s": 86_400}
            answer = await http.post(f"{BRIDGE}/v1/dev/token", json=wanted)
            token = str(answer.raise_for_status().json()["token"])
    async with HttpPublisher(BRIDGE, token) as publisher:
        app.state.publisher = publisher
        yield


app = FastAPI(lifespan=_life)


@app.post("/replicache/push")
async def push(pushed: Push) -> dict[str, Any]:
    """Apply the mutations, and have everybody who looks at the list pull."""
    before = space.version
    for mutation in pushed.mutations:
        space.apply(mutation)
    if space.version > before:
        await app.state.publisher.poke(SPACE)
    return {}


@app.post("/replicache/pull")
def pull(asked: Pull) -> dict[str, Any]:
    """The patch from the client's version to ours."""
    return space.since(asked.cookie or 0)
