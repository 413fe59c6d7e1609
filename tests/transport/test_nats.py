"""The NATS transport: the contract, outages, what people publish by hand, permissions, TLS."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import nats
import pytest
from structlog.testing import capture_logs

from pokebridge.errors import ConfigError, TransportError
from pokebridge.mailbox.memory import MemoryMailbox
from pokebridge.model import NewMessage, Poke
from pokebridge.processor import Processor
from pokebridge.publisher import Publisher
from pokebridge.sharding import shard_of
from pokebridge.testing.transport import RecordingReceiver, prove_live, subscribe_live
from pokebridge.transport.base import Feed, Signal
from pokebridge.transport.nats import NatsTransport
from pokebridge.wire import decode_signal, is_probe
from tests.support import CutProxy, Daemon, free_port, wait_until
from tests.support.engines import run_configured_nats, running_nats_pair
from tests.support.missing import missing
from tests.support.stream_server import stream_server
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

RunServer = Callable[[str], Daemon]


@pytest.fixture
async def connect_url() -> AsyncIterator[ConnectUrl]:
    """``NatsTransport.connect``, closed afterwards."""
    async with closing_all(NatsTransport.connect) as connect:
        yield connect


@pytest.fixture
def run_server(tmp_path: Path) -> Iterator[RunServer]:
    """Starts a nats-server with a configuration, and kills it afterwards."""
    with ExitStack() as running:
        yield lambda config: running.enter_context(run_configured_nats(tmp_path, config))


@pytest.fixture
def connect_topic(nats_server: Daemon, connect_url: ConnectUrl) -> ConnectUrl:
    """By subject, at the session's server."""
    return lambda topic: connect_url(nats_server.url, subject=topic)


@contextmanager
def raw_client(address: str) -> Iterator[Callable[[bytes], None]]:
    """The protocol by hand: what is yielded sends, and waits until the server has dealt with it."""
    host, port = address.split(":")
    with (
        socket.create_connection((host, int(port)), timeout=30) as connection,
        connection.makefile("rb") as lines,
    ):
        lines.readline()  # INFO
        connection.sendall(b'CONNECT {"verbose":false,"headers":true}\r\n')

        def send(data: bytes) -> None:
            connection.sendall(data + b"PING\r\n")
            assert lines.readline() == b"PONG\r\n"

        yield send


class TestServersOfACluster:
    """Two servers, with 500 ms on the route between them."""

    @pytest.fixture
    async def pair(self, tmp_path: Path) -> AsyncIterator[tuple[Daemon, Daemon, CutProxy]]:
        """The servers and the route."""
        async with running_nats_pair(tmp_path, route_delay_s=0.5) as pair:
            yield pair

    async def test_a_subscription_is_accepted_by_all_of_them(
        self, pair: tuple[Daemon, Daemon, CutProxy], connect_url: ConnectUrl
    ) -> None:
        """What another server is given once ``subscribe`` has returned arrives."""
        x, y = [await connect_url(server.url) for server in pair[:2]]
        await self._joined(x, y)
        for shard in (7, 8, 9):
            receiver = RecordingReceiver()
            await y.subscribe(shard, receiver)
            await assert_hears(x, receiver, shard)

    async def test_a_gap_ends_when_all_of_them_know(
        self, pair: tuple[Daemon, Daemon, CutProxy], connect_url: ConnectUrl
    ) -> None:
        """What another server is given once a gap is reported arrives."""
        x = await connect_url(pair[0].url)
        async with CutProxy("127.0.0.1", pair[1].port) as cable:
            y = await connect_url(f"nats://{cable.address}")
            await self._joined(x, y)
            _, receiver = await subscribe_live(y, 7)
            cable.reset()
            await receiver.wait_for(lambda heard: bool(heard.gaps))
            await assert_hears(x, receiver, 7)

    async def test_the_url_says_how_long_it_takes(
        self, pair: tuple[Daemon, Daemon, CutProxy], connect_url: ConnectUrl
    ) -> None:
        """The time in the URL replaces the default. An invalid time is refused."""
        transport = await connect_url(f"{pair[0].url}?interest_spread_s=30")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2):
                await transport.subscribe(7, RecordingReceiver())
        with pytest.raises(ConfigError, match=r"interest_spread_s 'soon'.*seconds"):
            await connect_url(f"{pair[0].url}?interest_spread_s=soon")

    async def _joined(self, x: NatsTransport, y: NatsTransport) -> None:
        """Return when the servers have found each other."""
        receiver = RecordingReceiver()
        subscription = await y.subscribe(1, receiver)
        await prove_live(x, receiver, 1)
        await subscription.close()


