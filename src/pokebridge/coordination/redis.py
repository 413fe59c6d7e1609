"""Coordination through Redis or Valkey: a few keys in one hash slot, timed by the server's clock.

pokebridge:{CLUSTER}:members     hash: each member's id and its record
pokebridge:{CLUSTER}:leases      sorted set: each member's id by the end of its lease, Unix ms
pokebridge:{CLUSTER}:leader      string: the leader; the key expires with the lease
pokebridge:{CLUSTER}:document    hash: the shared document and its revision
pokebridge:{CLUSTER}:changes     stream with one entry, replaced at each change; waits read it

The braces are Redis's hash tag: on a Redis Cluster one node has all of these keys, and any node
says which one. Each change is one script, and so atomic. When a server has lost its data, the
cluster is empty until the members renew. They restore the document.
"""

import asyncio
import math
import time
from contextlib import suppress
from functools import partial
from typing import Any, Self
from urllib.parse import urlsplit

import msgspec
from redis.asyncio import Redis
from redis.exceptions import MovedError, RedisError, ResponseError

from pokebridge.coordination.base import Document, Member
from pokebridge.coordination.store_connection import (
    CALL_TIMEOUT_S,
    DIAL_TIMEOUT_S,
    Announced,
    StoreConnection,
    decode_all,
    encode,
)
from pokebridge.engines import text_of
from pokebridge.engines.addresses import first_of
from pokebridge.engines.redis import (
    REPLICA,
    connection_pool,
    hello_fields,
    is_replica,
    node_address,
    nodes_in,
    url_of,
)
from pokebridge.engines.urls import check_engine_url, without_secrets
from pokebridge.errors import CoordinationError

_CLOSE_TIMEOUT_S = 1.0

_NOW = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
"""
# KEYS: members, leases, changes. ARGV: id, record, lease in ms, '1' if it is a change. A lease of
# more than an hour is ignored: the server's clock was set back, or another program has written it.
# A record without a lease means that the server has lost that, as by an eviction: it gets another.
_RENEW = f"""{_NOW}
local function drop(from, upto)
    for _, gone in ipairs(redis.call('ZRANGE', KEYS[2], from, upto, 'BYSCORE')) do
        redis.call('HDEL', KEYS[1], gone)
    end
    redis.call('ZREMRANGEBYSCORE', KEYS[2], from, upto)
end
drop('-inf', now)
drop(now + 3600000, '+inf')
if redis.call('HLEN', KEYS[1]) > redis.call('ZCARD', KEYS[2]) then
    for _, id in ipairs(redis.call('HKEYS', KEYS[1])) do
        redis.call('ZADD', KEYS[2], 'NX', now + ARGV[3], id)
    end
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], now + ARGV[3], ARGV[1])
local last = redis.call('ZRANGE', KEYS[2], -1, -1, 'WITHSCORES')[2]
redis.call('PEXPIREAT', KEYS[1], last)
redis.call('PEXPIREAT', KEYS[2], last)
if ARGV[4] == '1' then
    redis.call('XADD', KEYS[3], 'MAXLEN', 1, '*', 'renewed', ARGV[1])
end
"""
# KEYS: members, leases, changes. ARGV: id, incarnation.
_LEAVE = """
local record = redis.call('HGET', KEYS[1], ARGV[1])
if record and cjson.decode(record).incarnation == ARGV[2] then
    redis.call('HDEL', KEYS[1], ARGV[1])
    redis.call('ZREM', KEYS[2], ARGV[1])
    redis.call('XADD', KEYS[3], 'MAXLEN', 1, '*', 'left', ARGV[1])
end
"""
# KEYS: members, leases. What is lost is an empty record.
_MEMBERS = f"""{_NOW}
local ids = redis.call('ZRANGE', KEYS[2], '(' .. now, '+inf', 'BYSCORE')
local records = {{}}
for i, id in ipairs(ids) do
    records[i] = redis.call('HGET', KEYS[1], id) or ''
end
for _ = redis.call('ZCARD', KEYS[2]) + 1, redis.call('HLEN', KEYS[1]) do
    table.insert(records, '')
