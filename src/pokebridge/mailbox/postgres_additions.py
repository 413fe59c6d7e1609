"""What was added to the PostgreSQL mailbox's schema, so that earlier releases still work with it.

Their functions keep names and arguments, and do more. The table ``additions`` counts what is done.
"""

from typing import Final

from pokebridge.mailbox.base import GENERATION_VERSIONS, MAX_DEVICES

_GENERATIONS = """
-- The versions of a generation are above its base. history says which database gave them.
CREATE TABLE generation (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    base bigint NOT NULL,
    history text NOT NULL
);

-- What changes when this database goes back in time: the system and the timeline after a failover
-- or a point-in-time recovery, the database and the file of heads after a restore. Any role may ask
-- for these, but a managed server may refuse one; that one is left out then.
CREATE FUNCTION current_history() RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    answer text := coalesce(pg_relation_filenode(to_regclass('heads')), 0);
BEGIN
    answer := answer || ' '
        || (SELECT oid::text FROM pg_database WHERE datname = current_database());
    BEGIN
        answer := answer || ' ' || (SELECT system_identifier FROM pg_control_system());
    EXCEPTION WHEN OTHERS THEN NULL;
    END;
    BEGIN
        answer := answer || ' ' || left(pg_walfile_name(pg_current_wal_lsn()), 8);
    EXCEPTION WHEN OTHERS THEN NULL;
    END;
    RETURN answer;
END $$;

-- Begin a generation, unless one of this history has begun already. Its base follows the clock:
-- 2^11 versions a millisecond are more than a recipient ever gets, so the base is above all that
-- were given out, even those that are lost. It stays below 2^53, what JavaScript can count to,
-- until the year 2109.
CREATE FUNCTION begin_generation(a_forced boolean) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    answer bigint;
BEGIN
    INSERT INTO generation
        VALUES (true, (extract(epoch FROM clock_timestamp()) * 1000)::bigint << 11,
            current_history())
    ON CONFLICT (one) DO UPDATE SET history = current_history(),
        base = greatest(excluded.base, generation.base + 1)
        WHERE a_forced OR generation.history <> current_history();
    SELECT base INTO answer FROM generation WHERE one;
    RETURN answer;
END $$;

-- The base of the current generation.
CREATE FUNCTION generation_base() RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    answer bigint;
BEGIN
    SELECT base INTO answer FROM generation WHERE one AND history = current_history();
    RETURN coalesce(answer, begin_generation(false));
END $$;

INSERT INTO generation VALUES (true, 0, current_history());

-- A restore into the same tables: rows of heads, which we never delete, are replaced. Its session
-- has a search_path of its own.
CREATE FUNCTION mark_restored() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('UPDATE %I.generation SET history = %L', tg_table_schema, 'restored');
    RETURN NULL;
END $$;
CREATE TRIGGER mark_restored AFTER DELETE OR TRUNCATE ON heads EXECUTE FUNCTION mark_restored();
ALTER TABLE heads ENABLE ALWAYS TRIGGER mark_restored;

-- So that a restored row of generation does not pass for the current one.
CREATE FUNCTION distrust_history() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    new.history := 'restored';
    RETURN new;
END $$;
CREATE TRIGGER distrust_history BEFORE INSERT ON generation
    FOR EACH ROW EXECUTE FUNCTION distrust_history();
ALTER TABLE generation ENABLE ALWAYS TRIGGER distrust_history;

-- How far the write-ahead log is, in bytes; NULL where the server does not tell. It goes back when
-- a copy of the server's files is put back.
CREATE FUNCTION wal_position() RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN
    RETURN pg_current_wal_insert_lsn() - '0/0'::pg_lsn;
EXCEPTION WHEN OTHERS THEN RETURN NULL;
END $$;

ALTER FUNCTION append(
    uuid, text[], text[], text[], boolean[], bytea[], bigint[], bigint, bigint, bigint
) RENAME TO append_above_heads;

-- Raise the recipients' heads to the generation's base, then append. Instances of earlier releases
-- call it as well, so its name and arguments stay.
CREATE FUNCTION append(
    a_batch uuid, a_recipients text[], a_senders text[], a_ids text[], a_ids_are_senders boolean[],
    a_bodies bytea[], a_ttls_ms bigint[], a_max_messages bigint, a_max_bytes bigint, a_now_ms bigint
) RETURNS bigint[] LANGUAGE plpgsql AS $$
DECLARE
    base bigint := generation_base();
BEGIN
    IF base > 0 THEN
        INSERT INTO heads (recipient, head)
            SELECT DISTINCT recipient COLLATE "C" AS name, base
            FROM unnest(a_recipients) AS given (recipient) ORDER BY name
        ON CONFLICT (recipient) DO UPDATE SET head = excluded.head
            WHERE heads.head < excluded.head;
    END IF;
    RETURN append_above_heads(a_batch, a_recipients, a_senders, a_ids, a_ids_are_senders, a_bodies,
        a_ttls_ms, a_max_messages, a_max_bytes, a_now_ms);
END $$;

ALTER FUNCTION delete_acked(text[]) RENAME TO delete_what_was_acked;

-- Nothing in a generation's first day: a forgotten device is known by its next pull or ack.
CREATE FUNCTION delete_acked(a_recipients text[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (
        SELECT FROM generation WHERE one AND history = current_history()
        AND (base >> 11) <= extract(epoch FROM clock_timestamp()) * 1000 - 86400000
    ) THEN
        PERFORM delete_what_was_acked(a_recipients);
    END IF;
END $$;
"""

