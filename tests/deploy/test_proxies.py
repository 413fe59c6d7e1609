"""The recipes for nginx and HAProxy, in front of three real instances on a real engine."""

import asyncio
import itertools
import json
import os
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest
import websockets
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as WebSocket  # noqa: N812 - the class that it is
from websockets.exceptions import InvalidStatus
from websockets.http11 import Response
from websockets.typing import Subprotocol

from pokebridge.client import PokeClient, Policy, ReceivedMessage
from pokebridge.client.events import AnyAction, AnyEvent, Text
from pokebridge.sharding import shard_of
from tests.deploy.proxies import DEPLOY, IDLE_TIMEOUT, RELOAD_TIMEOUT, Proxy, run_proxy
from tests.support import Daemon, Instance, Serve, block_until, free_port, wait_until
from tests.support.serving import HTTP_TIMEOUT_S, JWT_SECRET, owners_in
from tests.transport.certificates import Certificates, make_certificates

BOB, CAROL = "urn:user:bob", "urn:user:carol"
NAMES = ("b1", "b2", "b3")
# A session is pinged again when its pong is due, so the longer time is the ping interval.
PING_INTERVAL_S = PONG_TIMEOUT_S = 1.5
SESSIONS_PER_ADDRESS = 10
TIMEOUT_S = 100.0


@dataclass(frozen=True)
class Site:
    """Three instances, and the port and certificate of the proxy that a test puts before them."""

    instances: Sequence[Instance]
    port: int
    certificates: Certificates
    directory: Path

    @property
    def addresses(self) -> list[str]:
        """The instances' ``HOST:PORT``."""
        return [instance.address for instance in self.instances]


@dataclass(frozen=True)
class Front:
    """A running proxy, as a client sees it."""

    proxy: Proxy
    site: Site

    @property
    def tls(self) -> ssl.SSLContext:
        """What trusts the site's certificate."""
        return ssl.create_default_context(cafile=self.site.certificates.ca_file)

    def token(self, recipient: str, scope: str = "") -> str:
        """A token that every instance takes."""
        return self.site.instances[0].token(recipient, scope)

    def connect(
        self, recipient: str, prefix: str = "", *, forwarded: str | None = None, **options: Any
    ) -> WebSocket:
        """A WebSocket of ``recipient`` through the proxy."""
        headers = {"Authorization": f"Bearer {self.token(recipient)}"}
        if forwarded is not None:
            headers["X-Forwarded-For"] = forwarded
        return self.open(f"{prefix}/v1/connect", additional_headers=headers, **options)

    def open(self, path: str, **options: Any) -> WebSocket:
        """A WebSocket to ``path``, with nothing that is not given."""
        url = f"wss://127.0.0.1:{self.proxy.port}{path}"
        return WebSocket(url, ssl=self.tls, compression=None, **options)

    async def landed(self, recipient: str, prefix: str = "") -> str:
        """The instance that a new session of ``recipient`` comes to."""
        async with self.connect(recipient, prefix) as session:
            return await ready(session)

    async def settle(self, owner_of: Mapping[int, str] | None = None) -> None:
        """Wait until the proxy leads to each instance; a check that met a busy one says no.

        In partitioned mode ``owner_of`` says who has which shard.
        """
        shards = {} if owner_of is None else owner_of

        async def leads_to(name: str) -> bool:
            names = (f"urn:user:settler-{number}" for number in itertools.count())
            own = next(each for each in names if shards.get(shard_of(each, 100), name) == name)
            return await self.landed(own, f"/i/{name}") == name

        for name in NAMES:
            await wait_until(partial(leads_to, name), TIMEOUT_S, f"the proxy leading to {name}")

    def http(self, sub: str, scope: str = "") -> httpx.AsyncClient:
        """An HTTP client that goes through the proxy."""
        return httpx.AsyncClient(
            base_url=self.proxy.url,
            headers={"Authorization": f"Bearer {self.token(sub, scope)}"},
            timeout=HTTP_TIMEOUT_S,
            trust_env=False,
            verify=self.tls,
        )

    def client(self, recipient: str, seen: "Seen") -> PokeClient:
        """The smart client, quick to come back."""
        return PokeClient(
            self.proxy.url,
            self.token(recipient),
            seen.pulled,
            on_event=seen.happened,
            policy=Policy(base_s=0.1, cap_s=0.5, poll_after_s=TIMEOUT_S),
            tls=self.tls,
        )