class TestContract(EngineContract):
    """The shipped suite."""


class TestOutages(OutageContract):
    """The suite for everything with a connection."""

    scheme = "nats"

    @pytest.fixture
    async def own_server(self, run_server: RunServer) -> Daemon:
        """A server that bears with 2 MB for a slow consumer."""
        return await asyncio.to_thread(run_server, "max_pending: 2MB")

    @pytest.fixture
    def flood(self) -> Flood:
        """Messages of 100 KB from a raw client, until the server's log tells of the cut."""

        def flood(server: Daemon) -> int:
            message = b"PUB push-notifications 100000\r\n%b\r\n" % (b"x" * 100_000)
            with raw_client(server.address) as send:
                for sent in range(0, 10_000, 10):
                    send(message * 10)
                    if "Slow Consumer" in server.log():
                        return sent + 10
            pytest.fail("the server kept the slow consumer")

        return flood


class TestByHand(ByHandContract):
    """What people publish with tools of their own."""

    @pytest.fixture
    async def by_hand(self, nats_server: Daemon) -> AsyncIterator[PublishByHand]:
        """NATS's own client."""
        client = await nats.connect(nats_server.url)
        yield client.publish
        await client.close()

    async def test_a_shard_in_a_header_is_no_tag(
        self, nats_server: Daemon, connect_url: ConnectUrl
    ) -> None:
        """Headers are not looked at: such a signal is untagged, so that every instance hears it."""
        transport = await connect_url(nats_server.url, subject="by-header")
        _, untagged = await subscribe_live(transport, Feed.UNTAGGED)
        client = await nats.connect(nats_server.url)
        await client.publish("by-header", b'{"recipient":"a"}', headers={"shard": "42"})
        await client.close()
        await untagged.wait_for(lambda heard: heard.payloads == [b'{"recipient":"a"}'])

    async def test_garbage_does_no_harm(self, nats_server: Daemon, connect_url: ConnectUrl) -> None:
        """Invalid subjects, invalid headers and empty bodies are passed on as bodies."""
        transport = await connect_url(nats_server.url, subject="garbage")
        _, receiver = await subscribe_live(transport, Feed.ALL)
        with raw_client(nats_server.address) as send:
            for header in (
                b"x",
                b"NATS/1.0",
                b"NATS/1.0 \xff\r\n\r\n",
                b"NATS/1.0\r\n\xff:\r\n\r\n",
            ):
                size = len(header)
                send(b"HPUB garbage %d %d\r\n%bok\r\n" % (size, size + 2, header))
            send(b"PUB garbage.\xff\xfe 2\r\nok\r\n")
            send(b"PUB garbage.no-shard _INBOX.x 2\r\nok\r\n")
            send(b"PUB garbage.\x0b1 2\r\nok\r\n")
            send(b"PUB garbage.\x0c _INBOX.\x0b 2\r\nok\r\n")
            send(b"PUB garbage 0\r\n\r\n")
        await receiver.wait_for(lambda heard: len(heard.payloads) == 9)
        assert sorted(receiver.payloads) == [b"", *[b"ok"] * 8]
        await assert_hears(transport, receiver, 1)
        assert receiver.gaps == []


class TestStart(StartContract):
    """What a start says when it can't be."""

    scheme = "nats"

    async def test_any_of_the_servers_will_do(
        self, nats_server: Daemon, connect_url: ConnectUrl
    ) -> None:
        """A list with dead servers in it connects to the living one."""
        dead = [f"127.0.0.1:{free_port()}" for _ in range(3)]
        transport = await connect_url(f"nats://{dead[0]},{dead[1]},{nats_server.address},{dead[2]}")
        await subscribe_live(transport, 1)

    async def test_a_mute_server_gives_way_to_another(
        self, nats_server: Daemon, connect_url: ConnectUrl
    ) -> None:
        """One that accepts connections and never answers does not fail the start."""
        with socket.create_server(("127.0.0.1", 0)) as mute:
            address = f"127.0.0.1:{mute.getsockname()[1]}"
            for _ in range(3):  # they are tried in any order
                transport = await connect_url(f"nats://{address},{nats_server.address}")
                await subscribe_live(transport, 1)

    @pytest.mark.parametrize(
        ("url", "said"),
        [
            ("http://127.0.0.1", "nats://"),
            ("nats://", "nats://"),
            ("nats://127.0.0.1/path", "nats://"),
            ("nats://127.0.0.1?sub=1", "'sub'"),
            ("nats://127.0.0.1?ca_file=/nowhere", "ca_file=/nowhere"),
        ],
    )
    async def test_a_url_that_makes_no_sense(self, url: str, said: str) -> None:
        """It is a setting that is wrong, and the message says which."""
        with pytest.raises(ConfigError, match=said):
            await NatsTransport.connect(url)

    @pytest.mark.parametrize("subject", ["", "a b", "a.*", "a.>", "a..b", "ä"])
    async def test_a_subject_that_makes_no_sense(self, subject: str) -> None:
        """Nothing that NATS would take for a pattern, or not at all."""
        with pytest.raises(ConfigError, match="subject"):
            await NatsTransport.connect("nats://127.0.0.1", subject=subject)


