"""The PostgreSQL mailbox keeps the contract, through restarts, cuts and racing processes too."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest
from structlog.testing import capture_logs

from pokebridge.errors import ConfigError, InputError, MailboxError, MailboxRefusedError
from pokebridge.mailbox import base, postgres, postgres_pool
from pokebridge.mailbox.base import Limits, Mailbox
from pokebridge.mailbox.postgres import PostgresMailbox
from pokebridge.model import Ack, Receipt
from pokebridge.testing.mailbox import Connect, DurableMailboxContract
from pokebridge.testing.mailbox_kit import (
    BOB,
    EVE,
    ManualClock,
    fill,
    head,
    message,
    unpoked,
    versions,
)
from tests.support import CutProxy, Daemon, wait_until
from tests.support.waiting import WAIT_S


def new_schema() -> str:
    """The query that names a schema which is not there yet."""
    return f"?schema=test_{uuid.uuid4().hex}"


@pytest.fixture
def url(postgres_server: Daemon) -> str:
    """Where a mailbox can be made."""
    return postgres_server.url + new_schema()


@pytest.fixture
async def mailbox(url: str) -> AsyncIterator[PostgresMailbox]:
    """An open mailbox at ``url``."""
    mailbox = await PostgresMailbox.open(url)
    yield mailbox
    await mailbox.close()


@pytest.fixture
async def by_hand(url: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """A connection of the test's own to the same schema."""
    dsn, _, schema = url.partition("?schema=")
    connection = await asyncpg.connect(
        dsn,
        server_settings=postgres_pool.SERVER_SETTINGS
        | {
            "search_path": schema,
            "statement_timeout": "0",
            "lock_timeout": "0",
            "idle_in_transaction_session_timeout": "0",
        },
    )
    yield connection
    await connection.close()


class TestPostgresMailbox(DurableMailboxContract):
    """The shipped suite, in a schema of its own for each test."""

    @pytest.fixture
    async def connect(self, clock: ManualClock, limits: Limits, url: str) -> AsyncIterator[Connect]:
        """Mailboxes in one schema, closed afterwards."""
        opened: list[PostgresMailbox] = []

        async def connect() -> Mailbox:
            opened.append(await PostgresMailbox.open(url, clock, limits))
            return opened[-1]

        yield connect
        for mailbox in opened:
            await mailbox.close()