@dataclass
class Seen:
    """What a client has pulled, how often it was connected, and to which instance last."""

    bodies: list[Any] = field(default_factory=list)
    sessions: int = 0
    instance: str = ""

    def is_at(self, instance: str) -> bool:
        """Whether that was ``instance``."""
        return self.instance == instance

    async def pulled(self, messages: Sequence[ReceivedMessage]) -> None:
        """Note the messages."""
        self.bodies += [message.body for message in messages]

    def happened(self, event: AnyEvent | AnyAction) -> None:
        """Note who says ``ready``."""
        if isinstance(event, Text) and (frame := json.loads(event.text))["type"] == "ready":
            self.sessions += 1
            self.instance = frame["instance"]


async def ready(session: ClientConnection) -> str:
    """The name of the instance that says ``ready``."""
    frame = json.loads(await session.recv())
    assert frame["type"] == "ready"
    return str(frame["instance"])


async def refusal(attempt: WebSocket) -> Response:
    """The answer to a handshake that must be refused."""
    with pytest.raises(InvalidStatus) as refused:
        async with attempt:
            pass
    return refused.value.response


async def send(http: httpx.AsyncClient, recipient: str, body: Any) -> None:
    """Send a message; it must be accepted."""
    answer = await http.post("/v1/messages", json={"recipient": recipient, "body": body})
    assert answer.status_code == httpx.codes.ACCEPTED, answer.text


def settings(engine: Daemon, port: int, name: str) -> dict[str, Any]:
    """What the recipes ask of an instance, for a proxy on this machine."""
    return {
        "transport": engine.url,
        "mailbox": "sqlite:///shared.db",
        "cluster": f"proxies-{port}",
        "instance": name,
        "trusted_proxies": "127.0.0.1/32",
        "advertise_url": f"wss://127.0.0.1:{port}/i/{name}",
        "ping_interval_s": PING_INTERVAL_S,
        "pong_timeout_s": PONG_TIMEOUT_S,
        "max_sessions_per_address": SESSIONS_PER_ADDRESS,
    }


@contextmanager
def run_site(directory: Path, engine: Daemon, **more: object) -> Iterator[Site]:
    """Three instances with ``more`` settings, which a whole module may share."""
    port = free_port()

    def create(name: str) -> Instance:
        given = {**settings(engine, port, name), "jwt_secret": JWT_SECRET, **more}
        env = {f"POKEBRIDGE_{key.upper()}": str(value) for key, value in given.items()}
        return Instance(name, ["--dev"], os.environ | env, directory)

    instances = [create(name) for name in NAMES]
    try:
        with ThreadPoolExecutor() as threads:
            list(threads.map(Instance.start, instances))
        yield Site(instances, port, make_certificates(directory), directory)
    finally:
        for instance in instances:
            instance.kill()