class TestCredentials:
    """Users, tokens, permissions."""

    @pytest.mark.parametrize(
        ("config", "right", "wrong"),
        [
            ('user: "me", password: "p@ss:/w"', "me:p%40ss%3A%2Fw", "me:s3cret"),
            ('token: "t0/ken"', "t0%2Fken", "s3cret"),
            ('token: "t0/ken"', "t0%2Fken", None),
        ],
    )
    async def test_password_and_token(
        self,
        run_server: RunServer,
        connect_url: ConnectUrl,
        config: str,
        right: str,
        wrong: str | None,
    ) -> None:
        """The right ones work, percent-encoded; wrong ones are one line without them."""
        server = await asyncio.to_thread(run_server, f"authorization {{ {config} }}")
        await subscribe_live(await connect_url(f"nats://{right}@{server.address}"), Feed.ALL)
        with pytest.raises(TransportError, match=f"{server.address}.*Authorization") as caught:
            await connect_url(f"nats://{wrong}@{server.address}" if wrong else server.url)
        assert "s3cret" not in str(caught.value)

    @pytest.mark.parametrize("option", ["nkey_file", "creds_file"])
    async def test_keys(
        self, run_server: RunServer, connect_url: ConnectUrl, tmp_path: Path, option: str
    ) -> None:
        """An nkey's seed and an operator's credentials file work; another's are refused."""
        nats_identities = import_identities()
        make = (
            nats_identities.nkey_user if option == "nkey_file" else nats_identities.operators_user
        )
        config, ours = make()
        _, anothers = make()
        path = tmp_path / "identity"
        await asyncio.to_thread(path.write_text, ours)
        server = await asyncio.to_thread(run_server, config)
        await subscribe_live(await connect_url(f"{server.url}?{option}={path}"), Feed.ALL)
        await asyncio.to_thread(path.write_text, anothers)
        with pytest.raises(TransportError, match="Authorization"):
            await connect_url(f"{server.url}?{option}={path}")
        with pytest.raises(ConfigError, match=option):
            await connect_url(f"{server.url}?{option}=/nowhere")

    async def test_credentials_that_expire(
        self, run_server: RunServer, connect_url: ConnectUrl, tmp_path: Path
    ) -> None:
        """The server ends the connection: an error until the file has new ones, then a gap."""
        operator = import_identities().Operator()
        path = tmp_path / "credentials"
        await asyncio.to_thread(path.write_text, operator.credentials(ttl_s=4))
        server = await asyncio.to_thread(run_server, operator.config)
        transport = await connect_url(f"{server.url}?creds_file={path}")
        _, receiver = await subscribe_live(transport, 7)

        async def is_refused() -> bool:
            try:
                await transport.publish([Signal(b"{}", 7)])
            except TransportError as error:
                return "Authorization" in str(error)
            return False

        await wait_until(is_refused, 30)
        await asyncio.to_thread(path.write_text, operator.credentials())
        await receiver.wait_for(lambda heard: bool(heard.gaps), 30)
        await assert_hears(transport, receiver, 7)

    async def test_what_the_docs_grant_is_enough(
        self, run_server: RunServer, connect_url: ConnectUrl
    ) -> None:
        """The permissions that docs/transports/nats.md names suffice an instance and a backend."""
        server = await asyncio.to_thread(run_server, documented_permissions()[0])
        instance = await connect_url(f"nats://bridge:SECRET@{server.address}")
        receivers = {which: (await subscribe_live(instance, which))[1] for which in SELECTIONS}
        backend = await connect_url(f"nats://backend:SECRET@{server.address}")
        await backend.publish([Signal(b'{"recipient":"a"}', 42), Signal(b'{"recipient":"b"}')])
        await receivers[Feed.ALL].wait_for(lambda heard: len(heard.payloads) == 2)

    async def test_what_the_docs_grant_a_cluster_is_its_own_and_no_others(
        self, run_server: RunServer, connect_url: ConnectUrl
    ) -> None:
        """With a user for each cluster none can publish or listen in another cluster."""
        server = await asyncio.to_thread(run_server, documented_permissions()[1])
        red = await connect_url(f"nats://red:SECRET@{server.address}", cluster="red")
        for which in SELECTIONS:
            await subscribe_live(red, which)
        intruder = await connect_url(f"nats://red:SECRET@{server.address}", cluster="blue")
        with pytest.raises(TransportError, match="permission"):
            await intruder.subscribe(Feed.ALL, RecordingReceiver())
        with pytest.raises(TransportError, match="permission"):
            await intruder.publish([Signal(b"{}")])


