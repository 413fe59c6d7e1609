"""The HTTP API of an instance, in this process: real tokens and mailbox, no socket."""

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import httpx
from prometheus_client import CollectorRegistry

from pokebridge.api.app import MailboxSide, Parts
from pokebridge.asgi import ASGIApp
from pokebridge.cluster.history import HistoryEntry
from pokebridge.cluster.load import ClusterLoad, ClusterStatus, InstanceStatus
from pokebridge.cluster.node import Home
from pokebridge.cluster.watchers import Watchers
from pokebridge.coordination.base import Member
from pokebridge.durations import RequestDurations
from pokebridge.errors import TransportError
from pokebridge.gateway.roster import Whereabouts
from pokebridge.mailbox.base import Mailbox
from pokebridge.mailbox.devices import KnownDevices
from pokebridge.mailbox.memory import MemoryMailbox
from pokebridge.model import Mode, NewMessage, Poke, Receipt
from pokebridge.sharding import shard_of
from pokebridge.tokens import TokenVerifier, sign_token
from pokebridge.wire import ListedSession

SECRET = "0123456789abcdef0123456789abcdef"
INSTANCE = "instance-a"
BASE_URL = "http://a.example:8080"
ALICE = "urn:user:alice"
BOB = "urn:user:bob"
ENTRY = HistoryEntry("joined:instance-a:1", 1_700_000_000_000, "joined", INSTANCE, "it joined")


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
    home: Home | None = None
    transport_is_down: bool = False
    has_a_defect: bool = False

    def parts(self) -> Parts:
        """The parts of an instance without ``--dev``."""
        return Parts(
            verifier=TokenVerifier(secret=SECRET),
            publish=self.publish,
            disconnect=self.disconnect,
            mailbox=self.mailbox_side(self.mailbox),
            cluster=self,
            watchers=_Watchers(self),
            not_ready=self._not_ready,
            registry=CollectorRegistry(),
            requests=RequestDurations(),
        )

    def mailbox_side(self, mailbox: Mailbox) -> MailboxSide:
        """What the calls about messages work on."""
        return MailboxSide(
            mailbox=mailbox,
            send=self._send,
            on_pulled=lambda recipient, version: self.pulled.append((recipient, version)),
            devices=KnownDevices(mailbox),
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

    async def publish(self, pokes: Sequence[Poke]) -> None:
        """Note the pokes."""
        if self.transport_is_down:
            raise TransportError("the transport does not answer")
        self.pokes.extend(pokes)

    async def disconnect(self, recipient: str) -> None:
        """Note the recipient."""
        self.disconnected.append(recipient)

    def home_of(self, recipient: str) -> Home:
        """This instance, unless the test names another."""
        return self.home or Home(shard_of(recipient, 100), INSTANCE, "")

    def status(self) -> ClusterStatus:
        """A cluster of one."""
        if self.has_a_defect:
            raise ZeroDivisionError("a secret detail")
        member = Member(INSTANCE, "ws://a.example/v1/connect", "1", 1.0, 0, sessions=2)
        return ClusterStatus(
            name="default",
            engine="memory",
            mode="fanout",
            epoch=1,
            shard_count=100,
            instances=[InstanceStatus(member, "serving", [0, 1])],
            load=ClusterLoad(1.5, 1.5, 1),
            noise_ratio=0.25,
            red_line_ops_per_s=5000,
            is_over_red_line=False,
            seen_by=INSTANCE,
            history_count=1,
            trouble="",
        )

    @property
    def history(self) -> Iterable[HistoryEntry]:
        """One entry."""
        return [ENTRY]

    async def migrate(self, mode: Mode, *, force: bool) -> None:
        """Note the mode."""
        self.modes.append((mode, force))

    async def whereabouts(self, recipient: str) -> Whereabouts:
        """Connected here, with one device."""
        session = ListedSession("phone", "192.0.2.1", 1_700_000_000, 3)
        return Whereabouts({INSTANCE: [session]}, ["instance-b"])

    async def drain(self, instance: str) -> None:
        """Note the instance."""
        self.drained.append(instance)

    async def _not_ready(self) -> Sequence[str]:
        return self.not_ready


class _Watchers(Watchers):
    def __init__(self, world: World) -> None:
        super().__init__(world.status, world.publish, lambda _: False, world.pokes.append)
        self._world = world

    def add(self, recipient: str) -> float:
        """Note the recipient."""
        self._world.watching.append(recipient)
        return 30.0


def bearer(subject: str, scopes: str = "") -> dict[str, str]:
    """The header that carries a token for ``subject``."""
    return {"Authorization": f"Bearer {sign_token(SECRET, subject, scopes.split())}"}


@asynccontextmanager
async def http_client(app: ASGIApp) -> AsyncIterator[httpx.AsyncClient]:
    """A client of ``app`` that sees its 500s, as one over a socket does."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url=BASE_URL) as client:
        yield client
