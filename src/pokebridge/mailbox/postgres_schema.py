"""The tables and functions of the PostgreSQL mailbox, as migrations.

docs/mailbox.md explains their design. The row in ``heads`` is a recipient's lock. A transaction
takes it before it changes a recipient's data, and takes several in the order of the recipients. So
versions are dense, senders to different recipients never wait for each other, and there are no
deadlocks. Functions save round trips. Instances of two releases run side by side during a rolling
upgrade, so a function whose arguments change gets a new name, and the old one stays.
"""

from typing import Final

MIGRATION_LOCK: Final = int.from_bytes(b"pokebrdg", "big", signed=True)
"""The advisory lock under which a schema is changed."""

_TABLES = """
CREATE TABLE heads (
    recipient text COLLATE "C" PRIMARY KEY,
    head bigint NOT NULL DEFAULT 0,
    kept_messages bigint NOT NULL DEFAULT 0,
    kept_bytes bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05);

CREATE TABLE messages (
    recipient text COLLATE "C" NOT NULL,
    version bigint NOT NULL,
    id text COLLATE "C" NOT NULL,
    sender text COLLATE "C" NOT NULL,
    body bytea NOT NULL,
    sent_at_ms bigint NOT NULL,
    expires_ms bigint,
    PRIMARY KEY (recipient, version)
) WITH (autovacuum_vacuum_scale_factor = 0.05);
CREATE INDEX messages_by_expiry ON messages (expires_ms) WHERE expires_ms IS NOT NULL;

CREATE TABLE receipts (
    sender text COLLATE "C" NOT NULL,
    id text COLLATE "C" NOT NULL,
    version bigint NOT NULL,
    at_ms bigint NOT NULL,
    PRIMARY KEY (sender, id)
);
CREATE INDEX receipts_by_age ON receipts (at_ms);

-- What an append whose answer was lost has committed; kept for minutes.
CREATE TABLE batches (
    id uuid PRIMARY KEY,
    outcome bigint[] NOT NULL,
    at_ms bigint NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000);
CREATE INDEX batches_by_age ON batches (at_ms);

CREATE TABLE outbox (
    recipient text COLLATE "C" PRIMARY KEY,
    version bigint NOT NULL,
    since_ms bigint NOT NULL
) WITH (
    fillfactor = 50, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000
);
CREATE INDEX outbox_by_age ON outbox (since_ms);

CREATE TABLE devices (
    recipient text COLLATE "C" NOT NULL,
    device text COLLATE "C" NOT NULL,
    acked bigint NOT NULL,
    seen_ms bigint NOT NULL,
    PRIMARY KEY (recipient, device)
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05);
CREATE INDEX devices_by_seen ON devices (seen_ms);
"""

# All instances take the time from the one database, so that their clocks need not agree.
_NOW = """
CREATE FUNCTION now_ms(given bigint) RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT coalesce(given, (extract(epoch FROM now()) * 1000)::bigint)
$$;
"""