def import_identities() -> ModuleType:
    """The module that makes credentials of NATS's own kind."""
    if find_spec("nkeys") is None:
        missing("nkeys, for NATS's own credentials (pip install 'nats-py[nkeys]')")
    return import_module("tests.transport.nats_identities")


def documented_permissions() -> list[str]:
    """The examples of docs/transports/nats.md: for one cluster, and for several."""
    page = Path(__file__).parents[2] / "docs" / "transports" / "nats.md"
    parts = page.read_text().split("    authorization {")[1:]
    return ["    authorization {" + part.split("\n\n")[0] for part in parts]


class TestPermissions(PermissionContract):
    """Subjects that a user may not use."""

    USER = """authorization {{ users = [ {{ user: me, password: pw, permissions: {{
        publish: ["push-notifications", "push-notifications.7"]
        subscribe: ["push-notifications", "{}"] }} }} ] }}"""

    @pytest.fixture
    async def server(self, run_server: RunServer) -> Daemon:
        """A server with that user."""
        return await asyncio.to_thread(run_server, self.USER.format("push-notifications.7"))

    @pytest.fixture
    async def restricted(self, server: Daemon, connect_url: ConnectUrl) -> NatsTransport:
        """That user's transport."""
        transport: NatsTransport = await connect_url(f"nats://me:pw@{server.address}")
        return transport

    @pytest.fixture
    def take_away(self, server: Daemon) -> Callable[[], Awaitable[None]]:
        """Another subject instead."""
        return partial(self._allow, server, "other")

    @pytest.fixture
    def give_back(self, server: Daemon) -> Callable[[], Awaitable[None]]:
        """Shard 7's again."""
        return partial(self._allow, server, "push-notifications.7")

    async def _allow(self, server: Daemon, subject: str) -> None:
        """Reload with another configuration."""
        path = server._directory / "nats.conf"
        await asyncio.to_thread(path.write_text, self.USER.format(subject))
        os.kill(server.pid, signal.SIGHUP)


class TestTls(TlsContract):
    """TLS by the URL's scheme."""

    @pytest.fixture
    def tls_server(self, run_server: RunServer, certificates: Certificates) -> TlsServer:
        """A server of our own."""

        @asynccontextmanager
        async def serve(*, ask: bool = False) -> AsyncIterator[str]:
            more = "verify: true" if ask else ""
            server = await asyncio.to_thread(run_server, _tls(certificates, more))
            yield f"tls://127.0.0.1:{server.port}"

        return serve

    async def test_no_downgrade(self, connect_url: ConnectUrl) -> None:
        """``tls://`` sends nothing to a server that offers no TLS, least of all the password."""
        heard = bytearray()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b'INFO {"max_payload":1000,"headers":true}\r\n')
            heard.extend(await reader.read())

        async with stream_server(accept) as port:
            with pytest.raises(TransportError, match="secure connection not available"):
                await connect_url(f"tls://me:s3cret@127.0.0.1:{port}")
        assert heard == b""


def _tls(certificates: Certificates, more: str = "") -> str:
    return f"""tls {{ cert_file: "{certificates.cert_file}", key_file: "{certificates.key_file}"
        ca_file: "{certificates.ca_file}", {more} }}"""


async def test_a_server_that_goes_is_left(run_server: RunServer, connect_url: ConnectUrl) -> None:
    """In lame duck mode a server sends its clients away. They go on at another, after a gap."""
    servers = [
        await asyncio.to_thread(run_server, "lame_duck_grace_period: 1s\nlame_duck_duration: 30s")
        for _ in range(2)
    ]
    transport = await connect_url(f"{servers[0].url},{servers[1].address}")
    _, receiver = await subscribe_live(transport, 7)
    used = transport._link.connection._server
    goes = next(server for server in servers if server.address in used)
    os.kill(goes.pid, signal.SIGUSR2)
    await receiver.wait_for(lambda heard: bool(heard.gaps), 60)
    assert goes.address not in transport._link.connection._server
    await assert_hears(transport, receiver, 7)


