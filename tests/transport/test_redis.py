"""The Redis transport: the contract, outages, what people publish by hand, permissions, TLS."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import valkey

from pokebridge.errors import ConfigError, TransportError
from pokebridge.testing.transport import RecordingReceiver, subscribe_live
from pokebridge.transport.base import Feed, Signal
from pokebridge.transport.redis import PUBLISH_CONNECTIONS, RedisTransport
from tests.support import CutProxy, Daemon, wait_until
from tests.support.engines import ask, has_role, run_valkey
from tests.support.silence import Silence
from tests.support.stream_server import relay, stream_server
from tests.transport.certificates import Certificates
from tests.transport.engines import (
    ByHandContract,
    ConnectUrl,
    EngineContract,
    PermissionContract,
    PublishByHand,
    StartContract,
    TlsContract,
    TlsServer,
    closing_all,
)
from tests.transport.outages import SELECTIONS, Flood, OutageContract, assert_hears

RunServer = Callable[..., Daemon]


@pytest.fixture
async def connect_url() -> AsyncIterator[ConnectUrl]:
    """``RedisTransport.connect``, closed afterwards."""
    async with closing_all(RedisTransport.connect) as connect:
        yield connect


@pytest.fixture
def run_server(tmp_path: Path) -> Iterator[RunServer]:
    """Starts a Valkey server with flags, and kills it afterwards."""
    with ExitStack() as running:
        yield lambda *flags: running.enter_context(run_valkey(tmp_path, *flags))


@pytest.fixture
def connect_topic(valkey_server: Daemon, connect_url: ConnectUrl) -> ConnectUrl:
    """By channel, at the session's server."""
    return lambda topic: connect_url(valkey_server.url, channel=topic)


@pytest.fixture
def plain(valkey_server: Daemon) -> Iterator[valkey.Valkey]:
    """A plain client of another kind, at the session's server."""
    with valkey.Valkey(port=valkey_server.port) as client:
        yield client


class TestContract(EngineContract):
    """The shipped suite."""


class TestOutages(OutageContract):
    """The suite for everything with a connection."""

    scheme = "redis"

    @pytest.fixture
    async def own_server(self, run_server: RunServer) -> Daemon:
        """A server that bears with 2 MB for a slow consumer."""
        limit = ("--client-output-buffer-limit", "pubsub 2mb 2mb 60")
        return await asyncio.to_thread(run_server, *limit)

    @pytest.fixture
    def flood(self) -> Flood:
        """Messages of 4 KB, until nobody receives them (larger ones hardly count in Valkey 9.1)."""

        def flood(server: Daemon) -> int:
            with valkey.Valkey(port=server.port) as client:
                for sent in range(100, 100_000, 100):
                    pipeline = client.pipeline(transaction=False)
                    for _ in range(100):
                        pipeline.publish("push-notifications", b"x" * 4000)
                    if pipeline.execute()[-1] == 0:
                        return sent
            pytest.fail("the server kept the slow consumer")

        return flood


class TestByHand(ByHandContract):
    """What people publish with tools of their own."""

    @pytest.fixture
    def by_hand(self, plain: valkey.Valkey) -> PublishByHand:
        """Valkey's own client."""

        async def publish(channel: str, body: bytes) -> None:
            await asyncio.to_thread(plain.publish, channel, body)

        return publish

    async def test_garbage_does_no_harm(
        self, valkey_server: Daemon, connect_url: ConnectUrl, plain: valkey.Valkey
    ) -> None:
        """Any bytes on a channel are passed on as bodies."""
        transport = await connect_url(valkey_server.url, channel="garbage")
        _, receiver = await subscribe_live(transport, Feed.ALL)
        bodies = [b"", b"\x00\xff\r\n", b"*3\r\n$7\r\nmessage\r\n", b"+PONG", b"y" * 1_000_000]
        channels = [b"garbage", b"garbage.", b"garbage.\xff\x00", b"garbage.1.2"]
        for body in bodies:
            for channel in channels:
                await asyncio.to_thread(plain.publish, channel, body)
        await receiver.wait_for(lambda heard: len(heard.payloads) == 20)
        assert set(receiver.payloads) == set(bodies)
        await assert_hears(transport, receiver, 1)
        assert receiver.gaps == []