_DEVICES_LIMIT = f"""
-- Of more than MAX_DEVICES devices of a recipient forget those that were seen least recently.
CREATE FUNCTION limit_devices() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    crowded text[];
BEGIN
    SELECT array_agg(DISTINCT recipient) INTO crowded FROM new_devices;
    IF crowded IS NULL THEN
        RETURN NULL;
    END IF;
    SELECT array_agg(recipient) INTO crowded FROM (
        SELECT recipient FROM devices WHERE recipient = ANY (crowded)
        GROUP BY recipient HAVING count(*) > {MAX_DEVICES}
    ) AS counted;
    IF crowded IS NULL THEN
        RETURN NULL;
    END IF;
    PERFORM FROM heads WHERE recipient = ANY (crowded) ORDER BY recipient FOR NO KEY UPDATE;
    DELETE FROM devices USING (
        SELECT recipient, device, row_number() OVER (
            PARTITION BY recipient ORDER BY seen_ms DESC, new_devices IS NOT NULL DESC, device
        ) AS place
        FROM devices LEFT JOIN new_devices USING (recipient, device, seen_ms)
        WHERE recipient = ANY (crowded)
    ) AS sorted
    WHERE devices.recipient = sorted.recipient AND devices.device = sorted.device
        AND sorted.place > {MAX_DEVICES};
    PERFORM delete_acked(crowded);
    RETURN NULL;
END $$;
CREATE TRIGGER limit_devices AFTER INSERT ON devices REFERENCING NEW TABLE AS new_devices
    FOR EACH STATEMENT EXECUTE FUNCTION limit_devices();
"""  # noqa: S608 - a constant of ours