@pytest.fixture(scope="module")
def site(nats_server: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Instances in fan-out mode, which tell their own address all the same."""
    with run_site(tmp_path_factory.mktemp("fanout"), nats_server) as running:
        yield running


@pytest.fixture(scope="module")
def partitioned_site(
    nats_server: Daemon, valkey_server: Daemon, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """Instances in partitioned mode; each shard has an owner."""
    shared = {"mode": "partitioned", "coordination": valkey_server.url, "lease_s": 1}
    with run_site(tmp_path_factory.mktemp("partitioned"), nats_server, **shared) as running:
        block_until(lambda: set(owners(running).values()) == set(NAMES), TIMEOUT_S, "owners")
        yield running


def owners(site: Site) -> dict[int, str]:
    """Which instance owns which shard."""
    with site.instances[0].http("urn:operator", "admin") as http:
        cluster = http.get("/v1/cluster").json()
    return owners_in(cluster)


class Start(Protocol):
    """Puts a proxy before a site; the test's end stops it."""

    def __call__(
        self,
        kind: str,
        site: Site,
        recipe: str,
        changes: Mapping[str, str] | None = None,
        *,
        servers: Sequence[str] | None = None,
        port: int | None = None,
    ) -> Front:
        """Run ``kind`` (nginx, haproxy) with ``recipe`` on the site's port, or on another."""


Run = Callable[..., Front]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start proxies: ``start("nginx", site, "fanout")``."""
    proxies: list[Proxy] = []

    def start_one(
        kind: str,
        site: Site,
        recipe: str,
        changes: Mapping[str, str] | None = None,
        *,
        servers: Sequence[str] | None = None,
        port: int | None = None,
    ) -> Front:
        more = dict(changes or {})
        if (kind, recipe) == ("haproxy", "partitioned"):
            (tmp_path / "owners.map").touch()
            more["/etc/haproxy/owners.map"] = str(tmp_path / "owners.map")
            more["/run/haproxy/admin.sock"] = str(tmp_path / "admin.sock")
        proxy = run_proxy(
            kind,
            recipe,
            servers or site.addresses,
            port=port or site.port,
            directory=tmp_path,
            certificates=site.certificates,
            changes=more,
        )
        proxies.append(proxy)
        return Front(proxy, site)

    yield start_one
    for proxy in proxies:
        proxy.kill()


@pytest.fixture(params=["nginx", "haproxy"])
def run(request: pytest.FixtureRequest, start: Start) -> Run:
    """The same for a test that is to hold for both: ``run(site, "fanout")``."""
    return partial(start, request.param)


only_haproxy = pytest.mark.parametrize("run", ["haproxy"], indirect=True)


@pytest.mark.parametrize("recipe", ["fanout", "partitioned"])
async def test_a_token_may_come_in_each_of_its_ways(run: Run, site: Site, recipe: str) -> None:
    """As a header, as a sub-protocol, in the query; a handshake without one is refused with 401."""
    front = run(site, recipe)
    token = front.token(BOB)
    headers = {"Authorization": f"Bearer {token}"}
    protocols = [Subprotocol("pokebridge.v1"), Subprotocol(f"bearer.{token}")]
    async with (
        asyncio.timeout(TIMEOUT_S),
        front.open("/v1/connect", additional_headers=headers) as by_header,
        front.open("/v1/connect", subprotocols=protocols) as by_protocol,
        front.open(f"/v1/connect?access_token={token}") as by_query,
    ):
        for session in (by_header, by_protocol, by_query):
            assert await ready(session) in NAMES
        assert by_protocol.subprotocol == "pokebridge.v1"
        assert (await refusal(front.open("/v1/connect"))).status_code == httpx.codes.UNAUTHORIZED


async def test_a_message_wakes_sessions_on_every_instance(run: Run, site: Site) -> None:
    """Sessions are spread over the instances; each hears the poke, and what it pulls is there."""
    front = run(site, "fanout")
    recipient, seen = f"urn:user:everywhere-{front.proxy.name}", Seen()
    async with (
        asyncio.timeout(TIMEOUT_S),
        AsyncExitStack() as stack,
        front.http(recipient, "send") as http,
        front.client(recipient, seen) as client,
    ):
        sessions: list[ClientConnection] = []
        landed: set[str] = set()
        while landed != set(NAMES):  # nginx chooses at random
            sessions.append(await stack.enter_async_context(front.connect(recipient)))
            landed.add(await ready(sessions[-1]))
        await client.wait_ready(TIMEOUT_S)
        await send(http, recipient, "hello")
        for session in sessions:
            assert json.loads(await session.recv())["type"] == "poke"
        await wait_until(lambda: seen.bodies == ["hello"], what="the message being pulled")


HIDDEN_PATHS = (
    *("/metrics", "/healthz", "/readyz", "/i/b1/metrics", "/s/1/metrics", "/i/b1/%6detrics"),
    *("/%6detrics", "/%6Detrics", "/metric%73", "/%68ealthz", "/READYZ", "/%4detrics", "/metrics/"),
    *(
        "//metrics",
        "/./metrics",
        "/x/../metrics",
        "/x/%2e%2e/metrics",
        "/%2fmetrics",
        "/metrics%2f",
    ),
    *("/v1/..%2fmetrics", "/v1/../metrics", "//x/metrics", "/%256detrics"),
)


async def status_of(port: int, path: str, trust: ssl.SSLContext | None = None) -> int:
    """The status of a GET of ``path``, which no library has made tidy."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trust)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    status = int((await reader.readuntil(b"\r\n")).split()[1])
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return status


@pytest.mark.parametrize("recipe", ["fanout", "partitioned"])
async def test_what_is_the_operators_is_not_the_worlds(run: Run, site: Site, recipe: str) -> None:
    """The proxy answers 404 for metrics and health, behind a prefix too, however they are written.

    An instance knows its paths in one form only, if something in front lets another one through.
    """
    front = run(site, recipe)
    for path in HIDDEN_PATHS:
        assert await status_of(front.proxy.port, path, front.tls) == httpx.codes.NOT_FOUND, path
        if path not in {"/metrics", "/healthz", "/readyz"}:
            assert await status_of(site.instances[0].port, path) == httpx.codes.NOT_FOUND, path


async def test_limits_count_the_clients_address(run: Run, site: Site) -> None:
    """The limit hits the address that has used it up, whatever it claims, and no other."""
    front = run(site, "partitioned")
    greedy, other = ("127.0.0.2", 0), ("127.0.0.3", 0)
    async with asyncio.timeout(TIMEOUT_S), AsyncExitStack() as stack:
        for number in range(SESSIONS_PER_ADDRESS):
            admitted = front.connect(f"urn:user:{number}", "/i/b1", local_addr=greedy)
            await stack.enter_async_context(admitted)
        claim = front.connect(BOB, "/i/b1", local_addr=greedy, forwarded="192.0.2.7")
        answer = await refusal(claim)
        assert answer.status_code == httpx.codes.TOO_MANY_REQUESTS
        assert answer.headers["Retry-After"]
        async with front.connect(BOB, "/i/b1", local_addr=other) as session:
            assert await ready(session) == "b1"


async def test_pings_keep_an_idle_socket_open(start: Start, site: Site) -> None:
    """With a limit above the ping interval a silent session lasts; below it the proxy ends it."""

    async def listen(kind: str, limit: str, for_s: float) -> None:
        front = start(kind, site, "fanout", {IDLE_TIMEOUT: limit}, port=free_port())
        async with asyncio.timeout(TIMEOUT_S), front.connect(BOB, ping_interval=None) as session:
            await ready(session)
            async with asyncio.timeout(for_s):
                while True:  # a poke is allowed: an instance that stalled has a gap
                    await session.recv()

    for kind in ("nginx", "haproxy"):
        with pytest.raises(websockets.ConnectionClosedError):
            await listen(kind, "200ms", TIMEOUT_S)
    lasting = [listen(kind, "5s", for_s=6.5) for kind in ("nginx", "haproxy")]
    ends = await asyncio.gather(*lasting, return_exceptions=True)
    assert [type(end) for end in ends] == [TimeoutError, TimeoutError]


async def test_a_reload_cuts_no_socket(run: Run, site: Site) -> None:
    """After a reload an old socket still gets pokes, until the old worker's time is up."""
    front = run(site, "fanout")
    async with (
        asyncio.timeout(TIMEOUT_S),
        front.connect(BOB, ping_interval=None) as session,
        front.http(BOB, "send") as http,
    ):
        await ready(session)
        before = front.proxy.workers
        front.proxy.reload()
        await wait_until(lambda: front.proxy.workers - before, what="new workers")
        await send(http, BOB, "after the reload")
        assert json.loads(await session.recv())["type"] == "poke"


async def test_the_end_of_an_old_worker_leaves_nobody_silent(run: Run, site: Site) -> None:
    """When its time is up it cuts its sockets. The clients reconnect to a new worker and pull."""
    front = run(site, "fanout", {RELOAD_TIMEOUT: "1s"})
    recipient, seen = f"urn:user:behind-{front.proxy.name}", Seen()
    async with (
        asyncio.timeout(TIMEOUT_S),
        front.client(recipient, seen) as client,
        front.http(recipient, "send") as http,
    ):
        await client.wait_ready(TIMEOUT_S)
        front.proxy.reload()
        await send(http, recipient, "after the reload")
        await wait_until(lambda: seen.sessions > 1, TIMEOUT_S, "the client coming back")
        await send(http, recipient, "through a new worker")
        expected = ["after the reload", "through a new worker"]
        await wait_until(lambda: seen.bodies == expected, TIMEOUT_S, "both being pulled")


async def test_clients_of_an_instance_that_goes_are_served_by_another(
    start: Start, serve: Serve, nats_server: Daemon, tmp_path: Path
) -> None:
    """While one drains no handshake fails; when one is killed its client is back through the proxy.

    Either time the clients pull what was sent meanwhile.
    """
    port = free_port()

    def create(name: str) -> Instance:
        return serve(**settings(nats_server, port, name), drain_s=0.5, grace_s=1)

    with ThreadPoolExecutor() as threads:
        by_name = dict(zip(NAMES, threads.map(create, NAMES), strict=True))
    site = Site(list(by_name.values()), port, make_certificates(tmp_path), tmp_path)
    nginx = start("nginx", site, "fanout")
    haproxy = start("haproxy", site, "fanout", port=free_port())
    bob, carol = Seen(), Seen()
    async with (
        asyncio.timeout(TIMEOUT_S),
        AsyncExitStack() as stack,
        nginx.client(BOB, bob) as through_nginx,
        haproxy.client(CAROL, carol) as through_haproxy,
    ):

        async def send_to_both(instance: Instance, body: int) -> None:
            async with instance.async_http(BOB, "send") as http:
                await send(http, BOB, body)
                await send(http, CAROL, body)
            expected = [*range(1, body + 1)]
            await wait_until(lambda: bob.bodies == carol.bodies == expected, what="both pulling")

        await through_nginx.wait_ready(TIMEOUT_S)
        await through_haproxy.wait_ready(TIMEOUT_S)
        for number in range(8):  # so that a drain takes its time
            front = (nginx, haproxy)[number % 2]
            await ready(await stack.enter_async_context(front.connect(f"urn:user:{number}")))
        draining = asyncio.create_task(asyncio.to_thread(by_name.pop(bob.instance).terminate))
        while not draining.done():
            assert await nginx.landed("urn:user:eve") in NAMES
            assert await haproxy.landed("urn:user:eve") in NAMES
        await send_to_both(next(iter(by_name.values())), 1)
        assert {bob.instance, carol.instance} <= set(by_name)

        await asyncio.to_thread(by_name.pop(carol.instance).kill)
        ((left, instance),) = by_name.items()
        await send_to_both(instance, 2)
        await through_nginx.wait_ready(TIMEOUT_S)
        await through_haproxy.wait_ready(TIMEOUT_S)
        assert bob.instance == carol.instance == left

        async def lands() -> bool:
            with suppress(InvalidStatus):
                return await nginx.landed(BOB) == await haproxy.landed(CAROL) == left
            return False

        # Two stopped at once. Until a health check, HAProxy's one retry may reach the other one.
        await wait_until(lands, TIMEOUT_S, "new handshakes landing where somebody is")


@only_haproxy
async def test_pulls_go_on_while_the_engine_is_down(
    run: Run, serve: Serve, own_nats_server: Daemon, tmp_path: Path
) -> None:
    """No instance is ready then, so HAProxy takes no session; pulls, and old sockets, live on."""
    port = free_port()
    instance = await asyncio.to_thread(serve, **settings(own_nats_server, port, "b1"))
    site = Site([instance] * 3, port, make_certificates(tmp_path), tmp_path)
    front = run(site, "fanout")
    async with asyncio.timeout(TIMEOUT_S), front.connect(BOB) as session, front.http(BOB) as http:
        await ready(session)
        await asyncio.to_thread(own_nats_server.kill)

        async def is_refused() -> bool:
            with suppress(InvalidStatus):
                # A session that is accepted but not ready does not answer a close frame.
                async with front.connect("urn:user:eve", close_timeout=0.1):
                    return False
            return True

        await wait_until(is_refused, TIMEOUT_S, "HAProxy knowing that no instance is ready")
        assert (await http.get("/v1/messages", params={"after": 0})).is_success
        await asyncio.to_thread(own_nats_server.start)
        assert json.loads(await session.recv())["type"] == "poke"


async def test_connect_infos_url_leads_to_that_instance(run: Run, site: Site) -> None:
    """The address that an instance gives as its own brings a session to it and to no other.

    Pulls go through with the prefix too, for a client that has it in its base URL.
    """
    front = run(site, "partitioned")
    async with asyncio.timeout(TIMEOUT_S), front.http(BOB) as through_proxy:
        await front.settle()
        for name, instance in zip(NAMES, site.instances, strict=True):
            async with instance.async_http(BOB) as http:
                url = (await http.get("/v1/connect-info")).json()["url"]
            assert url == f"wss://127.0.0.1:{front.proxy.port}/i/{name}/v1/connect"
            assert await front.landed(BOB, f"/i/{name}") == name
            pulled = await through_proxy.get(f"/i/{name}/v1/messages", params={"after": 0})
            assert pulled.is_success


async def test_the_address_of_an_instance_that_is_down_serves_all_the_same(
    run: Run, site: Site
) -> None:
    """Its clients come to another, which serves them by interest, and not to a 502."""
    servers = [*site.addresses[:2], f"127.0.0.1:{free_port()}"]
    front = run(site, "partitioned", servers=servers)
    async with asyncio.timeout(TIMEOUT_S):
        for _ in range(3):
            assert await front.landed(BOB, "/i/b3") in {"b1", "b2"}


def _recipients(shards: Sequence[int], count: int) -> dict[int, list[str]]:
    """``count`` recipients of each of ``shards``."""
    found: dict[int, list[str]] = {shard: [] for shard in shards}
    number = 0
    while any(len(each) < count for each in found.values()):
        name = f"urn:user:{number}"
        number += 1
        each = found.get(shard_of(name, 100))
        if each is not None and len(each) < count:
            each.append(name)
    return found


async def test_all_recipients_of_a_shard_come_to_one_instance(run: Run, site: Site) -> None:
    """And the shards spread over all instances.

    HAProxy finds the shard by itself, from the token; for nginx it is in the URL.
    """
    front = run(site, "partitioned")
    is_nginx = front.proxy.name == "nginx"
    homes: dict[int, set[str]] = {}
    async with asyncio.timeout(TIMEOUT_S):
        for shard, recipients in _recipients(range(0, 100, 8), 2).items():
            prefix = f"/s/{shard}" if is_nginx else ""
            homes[shard] = {await front.landed(recipient, prefix) for recipient in recipients}
    assert all(len(instances) == 1 for instances in homes.values())
    assert set.union(*homes.values()) == set(NAMES)


async def test_in_partitioned_mode_a_client_is_led_to_its_owner(
    run: Run, partitioned_site: Site
) -> None:
    """It connects anywhere, follows `move` through the proxy, and ends where connect-info says."""
    front = run(partitioned_site, "partitioned")
    owner_of = owners(partitioned_site)
    seen = {f"urn:user:{number}": Seen() for number in range(6)}
    async with (
        asyncio.timeout(TIMEOUT_S),
        AsyncExitStack() as stack,
        front.http(BOB, "send") as http,
    ):
        await front.settle(owner_of)
        for recipient, its in seen.items():
            await stack.enter_async_context(front.client(recipient, its))
            home = owner_of[shard_of(recipient, 100)]
            async with front.http(recipient) as own:
                info = (await own.get("/v1/connect-info")).json()
            assert info["url"] == f"wss://127.0.0.1:{front.proxy.port}/i/{home}/v1/connect"
            await wait_until(partial(its.is_at, home), what=f"{recipient} coming to {home}")
            await send(http, recipient, "hello")
        await wait_until(lambda: all(its.bodies == ["hello"] for its in seen.values()))
        assert len({its.instance for its in seen.values()}) > 1


@only_haproxy
async def test_haproxy_finds_the_owner_by_itself(
    run: Run, partitioned_site: Site, tmp_path: Path
) -> None:
    """With the owners in its map nobody is moved, whichever way the token comes.

    The recipe's script fills the map at run time.
    """
    front = run(partitioned_site, "partitioned")
    script = [sys.executable, str(DEPLOY / "haproxy/owners.py"), partitioned_site.instances[0].url]
    paths = [str(tmp_path / "admin.sock"), str(tmp_path / "owners.map")]
    token = front.token("urn:operator", "admin")
    env = {**os.environ, "POKEBRIDGE_TOKEN": token}
    await asyncio.to_thread(subprocess.run, [*script, *paths], env=env, check=True)
    homes = set()
    async with asyncio.timeout(TIMEOUT_S):
        await front.settle(owners(partitioned_site))
        for number in range(6):
            token = front.token(recipient := f"urn:user:{number}")
            protocols = [Subprotocol("pokebridge.v1"), Subprotocol(f"bearer.{token}")]
            home = owners(partitioned_site)[shard_of(recipient, 100)]
            assert await front.landed(recipient) == home
            async with front.open("/v1/connect", subprotocols=protocols) as session:
                assert await ready(session) == home
            async with front.open(f"/v1/connect?access_token={token}") as session:
                assert await ready(session) == home
            homes.add(home)
    assert len(homes) > 1
