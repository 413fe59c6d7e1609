"""Coordination through PostgreSQL: three small tables, timed by the database's clock.

pokebridge_members      a row a member, with the end of its lease
pokebridge_documents    a row a cluster: the shared document and its revision
pokebridge_leaders      a row a cluster: who leads, and until when

Every row names its cluster, so that several clusters can share a database. Each statement is one
transaction of its own. Leases end by ``clock_timestamp()``, which goes on while a statement waits
for a row, so that none is longer in the database than its holder believes.

Changes are polled for. ``NOTIFY`` would tell of them sooner, at the price of a connection that only
listens, which poolers such as PgBouncer do not carry, and it says nothing when a lease runs out.
"""

import asyncio
from functools import partial
from typing import Any, Self, TypeAlias
from urllib.parse import urlsplit

import asyncpg
import msgspec

from pokebridge.coordination.base import Document, Member
from pokebridge.coordination.store import DIAL_TIMEOUT_S, Line, decode_all, encode
from pokebridge.engines.urls import without_secrets
from pokebridge.errors import ConfigError

# How late a change is noticed: half of what a member with the default lease would let pass anyway.
POLL_S = 0.5
_CLOSE_TIMEOUT_S = 1.0

_Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

_TABLES = """
CREATE TABLE IF NOT EXISTS pokebridge_members (
    cluster text, id text, incarnation text NOT NULL, standing text NOT NULL, record json NOT NULL,
    expires_at timestamptz NOT NULL, PRIMARY KEY (cluster, id));
CREATE TABLE IF NOT EXISTS pokebridge_documents (
    cluster text PRIMARY KEY, revision bigint NOT NULL, body bytea NOT NULL);
CREATE TABLE IF NOT EXISTS pokebridge_leaders (
    cluster text PRIMARY KEY, holder text NOT NULL, expires_at timestamptz NOT NULL);
"""
_MISSING = """
SELECT to_regclass('pokebridge_members') IS NULL OR to_regclass('pokebridge_documents') IS NULL
    OR to_regclass('pokebridge_leaders') IS NULL
"""
_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('pokebridge coordination', 0))"

# Rows of the dead, which nobody will renew; others may be at the same.
_SWEEP = """
DELETE FROM pokebridge_members WHERE (cluster, id) IN (
    SELECT cluster, id FROM pokebridge_members
    WHERE cluster = $1 AND expires_at <= clock_timestamp() FOR UPDATE SKIP LOCKED)
"""
_RENEW = """
INSERT INTO pokebridge_members VALUES ($1, $2, $3, $4, $5, clock_timestamp() + $6::interval)
ON CONFLICT (cluster, id) DO UPDATE SET
    incarnation = excluded.incarnation, standing = excluded.standing, record = excluded.record,
    expires_at = clock_timestamp() + $6::interval
"""
_LEAVE = "DELETE FROM pokebridge_members WHERE cluster = $1 AND id = $2 AND incarnation = $3"
_MEMBERS = """
SELECT record FROM pokebridge_members
WHERE cluster = $1 AND expires_at > clock_timestamp() ORDER BY id COLLATE "C"
"""
_READ = "SELECT body, revision FROM pokebridge_documents WHERE cluster = $1"
# The first revision is the time in µs, so that a document which was lost and is written anew never
# has a revision again that somebody remembers.
_CREATE = """
INSERT INTO pokebridge_documents
VALUES ($1, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint, $2)
ON CONFLICT DO NOTHING RETURNING true
"""
_REPLACE = """
UPDATE pokebridge_documents SET revision = revision + 1, body = $2
WHERE cluster = $1 AND revision = $3 RETURNING true
"""
_LEAD = """
INSERT INTO pokebridge_leaders AS held VALUES ($1, $2, clock_timestamp() + $3::interval)
ON CONFLICT (cluster) DO UPDATE
    SET holder = excluded.holder, expires_at = clock_timestamp() + $3::interval
    WHERE held.holder = excluded.holder OR held.expires_at <= clock_timestamp()
RETURNING true
"""
_RESIGN = "DELETE FROM pokebridge_leaders WHERE cluster = $1 AND holder = $2"
_GLANCE = """
SELECT (SELECT revision FROM pokebridge_documents WHERE cluster = $1),
    (SELECT md5(string_agg(standing, ' ' ORDER BY id)) FROM pokebridge_members
     WHERE cluster = $1 AND expires_at > clock_timestamp())
"""

_members = msgspec.json.Decoder(Member)