class TestAppending:
    """One round trip for all that waits."""

    async def test_waiting_appends_share_a_transaction(
        self, mailbox: PostgresMailbox, by_hand: Any
    ) -> None:
        """Five hundred appends at once, to as many recipients, are a few transactions."""
        await asyncio.gather(*(mailbox.append(message(f"r{n}")) for n in range(500)))
        assert await by_hand.fetchval("SELECT count(*) FROM batches") <= 8

    async def test_a_batch_has_a_size(self, mailbox: PostgresMailbox, by_hand: Any) -> None:
        """Large messages are spread over several statements."""
        big = b"1" * 65_000
        await asyncio.gather(*(mailbox.append(message(body=big)) for _ in range(200)))
        assert await by_hand.fetchval("SELECT count(*) FROM batches") >= 4
        assert (await mailbox.stats()).messages == 200

    async def test_what_can_not_be_kept_fails_alone(self, mailbox: PostgresMailbox) -> None:
        """A NUL character, which PostgreSQL has no place for, spoils no neighbour."""
        calls = [mailbox.append(message(id="\0" if n == 7 else f"{n}")) for n in range(20)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(answers.pop(7), InputError)
        assert all(isinstance(answer, Receipt) for answer in answers)

    @pytest.mark.parametrize("state", ["22023", "23514", "54000", "P0001"])
    async def test_what_the_database_refuses_fails_alone(
        self, mailbox: PostgresMailbox, by_hand: Any, state: str
    ) -> None:
        """Whatever it finds wrong with some messages, the others of the batch are committed."""
        await by_hand.execute(f"""
            CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF new.body = 'bad' THEN RAISE 'not this' USING ERRCODE = '{state}'; END IF;
                RETURN new;
            END $$;
            CREATE TRIGGER refuse BEFORE INSERT ON messages FOR EACH ROW EXECUTE FUNCTION refuse();
        """)
        bad = {7, 8, 40}
        calls = [mailbox.append(message(body=b"bad" if n in bad else b"1")) for n in range(50)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        refused = {n for n, answer in enumerate(answers) if isinstance(answer, Exception)}
        assert refused == bad
        assert {type(answers[n]) for n in bad} == {MailboxRefusedError}
        assert await versions(mailbox) == list(range(1, 48))

    async def test_nobody_waits_for_another_recipient(
        self, mailbox: PostgresMailbox, by_hand: Any
    ) -> None:
        """While one recipient's lock is held by a slow transaction, others get their messages."""
        await fill(mailbox, 1)
        async with by_hand.transaction():
            await by_hand.execute("UPDATE heads SET head = head WHERE recipient = $1", BOB)
            waiting = asyncio.create_task(mailbox.append(message(BOB)))
            await wait_until(lambda: _waiting_for_locks(by_hand))
            await fill(mailbox, 3, EVE)
            assert not waiting.done()
        assert (await waiting).version == 2

    async def test_who_is_locked_out_of_a_batch_holds_up_no_other(
        self, url: str, by_hand: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One recipient's lock is kept for long: the rest of each batch with it is committed."""
        monkeypatch.setitem(postgres_pool.SERVER_SETTINGS, "lock_timeout", "50")
        monkeypatch.setattr(postgres, "TURN_TIMEOUT_S", WAIT_S)
        mailbox = await PostgresMailbox.open(url)
        await fill(mailbox, 1)
        async with by_hand.transaction():
            await by_hand.execute("UPDATE heads SET head = head WHERE recipient = $1", BOB)
            names = [BOB if number % 4 == 0 else f"urn:user:{number}" for number in range(40)]
            calls = [asyncio.create_task(mailbox.append(message(name))) for name in names]
            others = [call for call, name in zip(calls, names, strict=True) if name != BOB]
            assert {(await call).version for call in others} == {1}
            assert not any(call.done() for call in calls if call not in others)
        assert max([(await call).version for call in calls if call not in others]) == 11
        await mailbox.close()

    async def test_who_is_locked_out_for_too_long_is_told(
        self, url: str, by_hand: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its call ends in time, and nothing of it is committed."""
        monkeypatch.setitem(postgres_pool.SERVER_SETTINGS, "lock_timeout", "50")
        monkeypatch.setattr(postgres, "TURN_TIMEOUT_S", 0.2)
        mailbox = await PostgresMailbox.open(url)
        await fill(mailbox, 1)
        async with by_hand.transaction():
            await by_hand.execute("UPDATE heads SET head = head WHERE recipient = $1", BOB)
            with pytest.raises(MailboxError, match=r"was locked for 0\.2 s"):
                await mailbox.append(message(BOB))
        assert await versions(mailbox) == [1]
        await mailbox.close()

    async def test_purges_do_not_wait_for_senders(
        self, mailbox: PostgresMailbox, by_hand: Any
    ) -> None:
        """A purge leaves a recipient that is locked to the next one."""
        for recipient in (BOB, EVE):
            await mailbox.append(message(recipient, ttl_s=0))
        async with by_hand.transaction():
            await by_hand.execute("UPDATE heads SET head = head WHERE recipient = $1", BOB)
            assert await mailbox.purge(limit=10) == 1
        assert await mailbox.purge(limit=10) == 1


class TestOutages:
    """Connections break, servers die; nothing is lost or doubled, and no call waits for ever."""

    async def test_a_lost_answer_doubles_nothing(self, url: str, by_hand: Any) -> None:
        """The connection breaks while the server is still committing: the retry finds that out.

        Also for messages without an id of their sender's, and while the first attempt goes on.
        """
        _, _, port = url.partition("127.0.0.1:")
        async with CutProxy("127.0.0.1", int(port.partition("/")[0])) as proxy:
            mailbox = await PostgresMailbox.open(
                url.replace(port.partition("/")[0], str(proxy.port))
            )
            await fill(mailbox, 1)
            async with by_hand.transaction():
                await by_hand.execute("UPDATE heads SET head = head WHERE recipient = $1", BOB)
                call = asyncio.create_task(mailbox.append(message(id="lost")))
                other = asyncio.create_task(
                    mailbox.append(message(id="named", has_idempotency_key=True))
                )
                await wait_until(lambda: _waiting_for_locks(by_hand))
                proxy.reset()
                # The retry waits behind the attempt whose answer can't arrive any more.
                await wait_until(lambda: _waiting_for_locks(by_hand, at_least=2))
            receipts = {await call, await other}
            page = await mailbox.read(BOB, after=1, limit=10)
            assert {kept.id: kept.version for kept in page.messages} == {
                receipt.id: receipt.version for receipt in receipts
            }
            assert [kept.version for kept in page.messages] == [2, 3]
            assert not any(receipt.duplicate for receipt in receipts)
            await mailbox.close()

    async def test_a_restart_is_only_a_pause(self, own_postgres_server: Daemon) -> None:
        """Sends and pulls go on while PostgreSQL is killed and started again; none fails."""
        mailbox = await PostgresMailbox.open(own_postgres_server.url)
        stop = asyncio.Event()

        async def send(sender: str) -> list[int]:
            given = []
            while not stop.is_set():
                given.append((await mailbox.append(message(sender=sender))).version)
                await mailbox.read(BOB, after=given[-1], limit=1)
            return given

        senders = [asyncio.create_task(send(f"urn:user:{n}")) for n in range(4)]
        await wait_until(lambda: _head_above(mailbox, 20))
        await asyncio.to_thread(own_postgres_server.kill)
        await asyncio.to_thread(own_postgres_server.start)
        newest = await head(mailbox, BOB)
        await wait_until(lambda: _head_above(mailbox, newest + 20))
        stop.set()
        given = sorted(version for own in await asyncio.gather(*senders) for version in own)
        assert given == list(range(1, len(given) + 1)) == await versions(mailbox)
        assert await unpoked(mailbox) == {BOB: given[-1]}
        await mailbox.close()

    async def test_a_silent_cut_is_bounded(
        self, postgres_server: Daemon, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """When packets are dropped, every call fails in time; after the heal all is well."""
        async with CutProxy("127.0.0.1", postgres_server.port) as proxy:
            url = postgres_server.url.replace(str(postgres_server.port), str(proxy.port))
            mailbox = await PostgresMailbox.open(url + new_schema())
            await asyncio.gather(*(mailbox.read(f"r{n}", after=0, limit=1) for n in range(20)))
            proxy.cut()
            with monkeypatch.context() as patch:
                patch.setattr(postgres_pool, "CALL_TIMEOUT_S", 0.6)
                for call in (
                    mailbox.append(message()),
                    mailbox.read(BOB, after=0, limit=1),
                    mailbox.check(),
                ):
                    with pytest.raises(MailboxError, match=r"within 0\.6 s"):
                        await call
            proxy.heal()
            await wait_until(lambda: _answers(mailbox))
            await mailbox.append(message(EVE))
            assert await versions(mailbox, EVE) == [1]
            await mailbox.close()

    async def test_an_append_while_the_position_is_asked_is_no_step_back(
        self, mailbox: PostgresMailbox, by_hand: Any
    ) -> None:
        """A new connection's look at the log begins no generation when an append overtakes it."""
        await mailbox.append(message())

        async def fetchval(query: str) -> Any:
            position = await by_hand.fetchval(query)
            await mailbox.append(message())
            return position

        connection: Any = SimpleNamespace(fetchval=fetchval, execute=by_hand.execute)
        await mailbox._compare_position(connection)
        await mailbox.append(message())
        assert await versions(mailbox) == [1, 2, 3]

    async def test_a_server_that_is_gone_is_an_error_in_time(
        self, own_postgres_server: Daemon, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without a server calls fail with one line that says so; close() does not hang."""
        mailbox = await PostgresMailbox.open(own_postgres_server.url)
        monkeypatch.setattr(postgres_pool, "CALL_TIMEOUT_S", 0.3)
        await asyncio.to_thread(own_postgres_server.kill)
        with pytest.raises(MailboxError, match=r"within 0\.3 s: .*refused|Connect call failed"):
            await mailbox.append(message())
        with pytest.raises(MailboxError):
            await mailbox.check()
        async with asyncio.timeout(WAIT_S):
            await mailbox.close()

    @pytest.mark.parametrize("mode", ["ACCESS EXCLUSIVE", "SHARE"])
    async def test_locked_tables_are_told(
        self, mailbox: PostgresMailbox, by_hand: Any, monkeypatch: pytest.MonkeyPatch, mode: str
    ) -> None:
        """While an operator keeps a table from being read or written, the check fails."""
        async with by_hand.transaction():
            await by_hand.execute(f"LOCK TABLE heads IN {mode} MODE")
            with monkeypatch.context() as patch:
                patch.setattr(postgres_pool, "CALL_TIMEOUT_S", 1.0)
                with pytest.raises(MailboxError):
                    await mailbox.check()
        await mailbox.check()

    async def test_too_many_calls_are_refused(
        self, mailbox: PostgresMailbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What waits in this process is bounded, whether it shares a round trip or not."""
        monkeypatch.setattr(base, "MAX_WAITING", 3)
        for call in (partial(mailbox.read, after=0, limit=1), mailbox.clear):
            answers = await asyncio.gather(*(call(BOB) for _ in range(5)), return_exceptions=True)
            assert not any(isinstance(answer, Exception) for answer in answers[:3])
            assert all("is overloaded" in str(answer) for answer in answers[3:])


class TestOpening:
    """What can't be a mailbox is refused with one clear line."""

    async def test_many_can_make_it_at_once(self, url: str) -> None:
        """The first one creates the tables, and the others wait."""
        mailboxes = await asyncio.gather(*(PostgresMailbox.open(url) for _ in range(6)))
        await asyncio.gather(*(mailbox.append(message()) for mailbox in mailboxes))
        assert await versions(mailboxes[0]) == list(range(1, 7))
        for mailbox in mailboxes:
            await mailbox.close()

    async def test_schemas_are_apart(self, url: str) -> None:
        """Two clusters in one database, each in its schema, know nothing of each other."""
        one = await PostgresMailbox.open(url)
        other = await PostgresMailbox.open(url + "_b")
        await fill(one, 2)
        assert (await head(one, BOB), await head(other, BOB)) == (2, 0)
        await one.close()
        await other.close()

    async def test_a_newer_schema(self, mailbox: PostgresMailbox, url: str, by_hand: Any) -> None:
        """A schema of a newer release is refused."""
        await by_hand.execute("INSERT INTO migrations VALUES (99, now())")
        with pytest.raises(ConfigError, match="newer release"):
            await PostgresMailbox.open(url)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (("/postgres?", "/no_such_database?"), "no_such_database"),
            (("postgres@", "nobody:hunter2@"), "nobody"),
            (("?schema=", "?schema=DROP TABLE "), "schema must be"),
            (("?schema=", "?sslmode=perhaps&schema="), "the URL is invalid"),
            (("127.0.0.1:", "127.0.0.1:port"), "a port must be"),
            (("postgres@", "postgres:hunter2/@"), "percent-encode"),
        ],
    )
    async def test_a_wrong_url(self, url: str, change: tuple[str, str], said: str) -> None:
        """A setting that can't work is a ConfigError at once, and no password is repeated."""
        with pytest.raises(ConfigError, match=f"^mailbox: .*{said}") as error:
            await PostgresMailbox.open(url.replace(*change))
        assert "hunter2" not in str(error.value)

    async def test_nobody_there(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A server that can't be reached now is a MailboxError, after some tries."""
        monkeypatch.setattr(postgres_pool, "CALL_TIMEOUT_S", 0.2)
        port = url.partition("127.0.0.1:")[2].partition("/")[0]
        with pytest.raises(MailboxError, match="within"):
            await PostgresMailbox.open(url.replace(port, "1"))

    async def test_a_missing_permission(self, url: str, by_hand: Any) -> None:
        """A role that may not make what it needs is told so; made for it, it is enough."""
        role = f"role_{uuid.uuid4().hex}"
        schema = url.partition("?schema=")[2]
        await by_hand.execute(f"CREATE ROLE {role} LOGIN")
        limited = url.replace("postgres@", f"{role}@")
        with pytest.raises(ConfigError, match="permission denied"):
            await PostgresMailbox.open(limited)
        await by_hand.execute(f"CREATE SCHEMA {schema} AUTHORIZATION {role}")
        mailbox = await PostgresMailbox.open(limited)
        await fill(mailbox, 1)
        await mailbox.close()

    async def test_a_refusal_in_use_is_an_outage(self, url: str, by_hand: Any) -> None:
        """Callers are told to come again, and nothing about roles and tables. The log is, once."""
        role = f"role_{uuid.uuid4().hex}"
        schema = url.partition("?schema=")[2]
        await by_hand.execute(f"CREATE ROLE {role} LOGIN")
        await by_hand.execute(f"CREATE SCHEMA {schema} AUTHORIZATION {role}")
        mailbox = await PostgresMailbox.open(url.replace("postgres@", f"{role}@"))
        end = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{role}'"
        tables, whole = f"ALL ON ALL TABLES IN SCHEMA {schema}", f"ALL ON SCHEMA {schema}"
        functions = f"EXECUTE ON ALL FUNCTIONS IN SCHEMA {schema}"
        for refuse, permit in (
            (f"REVOKE {tables} FROM {role}", f"GRANT {tables} TO {role}"),
            (f"REVOKE INSERT ON receipts FROM {role}", f"GRANT INSERT ON receipts TO {role}"),
            (f"REVOKE {functions} FROM PUBLIC, {role}", f"GRANT {functions} TO {role}"),
            (f"REVOKE {whole} FROM {role}", f"GRANT {whole} TO {role}"),
            (f"ALTER ROLE {role} NOLOGIN", f"ALTER ROLE {role} LOGIN"),
        ):
            await by_hand.execute(refuse)
            await by_hand.execute(end)
            mailbox._pool._log_again_s = 0.0
            with capture_logs() as logged:
                for _ in range(2):
                    with pytest.raises(MailboxError, match=r"see this instance's log$"):
                        await mailbox.append(message())
            assert [entry["event"] for entry in logged] == ["mailbox_refused"]
            with pytest.raises(MailboxError) as error:
                await mailbox.check()
            assert role not in str(error.value)
            await by_hand.execute(permit)
            await mailbox.check()
            await mailbox.append(message())
        await mailbox.close()

    @pytest.mark.parametrize("table", ["heads", "messages"])
    async def test_rows_that_a_policy_would_hide_are_told(
        self, url: str, by_hand: Any, table: str
    ) -> None:
        """Under row-level security no pull hears that there is nothing, and the check says why."""
        role = f"role_{uuid.uuid4().hex}"
        await by_hand.execute(f"CREATE ROLE {role} LOGIN")
        await by_hand.execute(f"CREATE SCHEMA {url.partition('?schema=')[2]} AUTHORIZATION {role}")
        mailbox = await PostgresMailbox.open(url.replace("postgres@", f"{role}@"))
        await fill(mailbox, 2)
        await by_hand.execute(
            f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY"
        )
        with pytest.raises(MailboxError, match="row-level security"):
            await mailbox.check()
        with pytest.raises(MailboxError, match=r"see this instance's log$"):
            await mailbox.read(BOB, after=0, limit=10)
        await by_hand.execute(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
        await mailbox.check()
        assert await versions(mailbox) == [1, 2]
        await mailbox.close()


class TestPlans:
    """What a statement costs, asked of the planner with real rows in the tables."""

    async def test_an_empty_pull_is_one_look_up(
        self, mailbox: PostgresMailbox, by_hand: Any
    ) -> None:
        """A reader that has the head costs one statement: a look-up of the head by its key."""
        await asyncio.gather(*(mailbox.append(message(f"r{n % 500}")) for n in range(2000)))
        statements: list[str] = []
        for connection in mailbox._pool._idle:
            connection.add_query_logger(lambda record: statements.append(record.query))
        await mailbox.read("r7", after=4, limit=50)
        await mailbox.read("r7", after=0, limit=50, unless_head=4)
        assert statements == [postgres.HEADS] * 2
        assert len((await mailbox.read("r7", after=3, limit=50)).messages) == 1
        assert statements[2:] == [postgres.HEADS, postgres.READ]
        await by_hand.execute("ANALYZE")
        plan = await _explain(by_hand, postgres.HEADS, ["r7"])
        assert [(node["Node Type"], node["Index Name"]) for node in _nodes(plan)] == [
            ("Index Scan", "heads_pkey")
        ]

    async def test_pulls_share_a_round_trip(self, mailbox: PostgresMailbox) -> None:
        """Hundreds of pulls that come at once are a few statements, and get each its own page."""
        await asyncio.gather(*(mailbox.append(message(f"r{n % 60}")) for n in range(180)))
        statements: list[str] = []
        for connection in mailbox._pool._idle:
            connection.add_query_logger(lambda record: statements.append(record.query))
        pages = await asyncio.gather(
            *(mailbox.read(f"r{n}", after=n % 4, limit=1 + n % 2) for n in range(200))
        )
        for n, page in enumerate(pages):
            there = range(n % 4 + 1, 4) if n < 60 else range(0)
            shown = list(there)[: 1 + n % 2]
            assert [kept.version for kept in page.messages] == shown
            assert page.more == (len(shown) < len(there))
        assert len(statements) < 20

    async def test_acks_share_a_round_trip(self, mailbox: PostgresMailbox) -> None:
        """Acks that come at once are a few statements, and each deletes what its device has."""
        await asyncio.gather(*(mailbox.append(message(f"r{n % 50}")) for n in range(150)))
        statements: list[str] = []
        for connection in mailbox._pool._idle:
            connection.add_query_logger(lambda record: statements.append(record.query))
        acks = ((f"r{n % 50}", n // 50) for n in range(150))  # 0 to 2 of each one's 3
        await asyncio.gather(*(mailbox.ack(recipient, "phone", upto) for recipient, upto in acks))
        assert len(statements) < 10
        for n in range(50):
            page = await mailbox.read(f"r{n}", after=0, limit=10)
            assert [kept.version for kept in page.messages] == [3]

    async def test_a_page_is_read_in_order_by_its_key(
        self, mailbox: PostgresMailbox, by_hand: Any
    ) -> None:
        """A page of a large mailbox costs its own messages, not all that are there."""
        await asyncio.gather(*(mailbox.append(message()) for _ in range(2000)))
        await by_hand.execute("ANALYZE")
        plan = await _explain(by_hand, postgres.READ, [BOB], [100], [1000], 11, None)
        scans = {node["Relation Name"]: node for node in _nodes(plan) if "Relation Name" in node}
        assert scans["messages"]["Index Name"] == "messages_pkey"
        assert scans["messages"]["Actual Rows"] == 11

    async def test_no_statement_reads_a_table_through(self, url: str, by_hand: Any) -> None:
        """Whatever a mailbox does, no table is scanned as a whole, however small it still is."""
        mailbox = await PostgresMailbox.open(url)
        for n in range(20):
            await mailbox.append(message(f"r{n}", id=f"{n}", has_idempotency_key=True, ttl_s=n))
        await by_hand.execute("ANALYZE")
        await _close_and_wait(mailbox, by_hand)
        before = await _sequential_scans(by_hand)
        mailbox = await PostgresMailbox.open(url)
        for n in range(8):
            await mailbox.append(message(f"r{n}", id=f"n{n}", has_idempotency_key=True, ttl_s=9))
            await mailbox.read(f"r{n}", after=0, limit=3)
            await mailbox.see_device(f"r{n}", "phone")
            await mailbox.ack(f"r{n}", "phone", 2)
            await mailbox.ack_all([Ack(f"r{n}", "phone", 2), Ack(f"r{n}", "tablet", 1)])
            await mailbox.confirm_outbox(await mailbox.claim_outbox(older_than_s=0, limit=5))
            await mailbox.purge(limit=5)
            await mailbox.clear(f"r{n}")
        await _close_and_wait(mailbox, by_hand)
        assert await _sequential_scans(by_hand) == before


async def _waiting_for_locks(connection: Any, at_least: int = 1) -> bool:
    await connection.execute("SELECT pg_stat_clear_snapshot()")
    waiting = await connection.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        " AND query LIKE '%append_within_shares(%' AND backend_type = 'client backend'"
    )
    return bool(waiting >= at_least)


async def _head_above(mailbox: Mailbox, version: int) -> bool:
    return await head(mailbox, BOB) > version


async def _answers(mailbox: Mailbox) -> bool:
    try:
        await mailbox.check()
    except MailboxError:
        return False
    return True


async def _explain(connection: Any, statement: str, *parameters: object) -> Any:
    text = await connection.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", *parameters)
    return json.loads(text)[0]["Plan"]


def _nodes(plan: Any) -> list[Any]:
    return [plan, *(node for child in plan.get("Plans", []) for node in _nodes(child))]


async def _close_and_wait(mailbox: PostgresMailbox, connection: Any) -> None:
    """Close the mailbox and wait until its sessions have ended, since then they report."""
    pids = [idle.get_server_pid() for idle in mailbox._pool._idle]
    await mailbox.close()

    async def all_ended() -> bool:
        return not await connection.fetch(
            "SELECT FROM pg_stat_activity WHERE pid = ANY ($1::int[])", pids
        )

    await wait_until(all_ended)


async def _sequential_scans(connection: Any) -> dict[str, int]:
    """By table, as the sessions that have ended reported them."""
    rows = await connection.fetch(
        "SELECT relname, seq_scan FROM pg_stat_user_tables"
        " WHERE schemaname = current_schema() AND relname <> 'migrations'"
    )
    return {row["relname"]: row["seq_scan"] for row in rows}
