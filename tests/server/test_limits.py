"""Every limit covers every way in: connections in all and by address, in all their states."""

import asyncio
import json
import sys
from collections import Counter
from ipaddress import ip_network
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from pokebridge.errors import KeysUnavailableError
from pokebridge.gateway import connection, entrance
from pokebridge.gateway.admission import FAILED_HANDSHAKES_PER_ADDRESS
from pokebridge.settings import Settings
from pokebridge.tokens import Claims, TokenVerifier
from tests.gateway.harness import SECRET, TIMEOUT_S, Client, Running, running, token
from tests.support import Daemon, free_port, wait_until
from tests.support.serving import JWT_SECRET

GET = "GET / HTTP/1.1\r\nHost: x\r\n"


class SlowVerifier(TokenVerifier):
    """It has to fetch a key first, which takes until ``answers`` is set."""

    def __init__(self) -> None:
        super().__init__(secret=SECRET)
        self.asked = asyncio.Event()
        self.answers = asyncio.Event()

    def verify_now(self, token: str, *, remember: bool = True) -> Claims:
        """Not before it may."""
        if not self.answers.is_set():
            raise KeysUnavailableError("not yet")
        return super().verify_now(token, remember=remember)

    async def verify(self, token: str, *, remember: bool = True) -> Claims:
        """When it may."""
        self.asked.set()
        await self.answers.wait()
        return super().verify_now(token, remember=remember)


def bearer(subject: str = "urn:user:bob") -> str:
    """The header with a valid token."""
    return f"Authorization: Bearer {token(subject)}"


async def waiting(server: Running, said: str = "") -> Client:
    """A connection that has said this much, and waits."""
    before = server.gateway.sockets.entered
    client = await server.dial()
    await wait_until(lambda: server.gateway.sockets.entered > before)
    client.send_raw(said.encode())
    return client


async def refusal(server: Running) -> int:
    """The status with which a new connection is refused before it has said anything."""
    return await (await server.dial()).request("")


async def test_connections_that_wait_give_way_to_sessions_and_requests() -> None:
    """The longest waiting goes first, whether it was silent or is in the middle of a head."""
    async with running(max_sockets=3) as server:
        silent, begun, asked = [await waiting(server, said) for said in ("", GET, GET)]
        assert await asked.request("\r\n") == 404
        sessions = []
        for number, oldest in enumerate((silent, begun, asked)):
            sessions.append(await server.open(f"urn:user:{number}"))
            assert await oldest.gone()
        assert await refusal(server) == 503
        for number, session in enumerate(sessions):
            await server.poke(f"urn:user:{number}", 9)
            assert await session.message() == {"type": "poke", "version": 9}
        await sessions[0].close()
        await wait_until(lambda: len(server.gateway.sessions) == 2)
        assert await (await server.dial()).request(f"{GET}\r\n") == 404


async def test_handshakes_that_wait_for_a_key_count() -> None:
    """They are not closed for others, and count against the sessions of their address."""
    verifier = SlowVerifier()
    async with running(verifier=verifier, max_sockets=2, max_sessions_per_address=1) as server:
        pending = await server.dial()
        handshake = asyncio.create_task(pending.handshake(headers=(bearer(),)))
        await verifier.asked.wait()
        other = await server.dial()
        assert await other.handshake(headers=(bearer(),)) == 429
        assert await other.gone()
        another = asyncio.create_task((await waiting(server)).gone())
        await waiting(server)  # one waits, and is closed for this one
        await another
        verifier.answers.set()
        assert await handshake == 101
        assert server.gateway.entrance.sessions == 1


@pytest.mark.parametrize("proxied", [False, True])
async def test_an_address_has_a_share_of_the_connections(*, proxied: bool) -> None:
    """At the limit its own longest waiting connection is closed, also behind a proxy."""
    trusted = [ip_network("127.0.0.0/8")] if proxied else []
    async with running(max_connections_per_address=2, trusted_proxies=trusted) as server:
        other = await waiting(server)
        if proxied:  # all connections come from the proxy; only the requests name the clients
            assert await other.request(f"{GET}X-Forwarded-For: 198.51.100.1\r\n\r\n") == 404
        else:
            await other.close()
        request = f"{GET}X-Forwarded-For: 2001:db8::1\r\n\r\n"
        mine = []
        for port in range(4):
            mine.append(await waiting(server))
            assert await mine[-1].request(request.replace("::1", f"::{port}")) == 404
        assert await mine[0].gone()
        assert await mine[1].gone()
        for client in [*mine[2:], *([other] if proxied else [])]:
            assert await client.request(f"{GET}\r\n") == 404


async def test_an_address_has_no_thousands_of_idle_connections() -> None:
    """Each sends a request and then a line end. By default a thousand stay, which is said once."""
    at_most = Settings(jwt_secret=SecretStr(SECRET)).max_connections_per_address
    assert at_most == 1000
    with capture_logs() as logs:
        async with running(max_connections_per_address=at_most) as server:
            clients = []
            for _ in range(2000):
                clients.append(await server.dial())
                assert await clients[-1].request(f"{GET}\r\n") == 404
                clients[-1].send_raw(b"\r\n")
            assert len(server.gateway.sockets) == 1000
            assert server.gateway.sockets.limited == 1000
            assert await clients[999].gone()
            assert await clients[1000].request(f"{GET}\r\n") == 404
    assert [line["event"] for line in logs].count("connections_limited") == 1


