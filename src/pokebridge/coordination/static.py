"""No coordination at all: a fixed number of replicas with ordinals, as a StatefulSet has them.

Every instance computes the same owners, ``shard % replicas``, and nobody can change them at run
time: there is nowhere to write. A replica that is away still owns its shards; its clients are
served wherever they reconnect, by interest, until it is back.
"""

import asyncio
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

import msgspec

from pokebridge.coordination.base import Document, Member
from pokebridge.engines.urls import url_options
from pokebridge.errors import ConfigError, CoordinationError
from pokebridge.model import Mode
from pokebridge.placement import ShardMap

_OPTIONS = frozenset({"ordinal", "replicas", "url"})
_PLACEHOLDER = "{ordinal}"
_REVISION = 1


@dataclass(frozen=True, slots=True)
class Replicas:
    """What the URL says: this instance's ordinal, how many replicas, and where clients reach one.

    ``url_pattern`` has ``{ordinal}`` in it, or is empty: then nobody is led to another replica.
    """

    ordinal: int
    count: int
    url_pattern: str

    @classmethod
    def parse(cls, url: str, hostname: str) -> Self:
        """What ``url`` says; without an ``ordinal`` it is the number that ends ``hostname``.

        Raises:
            ConfigError: it makes no sense.
        """
        given = url_options("coordination", url, _OPTIONS)
        if urlsplit(url).netloc or urlsplit(url).path or "replicas" not in given:
            raise ConfigError("the coordination's URL is static://?ordinal=N&replicas=M")
        if "ordinal" not in given and (numbered := re.search(r"-(\d+)$", hostname)):
            given["ordinal"] = numbered[1]
        if "ordinal" not in given:
            raise ConfigError(
                "the coordination's URL: ordinal is missing, and the host name "
                f"{hostname!r} does not end in one, like pokebridge-0"
            )
        ordinal, count = given["ordinal"], given["replicas"]
        if not (ordinal.isdecimal() and count.isdecimal() and int(ordinal) < int(count)):
            raise ConfigError(
                f"the coordination's URL: ordinal {ordinal!r} is not one of {count!r} replicas,"
                " which are counted from 0"
            )
        pattern = given.get("url", "")
        if pattern and (_PLACEHOLDER not in pattern or not re.match(r"wss?://\S+$", pattern)):
            raise ConfigError(
                "the coordination's URL: url must be a ws:// or wss:// URL with {ordinal} in it"
            )
        return cls(int(ordinal), int(count), pattern)


class StaticCoordination:
    """A cluster that is known in advance (:class:`~pokebridge.coordination.base.Coordination`).

    All replicas are members at all times. The others' ids follow from this one's: ``pokebridge-0``
    knows ``pokebridge-1``; one whose id does not end in its ordinal calls them ``replica-1``.
    """

    def __init__(self, replicas: Replicas, *, instance: str, shard_count: int, mode: Mode) -> None:
        base = instance.removesuffix(f"-{replicas.ordinal}")
        base = "replica" if base == instance else base
        ids = [f"{base}-{ordinal}" for ordinal in range(replicas.count)]
        ids[replicas.ordinal] = instance
        self._members = {
            member_id: Member(
                id=member_id,
                url=replicas.url_pattern.replace(_PLACEHOLDER, str(ordinal)),
                incarnation="static",
                weight=1.0,
                joined_at_ms=0,
            )
            for ordinal, member_id in enumerate(ids)
        }
        owners = tuple(ids[shard % replicas.count] for shard in range(shard_count))
        shard_map = ShardMap(epoch=1, mode=mode, owners=owners)
        self._document = Document(msgspec.json.encode(shard_map), _REVISION)
        self._instance = instance
        self._closed = asyncio.Event()

    @classmethod
    async def connect(
        cls, url: str, *, cluster: str, instance: str, shard_count: int, mode: Mode
    ) -> Self:
        """The cluster that ``url`` describes.

        Args:
            url: ``static://?ordinal=0&replicas=3``. Without ``ordinal`` it is the number that ends
                the host name. With ``&url=wss://pokebridge-{ordinal}.example.com`` clients are led
                to their owner.
            cluster: any: there is nothing to keep apart.
            instance: this one's id.
            shard_count: how many shards the replicas share.
            mode: the cluster's, for good.

        Raises:
            ConfigError: the URL makes no sense.
        """
        del cluster
        replicas = Replicas.parse(url, socket.gethostname())
        return cls(replicas, instance=instance, shard_count=shard_count, mode=mode)

    async def renew(self, member: Member, lease_s: float) -> None:  # noqa: ARG002 - there is no lease
        """Know this instance's own record; the others learn nothing of it."""
        self._check_open()
        if member.id == self._instance:
            self._members[member.id] = member

    async def leave(self, member_id: str, incarnation: str) -> None:  # noqa: ARG002
        """Nothing: a replica that is away is a member all the same."""
        self._check_open()

    async def members(self) -> list[Member]:
        """All replicas, by id."""
        self._check_open()
        return [member for _, member in sorted(self._members.items())]

    async def read(self) -> Document | None:
        """The shard map, as :mod:`pokebridge.cluster.membership` writes one."""
        self._check_open()
        return self._document

    async def write(self, body: bytes, revision: int | None) -> bool:  # noqa: ARG002
        """Refuse: nobody else would read it."""
        self._check_open()
        raise CoordinationError(
            "with static:// the mode and the owners are settings: change them there, and restart"
        )

    async def lead(self, holder: str, lease_s: float) -> bool:  # noqa: ARG002
        """Nobody leads: there is nothing to plan."""
        self._check_open()
        return False

    async def resign(self, holder: str) -> None:  # noqa: ARG002
        """Nothing."""
        self._check_open()

    async def wait_for_change(self, timeout_s: float) -> None:
        """Nothing ever changes: return after ``timeout_s`` seconds, or when this is closed."""
        self._check_open()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._closed.wait()

    async def close(self) -> None:
        """Refuse every further call. May be called twice."""
        self._closed.set()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise CoordinationError("static://: closed")
