"""Coordination without a store: a fixed number of replicas with ordinals, as in a StatefulSet.

Every instance computes the same owners, ``shard % replicas``. They can't be changed at run time,
since there is no store to write to. A replica that is down still owns its shards. Until it is back,
the instances to which its clients reconnect subscribe to these shards as well.
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
    """The content of a ``static://`` URL."""

    ordinal: int
    """This instance's, from 0."""
    count: int
    url_pattern: str
    """A replica's URL with ``{ordinal}`` in it. Empty: no client is sent to another replica."""

    @classmethod
    def parse(cls, url: str, hostname: str) -> Self:
        """Parse ``url``. Without ``ordinal`` it is the number at the end of ``hostname``.

        Raises:
            ConfigError: the URL is invalid.
        """
        given = url_options("coordination", url, _OPTIONS)
        if urlsplit(url).netloc or urlsplit(url).path or "replicas" not in given:
            raise ConfigError("the coordination URL must be static://?ordinal=N&replicas=M")
        if "ordinal" not in given and (numbered := re.search(r"-(\d+)$", hostname)):
            given["ordinal"] = numbered[1]
        if "ordinal" not in given:
            raise ConfigError(
                "the coordination URL has no ordinal, and the host name "
                f"{hostname!r} does not end in one, as pokebridge-0 does"
            )
        ordinal, count = given["ordinal"], given["replicas"]
        if not (ordinal.isdecimal() and count.isdecimal() and int(ordinal) < int(count)):
            raise ConfigError(
                f"the coordination URL's ordinal {ordinal!r} is invalid: with {count!r} replicas"
                " it must be 0 or more, and less than their number"
            )
        pattern = given.get("url", "")
        if pattern and (_PLACEHOLDER not in pattern or not re.match(r"wss?://\S+$", pattern)):
            raise ConfigError(
                "the coordination URL's option url must be a ws:// or wss:// URL with {ordinal}"
            )
        return cls(int(ordinal), int(count), pattern)


class StaticCoordination:
    """A fixed cluster (:class:`~pokebridge.coordination.base.Coordination`).

    All replicas are always members. The other members' ids follow from this instance's: for
    ``pokebridge-0`` they are ``pokebridge-1`` and so on. If its id does not end in its ordinal,
    they are ``replica-1`` and so on.
    """

    is_shared = True
    is_static = True

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
    async def connect(cls, url: str, *, instance: str, shard_count: int, mode: Mode) -> Self:
        """Create the cluster that ``url`` describes.

        Args:
            url: ``static://?ordinal=0&replicas=3``. Without ``ordinal`` it is the number at the end
                of the host name. With ``&url=wss://pokebridge-{ordinal}.example.com`` clients are
                sent to the owner of their shard.
            instance: this instance's id.
            shard_count: the number of shards.
            mode: the cluster's mode, which can't be changed.

        Raises:
            ConfigError: the URL is invalid.
        """
        replicas = Replicas.parse(url, socket.gethostname())
        return cls(replicas, instance=instance, shard_count=shard_count, mode=mode)

    async def renew(self, member: Member, lease_s: float) -> None:  # noqa: ARG002 - no lease
        """Keep this instance's own record. The other instances do not see it."""
        self._check_open()
        if member.id == self._instance:
            self._members[member.id] = member

    async def leave(self, member_id: str, incarnation: str) -> None:  # noqa: ARG002
        """Do nothing: a replica that is down remains a member."""
        self._check_open()

    async def members(self) -> list[Member]:
        """Return all replicas, ordered by id."""
        self._check_open()
        return [member for _, member in sorted(self._members.items())]

    async def read(self) -> Document | None:
        """Return the shard map, in the format of :mod:`pokebridge.cluster.membership`."""
        self._check_open()
        return self._document

    async def write(self, body: bytes, revision: int | None) -> bool:  # noqa: ARG002
        """Refuse, since no other instance would read it."""
        self._check_open()
        raise CoordinationError(
            "with static:// the mode and the owners are settings: change them there, and restart"
        )

    async def lead(self, holder: str, lease_s: float) -> bool:  # noqa: ARG002
        """Return False: nobody leads, since there is nothing to plan."""
        self._check_open()
        return False

    async def resign(self, holder: str) -> None:  # noqa: ARG002
        """Do nothing."""
        self._check_open()

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return after ``timeout_s`` seconds or when closed, since nothing ever changes."""
        self._check_open()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._closed.wait()

    async def close(self) -> None:
        """Refuse all further calls. Idempotent."""
        self._closed.set()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise CoordinationError("static://: closed")