async def test_strangers_do_not_use_up_the_pace_of_handshakes() -> None:
    """A flood without a valid token is told 401, then 429, and valid handshakes pass."""
    async with running(handshakes_per_s=500, max_sessions_per_address=1000) as server:
        told = Counter[int]()
        for number in range(2300):
            headers = (f"Authorization: Bearer {token()}x",) if number % 2 else ()
            client = await server.dial()
            told[await client.handshake(headers=headers)] += 1
            await client.close()
            if number % 50 == 0 and number >= 300:
                await server.open(f"urn:user:{number}")
        assert told[401] >= FAILED_HANDSHAKES_PER_ADDRESS
        assert told[429] == 2300 - told[401] > 0
        assert server.gateway.entrance.sessions == 40


async def test_an_unforeseen_error_harms_nobody_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error in frames, handshakes, HTTP or signals is one log line, and service continues."""

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("made up")

    async with running() as server:
        bystander, frames = await server.open("urn:user:eve"), await server.open()
        with monkeypatch.context() as patch:
            patch.setattr(connection, "decode_client_message", fail)
            frames.say({"type": "ping"})
            assert await frames.closed() == 1011
            patch.setattr(entrance, "read_handshake", fail)
            client = await server.dial()
            assert await client.handshake(headers=(bearer(),)) == 500
            assert (await client.problem())["status"] == 500
            patch.setattr("pokebridge.server.http.HttpProtocol._check_target", fail)
            assert await (await server.dial()).request(f"{GET}\r\n") == 400
            patch.setattr(server.gateway.bridge, "handle_poke", fail)
            for _ in range(5):
                await server.poke("urn:user:eve")
        await server.poke("urn:user:eve", 7)
        assert await bystander.message() == {"type": "poke", "version": 7}
    said = capsys.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if "unforeseen_input" in line]
    assert [line.split("border=")[1].split()[0] for line in lines] == [
        "frames",
        "handshakes",
        "http",
        "signals",
    ]
    assert "Traceback" not in said.out + said.err


@pytest.mark.parametrize(
    ("soft", "descriptors", "idle"),
    [(200, 256, 456), (512, 512, 712), (1024, 1024, 1224), (1500, 1500, 1050), (256, 4000, 300)],
)
async def test_few_descriptors_are_shared_out(
    tmp_path: Path, soft: int, descriptors: int, idle: int
) -> None:
    """More idle connections than fit harm nothing: pulls and sessions get in, and it is said once.

    The soft limit is raised, and what fits is said at the start, with more sessions than that too.
    """
    port = free_port()
    limits = f"ulimit -Sn {soft}; ulimit -Hn {descriptors}"
    command = f"{limits}; exec {sys.executable} -m pokebridge serve"
    flags = f"--port {port} --mailbox memory:// --max-sessions 2000"
    instance = Daemon(
        "instance",
        ["sh", "-c", f"{command} {flags}"],
        port=port,
        url=f"http://127.0.0.1:{port}",
        directory=tmp_path,
        env={"POKEBRIDGE_JWT_SECRET": JWT_SECRET, "PATH": "/usr/bin:/bin"},
    )
    await asyncio.to_thread(instance.start)
    clients: list[Client] = []
    try:
        for _ in range(idle):
            clients.append(await Client.dial(port))
            clients[-1].send_raw(b"\r\n")
        async with httpx.AsyncClient(base_url=instance.url, trust_env=False) as http:
            assert (await http.get("/healthz")).is_success
        given = f"Authorization: Bearer {token(secret=JWT_SECRET)}"
        for _ in range(30):
            clients.append(await Client.dial(port))
            assert await clients[-1].handshake(headers=(given,)) == 101
        events = [json.loads(line) for line in instance.log().splitlines()]
        (shared,) = [each for each in events if each["message"] == "descriptors_shared"]
        assert shared["descriptors"] == descriptors
        assert descriptors / 3 < shared["sessions"] < shared["sockets"] < descriptors
        lowered = [each for each in events if each["message"] == "max_sessions_lowered"]
        fits = shared["sessions"] == 2000
        assert [each["sessions"] for each in lowered] == [] if fits else [shared["sessions"]]
        limited = [each["message"] for each in events].count("connections_limited")
        assert limited == (idle > min(shared["sockets"], 1000))  # the share of an address
    finally:
        for client in clients:
            await client.close()
        await asyncio.to_thread(instance.kill)


async def test_exhausted_descriptors_are_told_and_relieved() -> None:
    """Whatever has used them up: connections that wait are closed, until there are some again."""
    async with running() as server:
        clients = [await waiting(server) for _ in range(3)]
        server.gateway.sockets.relieve(2)
        async with asyncio.timeout(TIMEOUT_S):
            assert await clients[0].reader.read() == await clients[1].reader.read() == b""
        assert await clients[2].request(f"{GET}\r\n") == 404