_SHARES = """
-- How many messages of each sender are kept. By triggers, so that it is true of what instances of
-- earlier releases do, with a search_path of their own, so that a restore runs them too.
CREATE TABLE shares (
    recipient text COLLATE "C" NOT NULL,
    sender text COLLATE "C" NOT NULL,
    messages bigint NOT NULL,
    bytes bigint NOT NULL,
    PRIMARY KEY (recipient, sender)
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05);

CREATE FUNCTION grow_shares() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    INSERT INTO shares
        SELECT recipient, sender, count(*), sum(octet_length(body)) FROM added
        GROUP BY recipient, sender ORDER BY recipient, sender
    ON CONFLICT (recipient, sender) DO UPDATE SET
        messages = shares.messages + excluded.messages, bytes = shares.bytes + excluded.bytes;
    RETURN NULL;
END $$;
CREATE TRIGGER grow_shares AFTER INSERT ON messages REFERENCING NEW TABLE AS added
    FOR EACH STATEMENT EXECUTE FUNCTION grow_shares();

CREATE FUNCTION shrink_shares() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    WITH gone AS MATERIALIZED (
        SELECT recipient, sender, count(*) AS messages, sum(octet_length(body)) AS bytes
        FROM removed GROUP BY recipient, sender
    ), lowered AS (
        UPDATE shares SET messages = shares.messages - gone.messages,
            bytes = shares.bytes - gone.bytes
        FROM gone WHERE shares.recipient = gone.recipient AND shares.sender = gone.sender
            AND shares.messages > gone.messages
    )
    DELETE FROM shares USING gone
    WHERE shares.recipient = gone.recipient AND shares.sender = gone.sender
        AND shares.messages <= gone.messages;
    RETURN NULL;
END $$;
CREATE TRIGGER shrink_shares AFTER DELETE ON messages REFERENCING OLD TABLE AS removed
    FOR EACH STATEMENT EXECUTE FUNCTION shrink_shares();

INSERT INTO shares
    SELECT recipient, sender, count(*), sum(octet_length(body)) FROM messages
    GROUP BY recipient, sender;

-- What append does, or append_owing_pushes if a_concern is given, without the messages that exceed
-- their senders' shares. For these the answer has NULL.
CREATE FUNCTION append_within_shares(
    a_batch uuid, a_recipients text[], a_senders text[], a_ids text[], a_ids_are_senders boolean[],
    a_bodies bytea[], a_ttls_ms bigint[], a_max_messages bigint, a_max_bytes bigint,
    a_now_ms bigint, a_concern boolean[], a_grace_ms bigint,
    a_share_messages bigint, a_share_bytes bigint
) RETURNS bigint[] LANGUAGE plpgsql AS $$
DECLARE
    answer bigint[];
    fitting integer[];
    batch uuid := a_batch;
    a_count integer := cardinality(a_recipients);
    a_bytes bigint := (SELECT sum(octet_length(body)) FROM unnest(a_bodies) AS given (body));
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
    IF EXISTS (
        SELECT FROM heads WHERE recipient = ANY (a_recipients)
        AND (kept_messages + a_count > a_share_messages OR kept_bytes + a_bytes > a_share_bytes)
    ) THEN
        WITH given AS MATERIALIZED (
            SELECT g.recipient, g.sender, g.n, receipts.version IS NOT NULL AS is_old,
                count(*) OVER own AS messages, sum(octet_length(g.body)) OVER own AS bytes
            FROM unnest(a_recipients, a_senders, a_ids, a_ids_are_senders, a_bodies)
                WITH ORDINALITY AS g (recipient, sender, id, id_is_senders, body, n)
            LEFT JOIN receipts
                ON g.id_is_senders AND receipts.sender = g.sender AND receipts.id = g.id
            WINDOW own AS (
                PARTITION BY g.recipient, g.sender, receipts.version IS NOT NULL ORDER BY g.n
            )
        )
        SELECT coalesce(array_agg(n::integer ORDER BY n), '{}') INTO fitting
        FROM given LEFT JOIN shares USING (recipient, sender)
        WHERE is_old OR (
            coalesce(shares.messages, 0) + given.messages <= a_share_messages
            AND coalesce(shares.bytes, 0) + given.bytes <= a_share_bytes
        );
    END IF;
    IF cardinality(fitting) = 0 THEN
        RETURN array_fill(NULL::bigint, ARRAY[a_count]);
    END IF;
    IF cardinality(fitting) < a_count THEN
        batch := gen_random_uuid();
        SELECT array_agg(a_recipients[n] ORDER BY i), array_agg(a_senders[n] ORDER BY i),
            array_agg(a_ids[n] ORDER BY i), array_agg(a_ids_are_senders[n] ORDER BY i),
            array_agg(a_bodies[n] ORDER BY i), array_agg(a_ttls_ms[n] ORDER BY i),
            CASE WHEN a_concern IS NOT NULL THEN array_agg(a_concern[n] ORDER BY i) END
        INTO a_recipients, a_senders, a_ids, a_ids_are_senders, a_bodies, a_ttls_ms, a_concern
        FROM unnest(fitting) WITH ORDINALITY AS chosen (n, i);
    END IF;
    IF a_concern IS NULL THEN
        answer := append(batch, a_recipients, a_senders, a_ids, a_ids_are_senders, a_bodies,
            a_ttls_ms, a_max_messages, a_max_bytes, a_now_ms);
    ELSE
        answer := append_owing_pushes(batch, a_recipients, a_senders, a_ids, a_ids_are_senders,
            a_bodies, a_ttls_ms, a_max_messages, a_max_bytes, a_now_ms, a_concern, a_grace_ms);
    END IF;
    IF batch <> a_batch THEN
        SELECT array_agg(answer[place] ORDER BY n) INTO answer
        FROM generate_series(1, a_count) AS given (n)
        LEFT JOIN LATERAL (SELECT array_position(fitting, n) AS place) AS found ON true;
        INSERT INTO batches VALUES (a_batch, answer, now_ms(a_now_ms));
    END IF;
    RETURN answer;
END $$;
"""

