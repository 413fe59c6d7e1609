"""The HTTP API of an instance, in this process: real tokens and mailbox, no socket."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import httpx
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from pokebridge.api import schema
from pokebridge.api.app import Parts
from pokebridge.errors import TransportError
from pokebridge.mailbox.memory import MemoryMailbox
from pokebridge.model import Mode, NewMessage, Poke, Receipt
from pokebridge.sharding import shard_of
from pokebridge.tokens import TokenVerifier, sign_token

SECRET = "0123456789abcdef0123456789abcdef"
INSTANCE = "instance-a"
BASE_URL = "http://a.example:8080"
ALICE = "urn:user:alice"
BOB = "urn:user:bob"
EVENT = schema.Event("joined:instance-a:1", 1_700_000_000_000, "joined", INSTANCE, "it joined")


@dataclass
class World:
    """What stands behind the API, and what it was asked to do."""

    mailbox: MemoryMailbox = field(default_factory=MemoryMailbox)
    pokes: list[Poke] = field(default_factory=list)
    disconnected: list[str] = field(default_factory=list)
    drained: list[str] = field(default_factory=list)
    watching: list[str] = field(default_factory=list)
    pulled: list[tuple[str, int]] = field(default_factory=list)
    modes: list[tuple[Mode, bool]] = field(default_factory=list)
    not_ready: list[str] = field(default_factory=list)
    transport_is_down: bool = False
    has_a_defect: bool = False

    def parts(self) -> Parts:
        """The parts of an instance without ``--dev``."""
        return Parts(
            verify=TokenVerifier(secret=SECRET).verify,
            mailbox=self.mailbox,
            send=self._send,
            publish_pokes=self._publish_pokes,
            disconnect=self._disconnect,
            home_of=lambda recipient: (shard_of(recipient, 100), INSTANCE, ""),
            view_cluster=self._view_cluster,
            migrate=self._migrate,
            drain=self._drain,
            events=lambda: schema.Events(INSTANCE, 1, [EVENT]),
            watch=self._watch,
            not_ready=self._not_ready,
            registry=CollectorRegistry(),
            on_pull=lambda _: None,
            on_pulled=lambda recipient, version: self.pulled.append((recipient, version)),
        )

    def dev_parts(self) -> Parts:
        """The parts of an instance with ``--dev``."""
        return replace(
            self.parts(),
            allowed_origins=["*"],
            sign_dev_token=lambda subject, scopes, ttl_s: sign_token(
                SECRET, subject, scopes, ttl_s
            ),
        )

    async def _send(self, message: NewMessage) -> Receipt:
        return await self.mailbox.append(message)

    async def _publish_pokes(self, pokes: Sequence[Poke]) -> None:
        if self.transport_is_down:
            raise TransportError("the transport does not answer")
        self.pokes.extend(pokes)

    async def _disconnect(self, recipient: str) -> None:
        self.disconnected.append(recipient)

    def _view_cluster(self) -> schema.Cluster:
        if self.has_a_defect:
            raise ZeroDivisionError("a secret detail")
        instance = schema.Instance(INSTANCE, "ws://a.example/v1/connect", "serving", 2, [0, 1])
        traffic = schema.Traffic(1.5, 1.5, 5000, 0.25, over_red_line=False)
        return schema.Cluster("fanout", 1, 100, [instance], traffic)

    async def _migrate(self, mode: Mode, *, force: bool) -> None:
        self.modes.append((mode, force))

    def _watch(self, recipient: str) -> float:
        self.watching.append(recipient)
        return 30.0

    async def _drain(self, instance: str) -> None:
        self.drained.append(instance)

    async def _not_ready(self) -> Sequence[str]:
        return self.not_ready


def bearer(subject: str, scopes: str = "") -> dict[str, str]:
    """The header that carries a token for ``subject``."""
    return {"Authorization": f"Bearer {sign_token(SECRET, subject, scopes.split())}"}


@asynccontextmanager
async def http_client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of ``app`` that sees its 500s, as one over a socket does."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url=BASE_URL) as client:
        yield client