_APPEND = """
-- Commit messages; for each, in the order given: its version; the version that its id got before,
-- negative; or 0, when its recipient's mailbox is full.
CREATE FUNCTION append(
    a_batch uuid, a_recipients text[], a_senders text[], a_ids text[], a_ids_are_senders boolean[],
    a_bodies bytea[], a_ttls_ms bigint[], a_max_messages bigint, a_max_bytes bigint, a_now_ms bigint
) RETURNS bigint[] LANGUAGE plpgsql AS $$
DECLARE
    answer bigint[];
BEGIN
    SELECT outcome INTO answer FROM batches WHERE id = a_batch;
    IF FOUND THEN
        RETURN answer;
    END IF;
    INSERT INTO heads (recipient)
        SELECT DISTINCT recipient COLLATE "C" AS name FROM unnest(a_recipients) AS given (recipient)
        ORDER BY name ON CONFLICT DO NOTHING;
    PERFORM FROM heads WHERE recipient = ANY (a_recipients) ORDER BY recipient FOR NO KEY UPDATE;
    -- From here on a statement sees all that was committed to these recipients.
    WITH given AS MATERIALIZED (
        SELECT g.*, octet_length(g.body) AS size_bytes, receipts.version AS first
        FROM unnest(a_recipients, a_senders, a_ids, a_ids_are_senders, a_bodies, a_ttls_ms)
            WITH ORDINALITY AS g (recipient, sender, id, id_is_senders, body, ttl_ms, n)
        LEFT JOIN receipts
            ON g.id_is_senders AND receipts.sender = g.sender AND receipts.id = g.id
    ), placed AS MATERIALIZED (
        SELECT given.*, heads.head + row_number() OVER own AS version,
            heads.kept_messages + row_number() OVER own <= a_max_messages
                AND heads.kept_bytes + sum(given.size_bytes) OVER own <= a_max_bytes AS fits
        FROM given JOIN heads USING (recipient)
        WHERE given.first IS NULL
        WINDOW own AS (PARTITION BY given.recipient ORDER BY given.n)
    ), sums AS MATERIALIZED (
        SELECT recipient, max(version) AS head, count(*) AS messages, sum(size_bytes) AS bytes
        FROM placed WHERE fits GROUP BY recipient
    ), raised AS (
        UPDATE heads SET head = sums.head, kept_messages = kept_messages + sums.messages,
            kept_bytes = kept_bytes + sums.bytes
        FROM sums WHERE heads.recipient = sums.recipient
    ), kept AS (
        INSERT INTO messages
        SELECT recipient, version, id, sender, body, now_ms(a_now_ms), now_ms(a_now_ms) + ttl_ms
        FROM placed WHERE fits
    ), owed AS (
        INSERT INTO outbox SELECT recipient, head, now_ms(a_now_ms) FROM sums ORDER BY recipient
        ON CONFLICT (recipient) DO UPDATE SET version = excluded.version
    ), receipted AS (
        INSERT INTO receipts SELECT sender, id, version, now_ms(a_now_ms)
        FROM placed WHERE fits AND id_is_senders ORDER BY sender, id
    )
    INSERT INTO batches
        SELECT a_batch, array_agg(
            CASE WHEN given.first IS NOT NULL THEN -given.first
                WHEN placed.fits THEN placed.version ELSE 0 END ORDER BY n), now_ms(a_now_ms)
        FROM given LEFT JOIN placed USING (n)
    RETURNING outcome INTO answer;
    RETURN answer;
END $$;
"""

_DEVICES = """
CREATE FUNCTION see_devices(
    a_recipients text[], a_devices text[], a_now_ms bigint, a_every_ms bigint
) RETURNS void LANGUAGE sql AS $$
    INSERT INTO devices
        SELECT DISTINCT g.recipient COLLATE "C" AS r, g.device COLLATE "C" AS d, 0, now_ms(a_now_ms)
        FROM unnest(a_recipients, a_devices) AS g (recipient, device)
        WHERE NOT EXISTS (
            SELECT FROM devices WHERE devices.recipient = g.recipient
            AND devices.device = g.device AND seen_ms > now_ms(a_now_ms) - a_every_ms)
        ORDER BY r, d
    ON CONFLICT (recipient, device) DO UPDATE SET seen_ms = excluded.seen_ms
$$;

-- Delete what every known device of these recipients has acked. The caller has their locks.
CREATE FUNCTION delete_acked(a_recipients text[]) RETURNS void LANGUAGE sql AS $$
    WITH floors AS MATERIALIZED (
        SELECT recipient, min(acked) AS acked FROM devices
        WHERE recipient = ANY (a_recipients) GROUP BY recipient
    ), deleted AS (
        DELETE FROM messages USING floors
        WHERE messages.recipient = floors.recipient AND messages.version <= floors.acked
        RETURNING messages.recipient, octet_length(body) AS size_bytes
    )
    UPDATE heads SET kept_messages = kept_messages - sums.messages,
        kept_bytes = kept_bytes - sums.bytes
    FROM (
        SELECT recipient, count(*) AS messages, sum(size_bytes) AS bytes
        FROM deleted GROUP BY recipient
    ) AS sums WHERE heads.recipient = sums.recipient
$$;

CREATE FUNCTION ack(
    a_recipient text, a_device text, a_version bigint, a_now_ms bigint, a_every_ms bigint
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    upto bigint;
BEGIN
    SELECT greatest(0, least(a_version, head)) INTO upto FROM heads
        WHERE recipient = a_recipient FOR NO KEY UPDATE;
    INSERT INTO devices VALUES (a_recipient, a_device, coalesce(upto, 0), now_ms(a_now_ms))
    ON CONFLICT (recipient, device) DO UPDATE SET
        acked = greatest(devices.acked, excluded.acked),
        seen_ms = CASE WHEN devices.seen_ms <= excluded.seen_ms - a_every_ms
            THEN excluded.seen_ms ELSE devices.seen_ms END;
    PERFORM delete_acked(ARRAY[a_recipient]);
END $$;
"""

