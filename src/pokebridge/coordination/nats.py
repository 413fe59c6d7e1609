"""Coordination through NATS: one JetStream key-value bucket for each cluster.

The bucket ``pokebridge-CLUSTER`` (stream ``KV_pokebridge-CLUSTER``) has these keys:

member.ID    a member's record and the length of its lease
leader       the leader and the length of its lease
document     the shared document; the entry's revision is the document's

The server's clock times the leases: the time at which it stored an entry, and the time that it
reports now. NATS's own expiry (``Nats-TTL``) counts whole seconds, so it only cleans up. The
reader's clock would not suffice: after its start a reader could not tell how old an entry is.

An empty message on ``pokebridge.CLUSTER.changed`` announces each change. A watcher of the bucket
would receive every renewal of every member, which is N² messages.

Each new connection creates the bucket if it is missing, for example because the server lost it.
"""

import asyncio
import json
import math
import random
import time
from base64 import b64decode
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Self, TypeVar

import msgspec
from nats import errors
from nats.aio.msg import Msg
from nats.js.api import DiscardPolicy, StreamConfig
from nats.js.errors import APIError, NotFoundError

from pokebridge.coordination.base import Document, Member
from pokebridge.coordination.store_connection import (
    CALL_TIMEOUT_S,
    DIAL_TIMEOUT_S,
    Announced,
    StoreConnection,
    decode_all,
    encode,
)
from pokebridge.engines.addresses import first_of
from pokebridge.engines.nats import (
    URL_OPTIONS,
    NatsClient,
    client_options,
    dial_server,
    refusal_of,
    servers_in,
)
from pokebridge.engines.urls import url_options, without_secrets
from pokebridge.errors import ConfigError

T = TypeVar("T")

_OLDEST_SERVER = (2, 11)  # the first with expiry of single entries and batched reads
_PART = "coordination"
_OPTIONS = URL_OPTIONS | {"replicas"}
_MOST_MEMBERS = 1024  # the server's limit for one request
_LEAVE_ATTEMPTS = 3
_MOST_AHEAD_S = 3600.0
# JetStream's error codes.
_NO_MESSAGE = 10037
_NAME_IN_USE = 10058
_WRONG_REVISION = frozenset({10071, 10164})
_MARKERS = ("KV-Operation", "Nats-Marker-Reason")


@dataclass(frozen=True, slots=True)
class _Joined:
    member: Member
    lease_s: float


@dataclass(frozen=True, slots=True)
class _Led:
    holder: str
    lease_s: float


@dataclass(frozen=True, slots=True)
class _Entry:
    """An entry of the bucket.

    ``stamped_s`` is the time at which the server stored it. ``is_gone``: it marks a deletion.
    """

    value: bytes
    revision: int
    stamped_s: float
    is_gone: bool


_joined = msgspec.json.Decoder(_Joined)
_led = msgspec.json.Decoder(_Led)