_RESTORED_SHARES = """
-- A restore of the data alone, into tables that are there: grow_shares counts the messages that it
-- puts back, so the rows of shares that it puts back would count them twice.
CREATE FUNCTION ignore_restored_share() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RETURN NULL;
END $$;
CREATE TRIGGER ignore_restored_share BEFORE INSERT ON shares
    FOR EACH ROW WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION ignore_restored_share();

-- pg_restore --clean drops triggers from the last name to the first, and locks their tables. Like
-- every append and ack it must lock heads first (mark_restored), or they run into a deadlock.
ALTER TRIGGER shrink_shares ON messages RENAME TO lower_shares;

CREATE FUNCTION clear_shares() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    DELETE FROM shares;
    RETURN NULL;
END $$;
CREATE TRIGGER clear_shares AFTER TRUNCATE ON messages EXECUTE FUNCTION clear_shares();
"""

_CRASHES = """
-- How far the write-ahead log is, in bytes, at least, once this transaction is committed: never
-- further than what a crash leaves. Without changes of its own a commit flushes nothing, and the
-- end of the log may be another session's.
CREATE OR REPLACE FUNCTION wal_position() RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN
    RETURN CASE WHEN pg_current_xact_id_if_assigned() IS NULL
        THEN pg_current_wal_flush_lsn() ELSE pg_current_wal_insert_lsn() END - '0/0'::pg_lsn;
EXCEPTION WHEN OTHERS THEN RETURN NULL;
END $$;

-- A crash must not take back a version that was given out, nor a generation. By triggers, so that
-- it is true of what instances of earlier releases do.
CREATE FUNCTION flush_commit() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('synchronous_commit') = 'off' THEN
        PERFORM set_config('synchronous_commit', 'local', true);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER flush_commit AFTER INSERT ON batches EXECUTE FUNCTION flush_commit();
CREATE TRIGGER flush_commit AFTER INSERT OR UPDATE ON generation EXECUTE FUNCTION flush_commit();
"""

_DISABLED_TRIGGERS = """
-- A restore may disable all triggers, and then heads and generation could be replaced unnoticed.
-- Doing so writes the row of mark_restored anew, whose xmin is therefore a part of the history.
UPDATE generation SET history = 'current' WHERE history = current_history();
ALTER FUNCTION current_history() RENAME TO where_from;
CREATE FUNCTION current_history() RETURNS text LANGUAGE sql AS $$
    SELECT where_from() || ' ' || coalesce((
        SELECT xmin::text FROM pg_trigger
        WHERE tgrelid = to_regclass('heads') AND tgname = 'mark_restored'
    ), '')
$$;
UPDATE generation SET history = current_history() WHERE history = 'current';
"""

_CLOCKS = f"""
-- The clock may be behind the one that timed the last generation. Then the base is above what was
-- given out in that, even what is lost.
CREATE OR REPLACE FUNCTION begin_generation(a_forced boolean) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    answer bigint;
BEGIN
    INSERT INTO generation
        VALUES (true, (extract(epoch FROM clock_timestamp()) * 1000)::bigint << 11,
            current_history())
    ON CONFLICT (one) DO UPDATE SET history = current_history(),
        base = CASE WHEN excluded.base > generation.base
            THEN excluded.base ELSE generation.base + {GENERATION_VERSIONS} END
        WHERE a_forced OR generation.history <> current_history();
    SELECT base INTO answer FROM generation WHERE one;
    RETURN answer;
END $$;
"""  # noqa: S608 - a constant of ours

ADDITIONS: Final = (
    _GENERATIONS,
    _DEVICES_LIMIT,
    _SHARES,
    _RESTORED_SHARES,
    _CRASHES,
    _DISABLED_TRIGGERS,
    _CLOCKS,
)
"""The statements of each addition, after the migrations of ``postgres_schema``."""