_UPKEEP = """
-- Delete at most so many expired messages; a locked recipient's are left to the next run.
CREATE FUNCTION purge_messages(a_limit bigint, a_now_ms bigint) RETURNS bigint LANGUAGE sql AS $$
    WITH expired AS MATERIALIZED (
        SELECT recipient, version FROM messages
        WHERE expires_ms <= now_ms(a_now_ms) ORDER BY expires_ms LIMIT a_limit
    ), locked AS MATERIALIZED (
        SELECT recipient FROM heads WHERE recipient IN (SELECT recipient FROM expired)
        ORDER BY recipient FOR NO KEY UPDATE SKIP LOCKED
    ), deleted AS (
        DELETE FROM messages USING expired JOIN locked USING (recipient)
        WHERE messages.recipient = expired.recipient AND messages.version = expired.version
        RETURNING messages.recipient, octet_length(body) AS size_bytes
    ), lowered AS (
        UPDATE heads SET kept_messages = kept_messages - sums.messages,
            kept_bytes = kept_bytes - sums.bytes
        FROM (
            SELECT recipient, count(*) AS messages, sum(size_bytes) AS bytes
            FROM deleted GROUP BY recipient
        ) AS sums WHERE heads.recipient = sums.recipient
    )
    SELECT count(*) FROM deleted
$$;

CREATE FUNCTION purge_receipts(a_limit bigint, a_before_ms bigint) RETURNS bigint LANGUAGE sql AS $$
    WITH old AS MATERIALIZED (
        SELECT sender, id FROM receipts WHERE at_ms <= a_before_ms
        ORDER BY at_ms LIMIT a_limit FOR UPDATE SKIP LOCKED
    ), deleted AS (
        DELETE FROM receipts USING old
        WHERE receipts.sender = old.sender AND receipts.id = old.id RETURNING 1
    )
    SELECT count(*) FROM deleted
$$;

CREATE FUNCTION purge_batches(a_limit bigint, a_before_ms bigint) RETURNS void LANGUAGE sql AS $$
    WITH old AS MATERIALIZED (
        SELECT id FROM batches WHERE at_ms <= a_before_ms
        ORDER BY at_ms LIMIT a_limit FOR UPDATE SKIP LOCKED
    )
    DELETE FROM batches USING old WHERE batches.id = old.id
$$;

-- Forget devices that were not seen since then, and delete what only they held back.
CREATE FUNCTION purge_devices(a_limit bigint, a_before_ms bigint) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    recipients text[];
    forgotten bigint;
BEGIN
    SELECT array_agg(recipient) INTO recipients FROM (
        SELECT recipient FROM devices WHERE seen_ms <= a_before_ms ORDER BY seen_ms LIMIT a_limit
    ) AS unseen;
    IF recipients IS NULL THEN
        RETURN 0;
    END IF;
    PERFORM FROM heads WHERE recipient = ANY (recipients) ORDER BY recipient FOR NO KEY UPDATE;
    WITH unseen AS MATERIALIZED (
        SELECT recipient, device FROM devices
        WHERE recipient = ANY (recipients) AND seen_ms <= a_before_ms
        ORDER BY seen_ms LIMIT a_limit FOR UPDATE SKIP LOCKED
    ), deleted AS (
        DELETE FROM devices USING unseen
        WHERE devices.recipient = unseen.recipient AND devices.device = unseen.device RETURNING 1
    )
    SELECT count(*) INTO forgotten FROM deleted;
    PERFORM delete_acked(recipients);
    RETURN forgotten;
END $$;

CREATE FUNCTION clear_recipient(a_recipient text) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    deleted bigint;
BEGIN
    PERFORM FROM heads WHERE recipient = a_recipient FOR NO KEY UPDATE;
    DELETE FROM messages WHERE recipient = a_recipient;
    GET DIAGNOSTICS deleted = ROW_COUNT;
    UPDATE heads SET kept_messages = 0, kept_bytes = 0 WHERE recipient = a_recipient;
    DELETE FROM devices WHERE recipient = a_recipient;
    DELETE FROM outbox WHERE recipient = a_recipient;
    RETURN deleted;
END $$;
"""