class TestPublishing:
    """Publishing, at its limits."""

    async def test_many_at_once_share_a_few_connections(
        self, valkey_server: Daemon, connect_url: ConnectUrl, plain: valkey.Valkey
    ) -> None:
        """The number of connections to the server is limited, whatever the number of calls."""
        name = "many"
        transport = await connect_url(valkey_server.url, channel="many", instance=name)
        _, receiver = await subscribe_live(transport, Feed.ALL)
        calls = [transport.publish([Signal(b"%d" % n, n)]) for n in range(200)]
        await asyncio.gather(*calls)
        await receiver.wait_for(lambda heard: len(heard.payloads) == 200)
        clients: Any = await asyncio.to_thread(plain.client_list)
        ours = [c for c in clients if c["name"] == f"pokebridge:default:{name}"]
        assert len(ours) <= 1 + PUBLISH_CONNECTIONS

    async def test_a_silent_server_does_not_hold_a_publish(
        self, connect_url: ConnectUrl, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A server that takes a publish and never answers is an error in bounded time."""
        monkeypatch.setattr("pokebridge.transport.redis.ANSWER_TIMEOUT_S", 0.3)

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            answers = {b"PING": b"+PONG\r\n", b"CLIENT": b"+OK\r\n", b"HELLO": b"-ERR\r\n"}
            while line := await reader.readline():
                writer.write(answers.get(line.strip(), b""))

        async with stream_server(answer) as port:
            transport = await connect_url(f"redis://127.0.0.1:{port}")
            async with asyncio.timeout(5):
                with pytest.raises(TransportError, match=f"{port}.*"):
                    await transport.publish([Signal(b"{}", 1)])
            await transport.close()


class TestReplica:
    """A server that is demoted while connections to it stay open, as in a managed failover."""

    @pytest.fixture
    async def servers(self, tmp_path: Path) -> AsyncIterator[tuple[Daemon, Daemon]]:
        """A primary and its replica, in step."""
        with ExitStack() as running:
            primary = await asyncio.to_thread(running.enter_context, run_valkey(tmp_path))
            (tmp_path / "replica").mkdir()
            replica = await asyncio.to_thread(
                running.enter_context, run_valkey(tmp_path / "replica")
            )
            await ask(replica, "REPLICAOF", "127.0.0.1", primary.port)
            await wait_until(partial(has_role, replica, b"connected"))
            yield primary, replica

    async def test_a_demoted_server_is_left(
        self, servers: tuple[Daemon, Daemon], connect_url: ConnectUrl
    ) -> None:
        """Connections that stay at the old primary are replaced, and no signal is lost there."""
        primary, replica = servers
        async with CutProxy("127.0.0.1", primary.port) as address:
            stays = await connect_url(f"redis://{address.address}")
            receivers = {which: (await subscribe_live(stays, which))[1] for which in SELECTIONS}
            await ask(primary, "FAILOVER")
            await wait_until(partial(has_role, replica, b"master"))
            address.lead_to(replica.port)
            with pytest.raises(TransportError, match="replica"):
                await stays.publish([Signal(b'{"recipient":"a"}', 42)])
            comes = await connect_url(f"redis://{address.address}")
            _, heard = await subscribe_live(comes, Feed.ALL)
            await assert_hears(stays, heard, 42)
            for which, receiver in receivers.items():
                await receiver.wait_for(lambda heard: bool(heard.gaps))
                assert "replica" in receiver.gaps[0][1]
                await assert_hears(comes, receiver, which if isinstance(which, int) else None)

    async def test_no_start_at_a_replica(
        self, servers: tuple[Daemon, Daemon], connect_url: ConnectUrl
    ) -> None:
        """Signals published at a replica reach nobody else, so the start fails with that reason."""
        with pytest.raises(TransportError, match=f"{servers[1].address}.*a replica.*a primary"):
            await connect_url(servers[1].url)


class TestStart(StartContract):
    """What a start says when it can't be."""

    scheme = "redis"

    @pytest.mark.parametrize(
        ("url", "said"),
        [
            ("http://127.0.0.1", "redis://"),
            ("redis://127.0.0.1/zero", "redis://"),
            ("redis://127.0.0.1:port/0", "a port must be a number"),
            ("redis://127.0.0.1?protocol=3", "'protocol'"),
            ("rediss://127.0.0.1?ca_file=/nowhere", "nowhere"),
        ],
    )
    async def test_a_url_that_makes_no_sense(self, url: str, said: str) -> None:
        """It is a setting that is wrong, and the message says which."""
        with pytest.raises(ConfigError, match=said):
            await RedisTransport.connect(url)

    @pytest.mark.parametrize("channel", ["", "a b", "a*", "a?", "a[b]", "ä"])
    async def test_a_channel_that_makes_no_sense(self, channel: str) -> None:
        """Nothing that Redis would take for a pattern."""
        with pytest.raises(ConfigError, match="channel"):
            await RedisTransport.connect("redis://127.0.0.1", channel=channel)


class TestCredentials(PermissionContract):
    """Users and what they may do."""

    @pytest.fixture
    async def server(self, run_server: RunServer) -> Daemon:
        """A server whose user may publish on two channels and listen to one."""
        server = await asyncio.to_thread(run_server)
        with valkey.Valkey(port=server.port) as client:
            client.acl_setuser(
                "me",
                enabled=True,
                passwords=["+p@ss:/w"],
                channels=["push-notifications", "push-notifications.7"],
                categories=["-@all", "+@connection"],
                commands=["+publish", "+subscribe", "+unsubscribe"],
            )
            client.config_set("requirepass", "d3fault")
        return server

    async def test_user_and_password(self, server: Daemon, connect_url: ConnectUrl) -> None:
        """The right ones work, percent-encoded; wrong ones or none are one line without them."""
        right = f"redis://me:p%40ss%3A%2Fw@{server.address}"
        await subscribe_live(await connect_url(right), 7)
        await subscribe_live(await connect_url(f"redis://:d3fault@{server.address}"), 7)
        with pytest.raises(TransportError, match=f"{server.address}.*password") as caught:
            await connect_url(f"redis://me:s3cret@{server.address}")
        assert "s3cret" not in str(caught.value)
        with pytest.raises(TransportError, match=f"{server.address}.*authenticate"):
            await connect_url(server.url)

    async def test_what_the_docs_grant_is_enough(
        self, server: Daemon, connect_url: ConnectUrl
    ) -> None:
        """The ACL that docs/transports/redis.md names suffices an instance and a backend."""
        page = Path(__file__).parents[2] / "docs" / "transports" / "redis.md"
        text = await asyncio.to_thread(page.read_text)
        rules = text.split("    ACL SETUSER bridge ")[1].split("\n\n")[0].split()
        with valkey.Valkey(port=server.port, password="d3fault") as client:
            admin: Any = client
            admin.execute_command("ACL", "SETUSER", "bridge", *rules)
            admin.execute_command(
                *["ACL", "SETUSER", "backend", "on", ">SECRET", "resetchannels"],
                *["&push-notifications", "&push-notifications.*"],
                *["-@all", "+@connection", "+publish"],
            )
        instance = await connect_url(f"redis://bridge:SECRET@{server.address}")
        receivers = {which: (await subscribe_live(instance, which))[1] for which in SELECTIONS}
        subscription, _ = await subscribe_live(instance, 1)
        await subscription.close()
        backend = await connect_url(f"redis://backend:SECRET@{server.address}")
        await backend.publish([Signal(b'{"recipient":"a"}', 42), Signal(b'{"recipient":"b"}')])
        await receivers[Feed.ALL].wait_for(lambda heard: len(heard.payloads) == 2)

    async def test_what_the_docs_grant_a_cluster_is_its_own_and_no_others(
        self, server: Daemon, connect_url: ConnectUrl
    ) -> None:
        """With a user for each cluster none can publish or listen in another cluster."""
        page = Path(__file__).parents[2] / "docs" / "transports" / "redis.md"
        text = await asyncio.to_thread(page.read_text)
        rules = text.split("    ACL SETUSER red ")[1].split("\n\n")[0].split()
        with valkey.Valkey(port=server.port, password="d3fault") as client:
            admin: Any = client
            admin.execute_command("ACL", "SETUSER", "red", *rules)
        red = await connect_url(f"redis://red:SECRET@{server.address}", cluster="red")
        for which in SELECTIONS:
            await subscribe_live(red, which)
        intruder = await connect_url(f"redis://red:SECRET@{server.address}", cluster="blue")
        with pytest.raises(TransportError, match="permission"):
            await intruder.subscribe(Feed.ALL, RecordingReceiver())
        with pytest.raises(TransportError, match="permission"):
            await intruder.publish([Signal(b"{}")])

    async def test_a_changed_password_is_read_from_its_file(
        self, server: Daemon, connect_url: ConnectUrl, tmp_path: Path, silence: Silence
    ) -> None:
        """After a rotation the connections that the server closed are restored."""
        path = tmp_path / "password"
        await asyncio.to_thread(path.write_text, "p@ss:/w\n")
        transport = await connect_url(f"redis://me@{server.address}?password_file={path}")
        _, receiver = await subscribe_live(transport, 7)
        with valkey.Valkey(port=server.port, password="d3fault") as client:
            admin: Any = client
            admin.execute_command("ACL", "SETUSER", "me", "resetpass", ">n3w")
            await asyncio.to_thread(path.write_text, "n3w")
            admin.execute_command("CLIENT", "KILL", "USER", "me")
        heard_again = silence("a password is changed, and its connections are ended: Valkey")
        await receiver.wait_for(lambda heard: bool(heard.gaps))
        await assert_hears(transport, receiver, 7)
        heard_again()

    async def test_an_unreadable_password_file_fails_the_start(
        self, server: Daemon, connect_url: ConnectUrl
    ) -> None:
        """One line names the option and the file."""
        with pytest.raises(ConfigError, match=r"password_file.*/nowhere"):
            await connect_url(f"redis://me@{server.address}?password_file=/nowhere")

    @pytest.fixture
    async def restricted(self, server: Daemon, connect_url: ConnectUrl) -> RedisTransport:
        """That user's transport."""
        url = f"redis://me:p%40ss%3A%2Fw@{server.address}"
        transport: RedisTransport = await connect_url(url)
        return transport

    @pytest.fixture
    def take_away(self, server: Daemon) -> Callable[[], Awaitable[None]]:
        """Shard 7's channel."""
        rules = ("resetchannels", "&push-notifications")
        return partial(asyncio.to_thread, self._set_user, server, *rules)

    @pytest.fixture
    def give_back(self, server: Daemon) -> Callable[[], Awaitable[None]]:
        """Shard 7's again."""
        return partial(asyncio.to_thread, self._set_user, server, "&push-notifications.7")

    @staticmethod
    def _set_user(server: Daemon, *rules: str) -> None:
        with valkey.Valkey(port=server.port, password="d3fault") as client:
            client.execute_command("ACL", "SETUSER", "me", *rules)


class TestTls(TlsContract):
    """TLS by the URL's scheme; this build of Valkey has none, so a proxy ends it."""

    @pytest.fixture
    def tls_server(self, valkey_server: Daemon, certificates: Certificates) -> TlsServer:
        """The session's server, behind it."""

        @asynccontextmanager
        async def serve(*, ask: bool = False) -> AsyncIterator[str]:
            async with _tls_proxy(valkey_server.port, certificates, ask=ask) as port:
                yield f"rediss://127.0.0.1:{port}/0"

        return serve


@asynccontextmanager
async def _tls_proxy(
    target_port: int, certificates: Certificates, *, ask: bool = False
) -> AsyncIterator[int]:
    """The port of a TLS end in front of ``target_port``; ``ask`` for the client's certificate."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificates.ca_file)
    context.load_cert_chain(certificates.cert_file, certificates.key_file)
    context.verify_mode = ssl.CERT_REQUIRED if ask else ssl.CERT_NONE

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await relay(reader, writer, target_port)

    async with stream_server(accept, tls=context) as port:
        yield port