class NatsCoordination:
    """Coordination in a bucket, over one connection. Create it with :meth:`connect`."""

    is_shared = True
    is_static = False

    def __init__(self, url: str, cluster: str, replicas: int) -> None:
        self._servers = servers_in(_PART, url)
        self._url = url
        self._cluster = cluster
        self._replicas = replicas
        # Set at each change, and cleared by the wait that it ends.
        self._changed = asyncio.Event()
        self._announced = Announced()
        self._connection = StoreConnection(
            without_secrets(url),
            dial=self._dial,
            is_up=lambda bucket: not bucket.lost.done(),
            hang_up=lambda bucket: bucket.close(),
            failures=(errors.Error,),
            text_of=_text_of,
        )

    @classmethod
    async def connect(cls, url: str, *, cluster: str) -> Self:
        """Connect to the servers, and create the bucket if it is missing.

        Args:
            url: the servers, as described in :mod:`pokebridge.engines.nats`. The option
                ``replicas`` (default 1) applies when the bucket is created.
            cluster: the cluster's name.

        Raises:
            ConfigError: the URL is invalid, or a file is unreadable.
            CoordinationError: no server is available, or it refuses, or has no JetStream.
        """
        replicas = url_options(_PART, url, _OPTIONS).get("replicas", "1")
        if not replicas.isdecimal() or not 1 <= int(replicas) <= 5:
            raise ConfigError("the coordination URL's option replicas must be 1 to 5")
        store = cls(url, cluster, int(replicas))
        try:
            await store._connection.call(_nothing)
        except BaseException:
            await store.close()
            raise
        store._changed.clear()
        return store

    async def renew(self, member: Member, lease_s: float) -> None:
        """Store ``member``'s record, with a lease of ``lease_s`` seconds from now."""
        now = time.monotonic()
        is_news = self._announced.is_news(member, now)
        await self._connection.call(lambda bucket: bucket.renew(_Joined(member, lease_s), is_news))
        self._announced.note(member, now + lease_s)

    async def leave(self, member_id: str, incarnation: str) -> None:
        """End the lease, unless another incarnation has taken over."""
        self._announced.forget(member_id)
        await self._connection.call(lambda bucket: bucket.leave(member_id, incarnation))

    async def members(self) -> list[Member]:
        """Return the members whose lease lasts, ordered by id."""
        return await self._connection.call(lambda bucket: bucket.members())

    async def read(self) -> Document | None:
        """Return the shared document."""
        return await self._connection.call(lambda bucket: bucket.read())

    async def write(self, body: bytes, revision: int | None) -> bool:
        """Replace the document if its revision is ``revision``."""
        return await self._connection.call(lambda bucket: bucket.write(body, revision))

    async def lead(self, holder: str, lease_s: float) -> bool:
        """Lead, or go on leading, unless another holder leads."""
        return await self._connection.call(lambda bucket: bucket.lead(_Led(holder, lease_s)))

    async def resign(self, holder: str) -> None:
        """Stop leading, if ``holder`` leads."""
        await self._connection.call(lambda bucket: bucket.resign(holder))

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return at the next change, at a lost connection, or after ``timeout_s`` seconds."""
        await self._connection.call(_nothing)
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        self._changed.clear()

    async def close(self) -> None:
        """Close the connection. Idempotent."""
        await self._connection.close()

    async def _dial(self) -> "_Bucket":
        """Dial any server. A change may have been missed meanwhile, so dialling counts as one."""
        options = await asyncio.to_thread(client_options, _PART, self._url, _OPTIONS)
        dials = [
            partial(dial_server, server, options, self._open_bucket, _Bucket.close)
            for server in self._servers
        ]
        bucket = await first_of(random.sample(dials, len(dials)), _Bucket.close)
        self._changed.set()
        return bucket

    async def _open_bucket(self, server: str, options: dict[str, Any]) -> "_Bucket":
        bucket = _Bucket(self._cluster, self._changed)
        try:
            await bucket.open(server, options, self._replicas)
        except BaseException:
            await bucket.close()
            raise
        return bucket


class _Bucket:
    """A cluster's bucket over one connection, which counts as lost after the first error."""

    def __init__(self, cluster: str, changed: asyncio.Event) -> None:
        # Done when the connection is lost, with the reason.
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._cluster = cluster
        self._stream = f"KV_pokebridge-{cluster}"
        self._prefix = f"$KV.pokebridge-{cluster}."
        self._news = f"pokebridge.{cluster}.changed"
        self._changed = changed
        self._client = NatsClient(on_lost=self._on_lost)

    async def open(self, server: str, options: dict[str, Any], replicas: int) -> None:
        """Connect, subscribe to changes, and create the bucket if it is missing."""
        name = f"pokebridge {self._cluster}"
        await self._client.dial(
            server, options, name=name, timeout_s=DIAL_TIMEOUT_S, on_error=self._on_error
        )
        version = self._client.connected_server_version
        if (version.major, version.minor) < _OLDEST_SERVER:
            raise errors.Error(
                f"the server is NATS {version.major}.{version.minor}, older than 2.11"
            )
        await self._client.subscribe(self._news, cb=self._on_news)
        try:
            await self._now_s()
        except NotFoundError:
            await self._create(replicas)

    async def close(self) -> None:
        """Close the connection. Never raises."""
        await self._client.hang_up()

    # --- members ----------------------------------------------------------------------------------

    async def renew(self, joined: _Joined, is_news: bool) -> None:  # noqa: FBT001 - one caller
        await self._put(f"member.{joined.member.id}", encode(joined), ttl_s=joined.lease_s)
        if is_news:
            await self._announce()

    async def leave(self, member_id: str, incarnation: str) -> None:
        key = f"member.{member_id}"
        for _ in range(_LEAVE_ATTEMPTS):  # a renewal may intervene
            entry = await self._get(key)
            if entry is None or entry.is_gone:
                return
            if any(joined.member.incarnation != incarnation for joined in _decode(_joined, entry)):
                return
            if await self._remove(key, entry.revision):
                await self._announce()
                return

    async def members(self) -> list[Member]:
        now_s = await self._now_s()
        alive = [
            joined.member
            for entry in await self._list("member.>")
            for joined in _decode(_joined, entry)
            if _lasts(joined.lease_s, now_s - entry.stamped_s)
        ]
        return sorted(alive, key=lambda member: member.id)

    # --- the document -----------------------------------------------------------------------------

    async def read(self) -> Document | None:
        entry = await self._get("document")
        return None if entry is None or entry.is_gone else Document(entry.value, entry.revision)

    async def write(self, body: bytes, revision: int | None) -> bool:
        if revision is None:
            entry = await self._get("document")
            if entry is not None and not entry.is_gone:
                return False
            revision = 0 if entry is None else entry.revision
        if not await self._put("document", body, revision=revision):
            return False
        await self._announce()
        return True

    # --- the leader -------------------------------------------------------------------------------

    async def lead(self, led: _Led) -> bool:
        entry = await self._get("leader")
        if entry is not None:
            for other in _decode(_led, entry):
                if other.holder != led.holder:
                    age_s = await self._now_s() - entry.stamped_s
                    if _lasts(other.lease_s, age_s):
                        return False
        revision = 0 if entry is None else entry.revision
        return await self._put("leader", encode(led), ttl_s=led.lease_s, revision=revision)

    async def resign(self, holder: str) -> None:
        entry = await self._get("leader")
        if entry is not None and any(led.holder == holder for led in _decode(_led, entry)):
            await self._remove("leader", entry.revision)

    # --- entries ----------------------------------------------------------------------------------

    async def _put(
        self,
        key: str,
        value: bytes,
        *,
        ttl_s: float | None = None,
        revision: int | None = None,
        marker: dict[str, str] | None = None,
    ) -> bool:
        """Store an entry. False when ``revision`` is given and is not the entry's."""
        headers = dict(marker or {})
        if ttl_s is not None:
            # Later than the end of the lease, which the stamp decides: this only cleans up.
            headers["Nats-TTL"] = str(math.ceil(ttl_s) + 1)
        if revision is not None:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(revision)
        try:
            await self._ask(self._prefix + key, value, headers)
        except APIError as error:
            if error.err_code in _WRONG_REVISION:
                return False
            raise
        return True

    async def _remove(self, key: str, revision: int) -> bool:
        return await self._put(key, b"", ttl_s=0, revision=revision, marker={"KV-Operation": "DEL"})

    async def _get(self, key: str) -> _Entry | None:
        """Return the entry from the stream's leader, so that no write is missed."""
        request = encode({"last_by_subj": self._prefix + key})
        try:
            answer = await self._ask(f"$JS.API.STREAM.MSG.GET.{self._stream}", request)
        except APIError as error:
            if error.err_code == _NO_MESSAGE:
                return None
            raise
        message = answer["message"]
        headers = b64decode(message.get("hdrs", "")).decode("latin-1")
        return _Entry(
            b64decode(message.get("data", "")),
            message["seq"],
            _seconds(message["time"]),
            any(f"\n{marker}:" in headers for marker in _MARKERS),
        )

    async def _list(self, keys: str) -> list[_Entry]:
        """Return the entries whose keys match the pattern, in one request."""
        return await self._unless_lost(self._collect(keys))

    async def _collect(self, keys: str) -> list[_Entry]:
        inbox = self._client.new_inbox()
        answers = await self._client.subscribe(inbox)
        found: list[_Entry] = []
        try:
            request = encode({"multi_last": [self._prefix + keys], "batch": _MOST_MEMBERS})
            await self._client.publish(f"$JS.API.DIRECT.GET.{self._stream}", request, reply=inbox)
            while True:
                message = await answers.next_msg(timeout=CALL_TIMEOUT_S)
                headers = message.headers or {}
                status = headers.get("Status")
                if status in {"204", "404"}:  # the end of the list, or no entry
                    return found
                if status is not None:
                    reason = headers.get("Description", status)
                    raise errors.Error(f"listing the members failed: {reason}")
                if not any(marker in headers for marker in _MARKERS):
                    revision = int(headers["Nats-Sequence"])
                    stamped_s = _seconds(headers["Nats-Time-Stamp"])
                    found.append(_Entry(message.data, revision, stamped_s, is_gone=False))
        finally:
            await answers.unsubscribe()

    async def _now_s(self) -> float:
        """Return the server's time. Raises NotFoundError when the bucket is missing."""
        answer = await self._ask(f"$JS.API.STREAM.INFO.{self._stream}")
        return _seconds(answer["ts"])

    async def _create(self, replicas: int) -> None:
        """Create the bucket, unless another member just did.

        Its first revision is the time in µs. So when a bucket was lost and is created again, no
        revision is used a second time.
        """
        config = StreamConfig(
            name=self._stream,
            subjects=[f"{self._prefix}>"],
            max_msgs_per_subject=1,
            discard=DiscardPolicy.NEW,
            allow_direct=True,
            allow_msg_ttl=True,
            allow_rollup_hdrs=True,
            deny_delete=True,
            num_replicas=replicas,
            first_seq=time.time_ns() // 1000,
        )
        try:
            await self._unless_lost(self._client.jetstream().add_stream(config))
        except APIError as error:
            if error.err_code != _NAME_IN_USE:
                raise

    async def _ask(
        self, subject: str, payload: bytes = b"", headers: dict[str, str] | None = None
    ) -> Any:
        """Return JetStream's answer, or raise its refusal as APIError."""
        request = self._client.request(subject, payload, timeout=CALL_TIMEOUT_S, headers=headers)
        answer = json.loads((await self._unless_lost(request)).data)
        if "error" in answer:
            raise APIError.from_error(answer["error"])
        return answer

    # --- the connection ---------------------------------------------------------------------------

    async def _unless_lost(self, work: Coroutine[Any, Any, T]) -> T:
        """Await ``work``, and raise at once when the connection is lost."""
        task = asyncio.ensure_future(work)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            either: set[asyncio.Future[Any]] = {task, self.lost}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise errors.Error(self.lost.result())
            return task.result()
        finally:
            task.cancel()

    async def _announce(self) -> None:
        await self._client.publish(self._news)

    async def _on_news(self, _: Msg) -> None:
        self._changed.set()

    async def _on_error(self, error: Exception) -> None:
        """Give up the connection: an error such as a missing permission may concern any call."""
        self._lose(error)

    def _on_lost(self) -> None:
        self._lose(self._client.last_error or self._client.trouble)

    def _lose(self, error: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(refusal_of(error))
        self._changed.set()


async def _nothing(_: _Bucket) -> None:
    """Do nothing, for a call that only needs the connection."""


def _decode(decoder: msgspec.json.Decoder[T], entry: _Entry) -> list[T]:
    return [] if entry.is_gone else decode_all(decoder, [entry.value])


def _lasts(lease_s: float, age_s: float) -> bool:
    """Whether a lease lasts. It does not if it seems to be from far in the future.

    Then the server's clock was set back.
    """
    return -_MOST_AHEAD_S < age_s < lease_s


def _seconds(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp).timestamp()


def _text_of(error: Exception) -> str:
    if isinstance(error, errors.NoRespondersError):
        return "JetStream does not answer: enable it on the server"
    return str(error.description) if isinstance(error, APIError) else refusal_of(error)