_PUSHES = """
-- A row whose due_ms is NULL owes nothing: it remembers the quiet period.
CREATE TABLE pushes (
    recipient text COLLATE "C" PRIMARY KEY,
    first bigint NOT NULL,
    version bigint NOT NULL,
    since_ms bigint NOT NULL,
    due_ms bigint,
    attempts integer NOT NULL,
    quiet_until_ms bigint NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000);
CREATE INDEX pushes_by_due ON pushes (due_ms) WHERE due_ms IS NOT NULL;
CREATE INDEX pushes_by_quiet ON pushes (quiet_until_ms) WHERE due_ms IS NULL;

CREATE TABLE dead_pushes (
    recipient text COLLATE "C" NOT NULL,
    first bigint NOT NULL,
    version bigint NOT NULL,
    since_ms bigint NOT NULL,
    attempts integer NOT NULL,
    reason text NOT NULL,
    at_ms bigint NOT NULL,
    PRIMARY KEY (recipient, first)
);
CREATE INDEX dead_pushes_by_age ON dead_pushes (at_ms);

-- What append does, and owe pushes for what is new: from each recipient's first message on.
CREATE FUNCTION append_owing_pushes(
    a_batch uuid, a_recipients text[], a_senders text[], a_ids text[], a_ids_are_senders boolean[],
    a_bodies bytea[], a_ttls_ms bigint[], a_max_messages bigint, a_max_bytes bigint,
    a_now_ms bigint, a_concern boolean[], a_grace_ms bigint
) RETURNS bigint[] LANGUAGE plpgsql AS $$
DECLARE
    versions bigint[];
BEGIN
    versions := append(a_batch, a_recipients, a_senders, a_ids, a_ids_are_senders, a_bodies,
        a_ttls_ms, a_max_messages, a_max_bytes, a_now_ms);
    INSERT INTO pushes
        SELECT given.recipient COLLATE "C" AS r, min(given.version), max(given.version),
            now_ms(a_now_ms), now_ms(a_now_ms) + a_grace_ms, 0, 0
        FROM unnest(a_recipients, versions, a_concern) AS given (recipient, version, concerns)
        WHERE given.version > 0 AND given.concerns GROUP BY r ORDER BY r
    ON CONFLICT (recipient) DO UPDATE SET
        first = CASE WHEN pushes.due_ms IS NULL THEN excluded.first ELSE pushes.first END,
        since_ms = CASE WHEN pushes.due_ms IS NULL THEN excluded.since_ms ELSE pushes.since_ms END,
        attempts = CASE WHEN pushes.due_ms IS NULL THEN 0 ELSE pushes.attempts END,
        due_ms = coalesce(pushes.due_ms, greatest(excluded.due_ms, pushes.quiet_until_ms)),
        version = greatest(pushes.version, excluded.version);
    RETURN versions;
END $$;

-- Begin the quiet period. What is newer than the push is owed after it, as a push of its own.
-- The row may be gone, or be about newer messages: a pull was quicker than the answer.
CREATE FUNCTION settle_push(
    a_recipient text, a_version bigint, a_quiet_ms bigint, a_next_ms bigint, a_now_ms bigint
) RETURNS void LANGUAGE sql AS $$
    INSERT INTO pushes VALUES (a_recipient, a_version, a_version, now_ms(a_now_ms), NULL, 0,
        now_ms(a_now_ms) + a_quiet_ms)
    ON CONFLICT (recipient) DO UPDATE SET
        quiet_until_ms = excluded.quiet_until_ms,
        due_ms = CASE WHEN pushes.due_ms IS NULL OR pushes.version <= a_version THEN NULL
            WHEN pushes.first <= a_version THEN now_ms(a_now_ms) + a_next_ms
            ELSE greatest(pushes.due_ms, excluded.quiet_until_ms) END,
        since_ms = CASE WHEN pushes.first <= a_version
            THEN excluded.since_ms ELSE pushes.since_ms END,
        attempts = CASE WHEN pushes.first <= a_version THEN 0 ELSE pushes.attempts END,
        first = greatest(pushes.first, a_version + 1)
$$;

CREATE FUNCTION purge_pushes(a_limit bigint, a_kept_ms bigint, a_now_ms bigint) RETURNS bigint
LANGUAGE sql AS $$
    WITH quiet AS MATERIALIZED (
        SELECT recipient FROM pushes WHERE due_ms IS NULL AND quiet_until_ms <= now_ms(a_now_ms)
        ORDER BY quiet_until_ms LIMIT a_limit FOR UPDATE SKIP LOCKED
    ), old AS MATERIALIZED (
        SELECT recipient, first FROM dead_pushes WHERE at_ms <= now_ms(a_now_ms) - a_kept_ms
        ORDER BY at_ms LIMIT a_limit FOR UPDATE SKIP LOCKED
    ), ended AS (
        DELETE FROM pushes USING quiet WHERE pushes.recipient = quiet.recipient RETURNING 1
    ), forgotten AS (
        DELETE FROM dead_pushes USING old
        WHERE dead_pushes.recipient = old.recipient AND dead_pushes.first = old.first RETURNING 1
    )
    SELECT (SELECT count(*) FROM ended) + (SELECT count(*) FROM forgotten)
$$;

CREATE OR REPLACE FUNCTION clear_recipient(a_recipient text) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    deleted bigint;
BEGIN
    PERFORM FROM heads WHERE recipient = a_recipient FOR NO KEY UPDATE;
    DELETE FROM messages WHERE recipient = a_recipient;
    GET DIAGNOSTICS deleted = ROW_COUNT;
    UPDATE heads SET kept_messages = 0, kept_bytes = 0 WHERE recipient = a_recipient;
    DELETE FROM devices WHERE recipient = a_recipient;
    DELETE FROM outbox WHERE recipient = a_recipient;
    DELETE FROM pushes WHERE recipient = a_recipient;
    RETURN deleted;
END $$;
"""