async def test_one_large_batch_holds_up_nobody(
    run_server: RunServer, connect_url: ConnectUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each poke that fits below max_payload is published; one that can't be is set aside."""
    transport = await connect_url(run_server("max_payload: 1KB").url)
    assert transport.max_signal_bytes == 1024
    _, receiver = await subscribe_live(transport, Feed.ALL)
    crowd = [name for n in range(2000) if shard_of(name := f"{n:0245}") == 7][:8]
    everyone = {*crowd, "urn:user:other"}
    mailbox = MemoryMailbox()
    async with Processor(mailbox, Publisher(transport)) as processor:
        for name in everyone:
            await processor.send(NewMessage(name, "me", "1", b"1"))
        await receiver.wait_for(lambda heard: _poked(heard.payloads) == everyone)
        await wait_until(partial(_is_empty, mailbox))

        monkeypatch.setattr(NatsTransport, "max_signal_bytes", 200)
        with capture_logs() as logs:
            await processor.send(NewMessage(crowd[0], "me", "2", b"1"))
            await processor.send(NewMessage("urn:user:another", "me", "2", b"1"))
            await receiver.wait_for(lambda heard: "urn:user:another" in _poked(heard.payloads))
            await wait_until(partial(_is_empty, mailbox))
        (line,) = logs
        assert (line["event"], line["recipients"]) == ("pokes_unpublishable", [crowd[0]])
        assert processor.stats.pokes_unpublishable == 1


async def test_what_the_server_refuses_for_its_size_is_halved(
    run_server: RunServer, connect_url: ConnectUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit that was not known beforehand is met by halves."""
    transport = await connect_url(run_server("max_payload: 1KB").url)
    _, receiver = await subscribe_live(transport, Feed.ALL)
    monkeypatch.setattr(NatsTransport, "max_signal_bytes", 1_000_000)
    recipients = {f"{n:0200}" for n in range(50)}
    await Publisher(transport, shard_count=2).publish_now([Poke(each) for each in recipients])
    await receiver.wait_for(lambda heard: _poked(heard.payloads) == recipients)


async def test_a_subscription_too_many_is_refused_alone(
    run_server: RunServer, connect_url: ConnectUrl
) -> None:
    """An account's or server's limit of subscriptions: those that fit deliver, without a gap."""
    transport = await connect_url(run_server("max_subscriptions: 2").url)
    _, receiver = await subscribe_live(transport, 1)
    second, _ = await subscribe_live(transport, 2)
    with pytest.raises(TransportError, match="maximum subscriptions"):
        await transport.subscribe(3, RecordingReceiver())
    await assert_hears(transport, receiver, 1)
    await second.close()
    await subscribe_live(transport, 3)
    assert receiver.gaps == []


async def test_a_limit_that_is_lowered_is_learnt(
    run_server: RunServer, connect_url: ConnectUrl
) -> None:
    """The server ends the connection for a signal above it, which is a gap. The next one knows."""
    server = run_server("max_payload: 1MB")
    transport = await connect_url(server.url)
    _, receiver = await subscribe_live(transport, Feed.ALL)
    path = server._directory / "nats.conf"
    await asyncio.to_thread(path.write_text, "max_payload: 1KB")
    os.kill(server.pid, signal.SIGHUP)
    await wait_until(lambda: "Reloaded: max_payload" in server.log())
    names = {f"{n:0200}" for n in range(50)}
    mailbox = MemoryMailbox()
    publisher = Publisher(transport, shard_count=2)
    async with Processor(mailbox, publisher, sweep_after_s=0.1) as processor:
        await asyncio.gather(*(processor.send(NewMessage(n, "me", "1", b"1")) for n in names))
        await receiver.wait_for(lambda heard: _poked(heard.payloads) == names)
        await wait_until(partial(_is_empty, mailbox))
    assert receiver.gaps
    assert transport.max_signal_bytes == 1024


def _poked(bodies: Sequence[bytes]) -> set[str]:
    pokes = [decode_signal(body) for body in bodies if not is_probe(body)]
    return {poke.recipient for some in pokes if isinstance(some, list) for poke in some}


async def _is_empty(mailbox: MemoryMailbox) -> bool:
    return (await mailbox.stats()).outbox == 0
