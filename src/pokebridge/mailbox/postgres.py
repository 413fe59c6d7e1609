"""The mailbox in PostgreSQL, shared by all instances of a cluster on many machines.

Messages that are sent during a commit share the next batch (group commit), so one round trip and
one flush of the disk serve them all, whatever their recipients.
"""

import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit

from pokebridge.engines.postgres import Connection
from pokebridge.engines.urls import check_engine_url, unsplit
from pokebridge.errors import ConfigError, InputError
from pokebridge.mailbox.base import (
    ACKS_BATCH,
    FORGET_BATCH,
    PAGE_BYTES,
    RECEIPT_KEPT_MS,
    SEEN_EVERY_MS,
    UNLIMITED,
    Limits,
    MailboxStats,
    RecipientStats,
    is_utf8,
    page_of,
)
from pokebridge.mailbox.batcher import Batcher
from pokebridge.mailbox.postgres_migration import MIGRATION_TIMEOUT_S, check, is_up_to_date, migrate
from pokebridge.mailbox.postgres_pool import PostgresPool, Record
from pokebridge.mailbox.postgres_pushes import PostgresPushes
from pokebridge.mailbox.pushes import PushTiming
from pokebridge.model import MAX_VERSION, Ack, Message, NewMessage, Page, Poke, Receipt

DEFAULT_SCHEMA: Final = "pokebridge"
# The largest batch of messages, and how many batches a process has under way.
BATCH: Final = 512
BATCH_BYTES: Final = 4 * 1024 * 1024
APPENDERS: Final = 2
# A call that has waited this long for its turn is refused. With its round trip it ends within 12 s.
TURN_TIMEOUT_S: Final = 6.0
# Pulls with new messages that share a round trip: few, so that the answer does not grow too large.
READ_BATCH: Final = 16
READERS: Final = 4
# Long after the last attempt of a batch, which ends within seconds.
BATCH_KEPT_MS: Final = 10 * 60 * 1000
# Longer than other calls: a purge may delete several mailboxes of 64 MiB at once.
UPKEEP_TIMEOUT_S: Final = 30.0
STATS_TIMEOUT_S: Final = 300.0