end
return records
"""
# KEYS: document, changes. ARGV: body, revision to replace or ''. The first revision is the time in
# µs. So when a document was lost and is created again, no revision is used a second time.
_WRITE = """
local revision = redis.call('HGET', KEYS[1], 'revision')
if (revision or '') ~= ARGV[2] then
    return 0
end
if revision then
    redis.call('HINCRBY', KEYS[1], 'revision', 1)
else
    local clock = redis.call('TIME')
    redis.call('HSET', KEYS[1], 'revision', clock[1] .. string.format('%06d', clock[2]))
end
redis.call('HSET', KEYS[1], 'body', ARGV[1])
redis.call('XADD', KEYS[2], 'MAXLEN', 1, '*', 'wrote', 'document')
return 1
"""
# KEYS: leader. ARGV: holder, lease in ms. Only another program can have written a leader without a
# lease.
_LEAD = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] and redis.call('PTTL', KEYS[1]) > 0 then
    return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
# KEYS: leader. ARGV: holder.
_RESIGN = """
if redis.call('GET', KEYS[1]) == ARGV[1] then
    redis.call('DEL', KEYS[1])
end
"""

_members = msgspec.json.Decoder(Member)


class RedisCoordination:
    """Coordination in one hash slot. Create it with :meth:`connect`.

    Calls use one connection. A wait blocks its connection, so it has another.
    """

    is_shared = True
    is_static = False

    def __init__(
        self,
        connection: StoreConnection[Redis],
        waiting_connection: StoreConnection[Redis],
        cluster: str,
    ) -> None:
        self._connection = connection
        self._waiting_connection = waiting_connection
        keys = _Keys(cluster)
        self._member_keys = (keys.members, keys.leases, keys.changes)
        self._keys = keys
        self._announced = Announced()
        self._last_change = "0-0"

    @classmethod
    async def connect(cls, url: str, *, cluster: str) -> Self:
        """Connect to the server in ``url``.

        Args:
            url: the servers, as described in :mod:`pokebridge.engines.redis`. On a Redis Cluster,
                any nodes.
            cluster: the cluster's name.

        Raises:
            ConfigError: the URL is invalid.
            CoordinationError: the server is unavailable, or refuses.
        """
        check_engine_url("coordination", url)
        connections = [
            StoreConnection(
                without_secrets(url),
                dial=partial(_dial, url, cluster),
                is_up=lambda _: True,  # redis-py notices a broken connection when it is used
                hang_up=_hang_up,
                failures=(RedisError,),
                text_of=_text_of,
            )
            for _ in range(2)
        ]
        store = cls(connections[0], connections[1], cluster)
        try:
            await store._note_last_change()
        except BaseException:
            await store.close()
            raise
        return store

    async def renew(self, member: Member, lease_s: float) -> None:
        """Store ``member``'s record, with a lease of ``lease_s`` seconds from now."""
        now = time.monotonic()
        is_news = int(self._announced.is_news(member, now))
        keys = self._member_keys
        await self._run(_RENEW, keys, member.id, encode(member), _ms(lease_s), is_news)
        self._announced.note(member, now + lease_s)

    async def leave(self, member_id: str, incarnation: str) -> None:
        """End the lease, unless another incarnation has taken over."""
        self._announced.forget(member_id)
        await self._run(_LEAVE, self._member_keys, member_id, incarnation)

    async def members(self) -> list[Member]:
        """Return the members whose lease lasts, ordered by id.

        A lease without a record, or a record without a lease, means that the server lost data, as
        by an eviction. The members are unknown then until all have renewed: a list without them
        would move their shards.
        """
        records = await self._run(_MEMBERS, self._member_keys[:2])
        if lost := sum(not record for record in records):
            raise CoordinationError(
                f"the server has lost the records of {lost} members, until they renew"
            )
        return sorted(decode_all(_members, records), key=lambda member: member.id)

    async def read(self) -> Document | None:
        """Return the shared document."""
        key = self._keys.document
        values: Any = await self._connection.call(
            lambda redis: redis.hmget(key, "body", "revision")
        )
        body, revision = values
        if revision is None:
            return None
        try:
            return Document(body or b"", int(revision))
        except ValueError:  # another program has written it
            raise CoordinationError("the shard map in the store has an invalid revision") from None

    async def write(self, body: bytes, revision: int | None) -> bool:
        """Replace the document if its revision is ``revision``."""
        keys = (self._keys.document, self._keys.changes)
        known = "" if revision is None else str(revision)
        return bool(await self._run(_WRITE, keys, body, known))

    async def lead(self, holder: str, lease_s: float) -> bool:
        """Lead, or go on leading, unless another holder leads."""
        return bool(await self._run(_LEAD, (self._keys.leader,), holder, _ms(lease_s)))

    async def resign(self, holder: str) -> None:
        """Stop leading, if ``holder`` leads."""
        await self._run(_RESIGN, (self._keys.leader,), holder)

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return at the next change, or after ``timeout_s`` seconds."""
        key = self._keys.changes
        block_ms = max(1, _ms(timeout_s))  # 0 means no limit
        changes: Any = await self._waiting_connection.call(
            lambda redis: redis.xread({key: self._last_change}, block=block_ms),
            waits_s=timeout_s,
        )
        if changes:
            self._last_change = changes[0][1][-1][0].decode()

    async def close(self) -> None:
        """Close the connections. Idempotent."""
        await asyncio.gather(self._connection.close(), self._waiting_connection.close())

    async def _run(self, script: str, keys: tuple[str, ...], *values: Any) -> Any:
        return await self._connection.call(
            lambda redis: redis.eval(script, len(keys), *keys, *values)
        )

    async def _note_last_change(self) -> None:
        """Ignore the changes before this call."""
        key = self._keys.changes
        entries: Any = await self._connection.call(lambda redis: redis.xrevrange(key, count=1))
        if entries:
            self._last_change = entries[0][0].decode()


class _Keys:
    def __init__(self, cluster: str) -> None:
        prefix = f"pokebridge:{{{cluster}}}:"
        self.members = f"{prefix}members"
        self.leases = f"{prefix}leases"
        self.leader = f"{prefix}leader"
        self.document = f"{prefix}document"
        self.changes = f"{prefix}changes"


async def _dial(url: str, cluster: str) -> Redis:
    dials = [partial(_dial_node, url_of(node, url), cluster) for node in nodes_in(url)]
    return await first_of(dials, _hang_up)


async def _dial_node(url: str, cluster: str) -> Redis:
    try:
        return await _connect(url, cluster)
    except MovedError as elsewhere:  # another node of the Redis Cluster has the keys
        asked = urlsplit(url).hostname or ""
        node = node_address(elsewhere.host, elsewhere.port, asked)
        return await _connect(url_of(node, url), cluster)


async def _connect(url: str, cluster: str) -> Redis:
    pool = await asyncio.to_thread(
        connection_pool,
        "coordination",
        url,
        client_name=f"pokebridge:{cluster}",
        connections=1,
        dial_timeout_s=DIAL_TIMEOUT_S,
        answer_timeout_s=CALL_TIMEOUT_S,
    )
    redis = Redis.from_pool(pool)
    try:
        await redis.exists(_Keys(cluster).document)
        with suppress(ResponseError):  # for example a proxy that does not know HELLO
            said = await redis.execute_command("HELLO")  # type: ignore[no-untyped-call]  # theirs
            hello = hello_fields(said)
            if is_replica(hello) and hello.get(b"mode") != b"cluster":
                raise CoordinationError(f"{without_secrets(url)}: {REPLICA}")  # noqa: TRY301
    except BaseException:
        await _hang_up(redis)
        raise
    return redis


async def _hang_up(redis: Redis) -> None:
    with suppress(RedisError, OSError):
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            await redis.aclose()


def _ms(seconds: float) -> int:
    return math.ceil(seconds * 1000)


def _text_of(error: Exception) -> str:
    if isinstance(error, MovedError):
        return f"the keys have moved to {error.host}:{error.port}"
    return text_of(error)