MIGRATIONS: Final = (_TABLES + _NOW + _APPEND + _DEVICES + _UPKEEP, _PUSHES)
"""The statements of each schema version; the table ``migrations`` counts those done."""

CHECK: Final = """
WITH ours AS (SELECT to_regnamespace(quote_ident(current_schema())) AS namespace)
SELECT current_setting('transaction_read_only') = 'on', (
    SELECT bool_or(row_security_active(pg_class.oid))
    FROM pg_class JOIN ours ON relnamespace = namespace WHERE relkind = 'r'
), (
    SELECT count(*) = 10 AND bool_and(has_table_privilege(oid, 'SELECT')
        AND has_table_privilege(oid, 'INSERT') AND has_table_privilege(oid, 'UPDATE')
        AND (relname = 'generation' OR has_table_privilege(oid, 'DELETE')))
    FROM pg_class JOIN ours ON relnamespace = namespace
    WHERE relname IN ('heads', 'messages', 'receipts', 'batches', 'outbox', 'devices', 'pushes',
        'dead_pushes', 'generation', 'shares')
), (
    SELECT count(DISTINCT proname) = 9 AND bool_and(has_function_privilege(pg_proc.oid, 'EXECUTE'))
    FROM pg_proc JOIN ours ON pronamespace = namespace
    WHERE proname IN ('append', 'append_within_shares', 'append_above_heads', 'generation_base',
        'current_history', 'see_devices', 'ack', 'delete_acked', 'purge_messages')
)
"""
"""Whether writes are impossible, whether policies may hide rows, and what is permitted."""

TOUCH: Final = """
WITH h AS (UPDATE heads SET head = head WHERE false),
    m AS (UPDATE messages SET body = body WHERE false),
    d AS (DELETE FROM devices WHERE false), o AS (DELETE FROM outbox WHERE false)
SELECT
"""
"""Changes nothing, but waits for locks on the tables as a write does."""