# With a position that is durable once the append is.
APPEND: Final = """
SELECT versions, wal_position() FROM append_within_shares(
    $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14
) AS versions
"""
# For each pull: the recipient's head, a page from the same snapshot, and the message after the
# page, which shows that there is more.
READ: Final = """
SELECT given.n, heads.head, page.version, page.id, page.sender, page.body, page.sent_at_ms
FROM unnest($1::text[], $2::bigint[], $3::bigint[])
    WITH ORDINALITY AS given (recipient, after, max_bytes, n)
JOIN heads USING (recipient) CROSS JOIN LATERAL (
    SELECT * FROM (
        SELECT *, row_number() OVER w AS place,
            sum(octet_length(body)) OVER w - octet_length(body) AS bytes_before
        FROM (
            SELECT version, id, sender, body, sent_at_ms FROM messages
            WHERE messages.recipient = heads.recipient AND version > given.after
                AND (expires_ms IS NULL OR expires_ms > now_ms($5))
            ORDER BY version LIMIT $4
        ) AS fresh WINDOW w AS (ORDER BY version)
    ) AS sized WHERE bytes_before <= given.max_bytes OR place <= 2
) AS page ORDER BY given.n, page.version
"""
HEADS: Final = "SELECT recipient, head FROM heads WHERE recipient = ANY ($1::text[])"
INSPECT: Final = """
SELECT coalesce(head, 0), coalesce(kept_messages, 0), coalesce(kept_bytes, 0),
    (SELECT since_ms FROM outbox WHERE recipient = $1),
    ARRAY(SELECT device FROM devices WHERE recipient = $1 ORDER BY device),
    ARRAY(SELECT acked FROM devices WHERE recipient = $1 ORDER BY device)
FROM (SELECT $1::text AS wanted) AS asked LEFT JOIN heads ON recipient = wanted
"""
SEE_DEVICES: Final = "SELECT see_devices($1, $2, $3, $4)"
ACK_ALL: Final = "SELECT ack(unnest($1::text[]), unnest($2::text[]), unnest($3::bigint[]), $4, $5)"
# Concurrent sweepers never claim the same entry, since each skips the rows that another has locked.
CLAIM: Final = """
WITH late AS MATERIALIZED (
    SELECT recipient FROM outbox WHERE since_ms <= now_ms($3) - $1
    ORDER BY since_ms LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED
), early AS MATERIALIZED (
    SELECT recipient FROM outbox WHERE since_ms > now_ms($3)
    ORDER BY since_ms LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE outbox SET since_ms = now_ms($3)
FROM (SELECT recipient FROM late UNION ALL SELECT recipient FROM early LIMIT $2) AS claimed
WHERE outbox.recipient = claimed.recipient RETURNING outbox.recipient, outbox.version
"""
CONFIRM: Final = """
WITH published AS MATERIALIZED (
    SELECT outbox.recipient, given.version
    FROM unnest($1::text[], $2::bigint[]) AS given (recipient, version)
    JOIN outbox USING (recipient)
    ORDER BY outbox.recipient FOR NO KEY UPDATE OF outbox
), dropped AS (
    DELETE FROM outbox USING published
    WHERE outbox.recipient = published.recipient AND outbox.version <= published.version
)
UPDATE outbox SET since_ms = now_ms($3) FROM published
WHERE outbox.recipient = published.recipient AND outbox.version > published.version
"""
PURGE_MESSAGES: Final = "SELECT purge_messages($1, $2)"
PURGE_RECEIPTS: Final = "SELECT purge_receipts($1, now_ms($2) - $3)"
PURGE_BATCHES: Final = "SELECT purge_batches($1, now_ms($2) - $3)"
PURGE_DEVICES: Final = "SELECT purge_devices($1, now_ms($2) - $3)"
# The server (left out if it does not say), the database, and the schema.
IDENTITY: Final = r"""
SELECT concat_ws(' ', 'postgresql', substring(current_history() FROM ' (\d{15,})'),
    current_database(), current_schema())
"""
BEGIN_GENERATION: Final = "SELECT begin_generation(true)"
WAL_POSITION: Final = "SELECT wal_position()"
CLEAR: Final = "SELECT clear_recipient($1)"
STATS: Final = """
SELECT count(*) FILTER (WHERE head > 0), coalesce(sum(kept_messages), 0)::bigint,
    coalesce(sum(kept_bytes), 0)::bigint, (SELECT count(*) FROM devices),
    (SELECT count(*) FROM outbox), (SELECT min(sent_at_ms) FROM messages),
    (SELECT min(since_ms) FROM outbox), (SELECT count(*) FROM pushes WHERE due_ms IS NOT NULL),
    (SELECT count(*) FROM dead_pushes)
FROM heads
"""


class _Pull(NamedTuple):
    recipient: str
    after: int
    limit: int
    max_bytes: int
    head: int


class PostgresMailbox:
    """The mailbox in one schema of a PostgreSQL database. Create it with :meth:`open`.

    - ``pushes``: the pending pushes, or ``None``
    - ``identity``: the same for all that have this schema of this database
    - ``_pool``: the connections
    - ``_position``: a position that the server's write-ahead log has reached (bytes)
    - ``_clock``: Unix time in seconds; ``None``: the database's clock counts
    - ``_limits``: the limits of each recipient
    - ``_append``, ``_revoke``, ``_head``, ``_page``, ``_ack``, ``_see``: batch concurrent calls of
      one kind; a revocation is an append without limits
    """

    is_shared = True

    def __init__(
        self,
        pool: PostgresPool,
        clock: Callable[[], float] | None,
        limits: Limits,
        push_timing: PushTiming | None,
        identity: str,
    ) -> None:
        self.identity = identity
        self._pool = pool
        self._pool.on_connect = self._compare_position
        self._position = 0
        self._clock = clock
        self._limits = limits
        self.pushes = (
            None if push_timing is None else PostgresPushes(pool, push_timing, self._now_ms)
        )
        self._append, self._revoke = (
            Batcher[NewMessage, Receipt](
                partial(self._append_all, applying),
                timeout_s=TURN_TIMEOUT_S,
                workers=APPENDERS,
                max_count=BATCH,
                max_cost=BATCH_BYTES,
                cost=lambda message: len(message.body),
                key=lambda message: message.recipient,
            )
            for applying in (limits, UNLIMITED)
        )
        # Most pulls find nothing new. After a mass reconnect hundreds share a round trip.
        self._head = Batcher[str, int](
            self._read_heads, timeout_s=TURN_TIMEOUT_S, workers=2, max_count=BATCH, max_cost=0
        )
        self._page = Batcher[_Pull, Page](
            self._read_pages,
            timeout_s=TURN_TIMEOUT_S,
            workers=READERS,
            max_count=READ_BATCH,
            max_cost=0,
        )
        self._ack = Batcher[Ack, None](
            self._ack_together,
            timeout_s=TURN_TIMEOUT_S,
            workers=1,
            max_count=ACKS_BATCH,
            max_cost=0,
        )
        self._see = Batcher[tuple[str, str], None](
            self._see_all, timeout_s=TURN_TIMEOUT_S, workers=1, max_count=BATCH, max_cost=0
        )

    @classmethod
    async def open(
        cls,
        url: str,
        clock: Callable[[], float] | None = None,
        limits: Limits | None = None,
        push_timing: PushTiming | None = None,
    ) -> "PostgresMailbox":
        """Connect to ``url`` and bring its schema up to date.

        The URL is ``postgresql://USER:PASSWORD@HOST:PORT/DATABASE``. It may name several hosts for
        a failover, another schema than ``pokebridge`` (``?schema=NAME``), and libpq's parameters.
        ``clock`` gives Unix time in seconds; by default the database's clock counts. With a
        ``push_timing`` appends lead to pushes.

        Raises:
            ConfigError: the URL is invalid, or PostgreSQL refuses the role.
            MailboxError: PostgreSQL can't be reached.
        """
        dsn, schema = _split_schema(url)
        pool = PostgresPool(dsn, schema=schema)
        try:
            if not await pool.run(lambda it: is_up_to_date(it, schema)):
                await pool.run(lambda it: migrate(it, schema), timeout_s=MIGRATION_TIMEOUT_S)
            ((identity,),) = await pool.run(lambda it: it.fetch(IDENTITY))
        except BaseException:
            await pool.close()
            raise
        pool.is_open = True
        return cls(pool, clock, limits or Limits(), push_timing, identity)

    async def append(self, message: NewMessage) -> Receipt:
        """See the port."""
        _check_texts(message.recipient, message.sender, message.id)
        is_unlimited = self._limits.of(message.recipient) is UNLIMITED
        return await (self._revoke if is_unlimited else self._append)(message)

    async def read(
        self,
        recipient: str,
        *,
        after: int,
        limit: int,
        max_bytes: int = PAGE_BYTES,
        unless_head: int | None = None,
    ) -> Page:
        """See the port."""
        _check_texts(recipient)
        head = await self._head(recipient)
        if after >= head or head == unless_head:
            return page_of((), head=head, limit=limit, max_bytes=max_bytes)
        return await self._page(_Pull(recipient, max(0, after), limit, max_bytes, head))

    async def heads(self, recipients: Sequence[str]) -> Mapping[str, int]:
        """See the port."""
        rows = await self._pool.run(lambda connection: connection.fetch(HEADS, list(recipients)))
        return dict.fromkeys(recipients, 0) | dict(map(tuple, rows))

    async def see_device(self, recipient: str, device: str) -> None:
        """See the port."""
        _check_texts(recipient, device)
        if not self._limits.is_group(recipient):
            await self._see((recipient, device))

    async def ack(self, recipient: str, device: str, version: int) -> None:
        """See the port."""
        _check_texts(recipient, device)
        if not self._limits.is_group(recipient):
            await self._ack(Ack(recipient, device, version))

    async def ack_all(self, acks: Sequence[Ack]) -> None:
        """See the port."""
        # Sorted, so that calls of several processes take locks in the same order.
        own = sorted(self._limits.without_groups(acks))
        if not own:
            return
        recipients, devices, versions = zip(*own, strict=True)
        _check_texts(*recipients, *devices)
        acked = [max(0, min(version, MAX_VERSION)) for version in versions]
        parameters = (list(recipients), list(devices), acked, self._now_ms(), SEEN_EVERY_MS)
        await self._pool.run(lambda connection: connection.execute(ACK_ALL, *parameters))

    async def claim_outbox(self, *, older_than_s: float, limit: int) -> Sequence[Poke]:
        """See the port."""
        parameters = (int(older_than_s * 1000), limit, self._now_ms())
        rows = await self._pool.run(lambda connection: connection.fetch(CLAIM, *parameters))
        return [Poke(*row) for row in rows]

    async def confirm_outbox(self, pokes: Sequence[Poke]) -> None:
        """See the port."""
        newest: dict[str, int] = {}
        for poke in pokes:
            if poke.version is not None:
                newest[poke.recipient] = max(poke.version, newest.get(poke.recipient, 0))
        parameters = (list(newest), list(newest.values()), self._now_ms())
        await self._pool.run(lambda connection: connection.execute(CONFIRM, *parameters))

    async def purge(self, *, limit: int) -> int:
        """See the port."""
        now_ms = self._now_ms()
        forget_ms = int(self._limits.forget_device_s * 1000)
        purged = await self._count_of(PURGE_MESSAGES, limit, now_ms)
        purged += await self._count_of(PURGE_RECEIPTS, limit - purged, now_ms, RECEIPT_KEPT_MS)
        at_most = min(limit - purged, FORGET_BATCH)
        purged += await self._count_of(PURGE_DEVICES, at_most, now_ms, forget_ms)
        await self._take_time(PURGE_BATCHES, limit, now_ms, BATCH_KEPT_MS)
        return purged

    async def clear(self, recipient: str) -> int:
        """See the port."""
        return await self._count_of(CLEAR, recipient)

    async def inspect(self, recipient: str) -> RecipientStats:
        """See the port."""
        _check_texts(recipient)
        rows = await self._pool.run(lambda connection: connection.fetch(INSPECT, recipient))
        ((head, messages, size_bytes, since_ms, devices, acked),) = rows
        by_device = dict(zip(devices, acked, strict=True))
        return RecipientStats(head, messages, size_bytes, since_ms, by_device)

    async def begin_generation(self) -> int:
        """See the port."""
        return await self._count_of(BEGIN_GENERATION)

    async def stats(self) -> MailboxStats:
        """See the port."""
        (row,) = await self._take_time(STATS, timeout_s=STATS_TIMEOUT_S, reads_all=True)
        return MailboxStats(*row)

    async def check(self) -> None:
        """See the port."""
        await self._pool.run(check)

    async def close(self) -> None:
        """See the port."""
        for batcher in (self._append, self._revoke, self._head, self._page, self._ack, self._see):
            await batcher.close()
        await self._pool.close()

    async def _append_all(
        self, limits: Limits, messages: Sequence[NewMessage]
    ) -> list[Receipt | Exception]:
        """Commit ``messages`` in one batch. The batch has a unique id, so a retry is safe."""
        keys = [
            (message.sender, message.id) if message.has_idempotency_key else number
            for number, message in enumerate(messages)
        ]
        once: dict[tuple[str, str] | int, NewMessage] = {}
        for key, message in zip(keys, messages, strict=True):
            once.setdefault(key, message)
        new = once.values()
        timing = None if self.pushes is None else self.pushes.timing
        parameters = (
            uuid.uuid4(),
            [message.recipient for message in new],
            [message.sender for message in new],
            [message.id for message in new],
            [message.has_idempotency_key for message in new],
            [message.body for message in new],
            [self._limits.ttl_ms(message) for message in new],
            limits.max_messages,
            limits.max_bytes,
            self._now_ms(),
            [timing.concerns(message, self._limits) for message in new] if timing else None,
            timing.grace_ms if timing else None,
            limits.share_messages,
            limits.share_bytes,
        )
        ((versions, position),) = await self._pool.run(
            lambda connection: connection.fetch(APPEND, *parameters), waits_for_locks=False
        )
        self._position = max(self._position, position or 0)
        outcome = dict(zip(once, versions, strict=True))
        answers: list[Receipt | Exception] = []
        for key, message in zip(keys, messages, strict=True):
            version = outcome[key]
            if version is None:
                answers.append(limits.refuse_share())
            elif version == 0:
                answers.append(limits.refuse())
            else:
                answers.append(Receipt(message.id, abs(version), duplicate=version < 0))
                outcome[key] = -abs(version)  # for those in this batch that repeat it
        return answers

    async def _compare_position(self, connection: Connection) -> None:
        """Begin a generation if the same server's log is behind a position that it once had.

        This happens when its directory was put back as a copy, so every connection is a new one.
        """
        known = self._position  # an append may raise it while the server is asked
        if known:
            position = await connection.fetchval(WAL_POSITION)
            if position is not None and position < known:
                await connection.execute(BEGIN_GENERATION)
                self._position = position

    async def _read_heads(self, recipients: Sequence[str]) -> list[int | Exception]:
        heads = await self.heads(recipients)
        return [heads[recipient] for recipient in recipients]

    async def _read_pages(self, pulls: Sequence[_Pull]) -> list[Page | Exception]:
        parameters = (
            [pull.recipient for pull in pulls],
            [pull.after for pull in pulls],
            [pull.max_bytes for pull in pulls],
            max(pull.limit for pull in pulls) + 1,
            self._now_ms(),
        )
        rows = await self._pool.run(lambda connection: connection.fetch(READ, *parameters))
        heads = [pull.head for pull in pulls]
        found: list[list[Message]] = [[] for _ in pulls]
        for number, head, *message in rows:
            heads[number - 1] = head
            found[number - 1].append(Message(*message))
        return [
            page_of(messages, head=head, limit=pull.limit, max_bytes=pull.max_bytes)
            for pull, head, messages in zip(pulls, heads, found, strict=True)
        ]

    async def _ack_together(self, acks: Sequence[Ack]) -> list[Exception | None]:
        newest: dict[tuple[str, str], int] = {}
        for recipient, device, version in acks:
            key = (recipient, device)
            newest[key] = max(version, newest.get(key, 0))
        await self.ack_all([Ack(*key, version) for key, version in newest.items()])
        return [None] * len(acks)

    async def _see_all(self, seen: Sequence[tuple[str, str]]) -> list[Exception | None]:
        recipients, devices = zip(*seen, strict=True)
        parameters = (list(recipients), list(devices), self._now_ms(), SEEN_EVERY_MS)
        await self._pool.run(lambda connection: connection.execute(SEE_DEVICES, *parameters))
        return [None] * len(seen)

    async def _count_of(self, statement: str, *parameters: object) -> int:
        ((count,),) = await self._take_time(statement, *parameters)
        return int(count)

    async def _take_time(
        self,
        statement: str,
        *parameters: object,
        timeout_s: float = UPKEEP_TIMEOUT_S,
        reads_all: bool = False,
    ) -> list[Record]:
        """The rows of ``statement``, which may take longer than an ordinary call."""

        async def work(connection: Connection) -> list[Record]:
            async with connection.transaction():
                await connection.execute(f"SET LOCAL statement_timeout = '{timeout_s:.0f}s'")
                if reads_all:
                    await connection.execute("SET LOCAL enable_seqscan = on")
                return await connection.fetch(statement, *parameters, timeout=timeout_s)

        return await self._pool.run(work, timeout_s=timeout_s)

    def _now_ms(self) -> int | None:
        return None if self._clock is None else int(self._clock() * 1000)


def _check_texts(*texts: str) -> None:
    """Refuse texts that PostgreSQL can't store, since one would fail its whole batch."""
    for text in texts:
        if "\0" in text or not is_utf8(text):
            raise InputError("a recipient, sender, id or device must be UTF-8 without NUL")


# -- opening --------------------------------------------------------------------------------------


def _split_schema(url: str) -> tuple[str, str]:
    """The URL for the driver, without the parameter ``schema``, and that schema."""
    check_engine_url("mailbox", url)
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    schema = query.pop("schema", DEFAULT_SCHEMA)
    query["target_session_attrs"] = "read-write"  # of several hosts, the primary
    if re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", schema) is None:
        raise ConfigError("mailbox: schema must be lower-case letters, digits and underscores")
    return unsplit(parts._replace(query=urlencode(query))), schema
