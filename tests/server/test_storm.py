"""A storm of clients: handshakes and pulls keep their pace, and a lost key server hurts nobody."""

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from heapq import heapify, heappop, heappush
from http import HTTPStatus
from pathlib import Path

import httpx
import jwt
import pytest
import uvloop
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm

from pokebridge.gateway.admission import MOST_RETRY_AFTER_S, HandshakePace
from pokebridge.tokens import TokenVerifier
from tests.gateway.harness import TIMEOUT_S, Client, running
from tests.gateway.harness import token as valid_token
from tests.support import Daemon, free_port, wait_until
from tests.support.stream_server import stream_server

KEY = ec.generate_private_key(ec.SECP256R1())
KEY_SET = {"keys": [ECAlgorithm.to_jwk(KEY.public_key(), as_dict=True) | {"kid": "e"}]}
AUDIENCE = "pokes"
# An instance for which a key set is old after a moment, so that it fetches another.
IMPATIENT = """
from pokebridge import cli, key_set
key_set.KEYS_FRESH_S = key_set.KEYS_RETRY_S = 0.1
cli.main()
"""


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that an instance runs on."""
    return {"uvloop": uvloop.new_event_loop}


def token(number: int) -> str:
    """A valid token of the issuer's, of a recipient of its own."""
    claims = {"sub": f"urn:user:{number}", "exp": 2**40, "aud": AUDIENCE}
    return jwt.encode(claims, KEY, "ES256", {"kid": "e"})


def bearer(number: int) -> str:
    """The same as the header ``Authorization`` has it."""
    return f"Bearer {token(number)}"


# --- the pace of handshakes -----------------------------------------------------------------------


@given(
    rate_per_s=st.integers(1, 700),
    pauses_s=st.lists(st.sampled_from([0.0, 0.0005, 0.003, 0.04, 0.3]), max_size=900),
)
def test_no_second_has_more_handshakes_than_the_rate(
    rate_per_s: int, pauses_s: list[float]
) -> None:
    """However they come, and wherever the second begins."""
    pace, now, passed = HandshakePace(rate_per_s), 1000.0, list[float]()
    for pause_s in pauses_s:
        now += pause_s
        if pace.take(now):
            passed.append(now)
    for first, after in zip(passed, passed[rate_per_s:], strict=False):
        assert after - first >= 1 - 1e-6


def test_the_rate_is_made_use_of() -> None:
    """Under a steady siege as many pass as may."""
    pace = HandshakePace(500)
    assert sum(pace.take(1000 + n / 5000) for n in range(5000)) == 500


def test_who_is_refused_comes_back_when_it_is_served() -> None:
    """The line grows by those refused, shrinks with time, and is never longer than a minute."""
    pace = HandshakePace(100)
    assert [pace.queue(0.0) for _ in range(250)] == [1] * 100 + [2] * 100 + [3] * 50
    assert pace.queue(2.0) == 1
    assert max(pace.queue(2.0) for _ in range(50_000)) == MOST_RETRY_AFTER_S


def test_a_storm_is_over_soon_and_few_are_refused_twice() -> None:
    """7,500 clients that heed ``Retry-After`` and jitter: near the 15 s that it takes at least."""
    rng, pace = random.Random(1), HandshakePace(500)
    coming = [(rng.random(), client, 1) for client in range(7500)]
    heapify(coming)
    passed_at = refused = 0.0
    while coming:
        now, client, failures = heappop(coming)
        if pace.take(now):
            passed_at = now
        else:
            refused += 1
            jitter_s = rng.random() * min(30.0, 2.0**failures)
            heappush(coming, (now + pace.queue(now) + jitter_s, client, failures + 1))
    assert passed_at < 26
    assert refused / 7500 < 1.2


async def test_a_real_storm_is_spread_by_what_it_is_told() -> None:
    """Those refused at once are sent away for different times."""
    async with running(handshakes_per_s=5) as server:
        clients = [await server.dial() for _ in range(25)]
        bearer = f"Authorization: Bearer {valid_token()}"
        statuses = [await client.handshake(headers=(bearer,)) for client in clients]
        told = [client.headers["retry-after"] for client in clients if client.status == 503]
    assert statuses.count(503) >= 15
    assert {"1", "2", "3"} <= set(told)


async def test_ready_is_spread_over_those_who_had_to_wait_for_it() -> None:
    """Each pulls when it hears it: a whole storm that waited for the transport must not at once."""
    loop = asyncio.get_running_loop()
    async with running() as server:
        server.gateway.pulls_per_s = 50.0
        server.transport.deaf = True
        await wait_until(
            lambda: not server.gateway.subscriptions.covers("x"), what="deafness noticed"
        )
        clients = [await server.connect(f"urn:user:{n}") for n in range(20)]
        server.transport.deaf = False

        async def ready_at_s(client: Client) -> float:
            while (await client.message())["type"] != "ready":
                pass
            return loop.time()

        heard_s = sorted(await asyncio.gather(*map(ready_at_s, clients)))
    assert heard_s[-1] - heard_s[0] > 0.25  # in four batches, a tenth of a second apart


# --- the issuer's keys ----------------------------------------------------------------------------


class KeyEndpoint:
    """A JWKS URL that can be gone, or take its time."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/keys"
        self.asked = 0
        self.answers = asyncio.Event()
        self.answers.set()
        self._server = AsyncExitStack()

    async def start(self) -> None:
        """Listen."""
        await self._server.enter_async_context(stream_server(self._serve, port=self.port))

    async def stop(self) -> None:
        """Be gone: connections are refused."""
        self.answers.set()
        await self._server.aclose()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.asked += 1
        await self.answers.wait()
        body = json.dumps(KEY_SET).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)


@pytest.fixture
async def keys() -> AsyncIterator[KeyEndpoint]:
    """An endpoint that is down until it is started."""
    endpoint = KeyEndpoint()
    yield endpoint
    await endpoint.stop()


@pytest.fixture
async def impatient(keys: KeyEndpoint, tmp_path: Path) -> AsyncIterator[Daemon]:
    """A real instance that takes its issuer's keys for old after a moment; it just listens."""
    port = free_port()
    options = {
        "port": port,
        "jwks_url": keys.url,
        "jwt_audience": AUDIENCE,
        "mailbox": "memory://",
        "handshakes_per_s": 0,
        "max_sessions_per_address": 0,
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    daemon = Daemon(
        "impatient",
        [sys.executable, "-c", IMPATIENT, "serve", *flags],
        port=port,
        url=f"http://127.0.0.1:{port}",
        directory=tmp_path,
    )
    await asyncio.to_thread(daemon.start)
    yield daemon
    await asyncio.to_thread(daemon.kill)


@pytest.fixture
async def http(impatient: Daemon) -> AsyncIterator[httpx.AsyncClient]:
    """The instance's API."""
    async with httpx.AsyncClient(
        base_url=impatient.url, timeout=TIMEOUT_S, trust_env=False
    ) as client:
        yield client


async def is_ready(http: httpx.AsyncClient) -> bool:
    """Whether load balancers would send clients."""
    return (await http.get("/readyz")).is_success


async def connect(instance: Daemon, number: int) -> Client:
    """A client of a recipient of its own that has heard ``ready``."""
    client = await Client.dial(instance.port)
    assert await client.handshake(headers=(f"Authorization: {bearer(number)}",)) == 101
    assert (await client.message())["type"] == "ready"
    return client


async def test_nobody_is_refused_while_the_key_endpoint_is_down(
    keys: KeyEndpoint, impatient: Daemon, http: httpx.AsyncClient
) -> None:
    """A storm on keys that are long old: handshakes, new tokens and pulls are served, and ready."""
    await keys.start()
    await wait_until(lambda: is_ready(http))
    await keys.stop()

    async def has_old_keys() -> bool:
        pull = await http.get("/v1/messages", headers={"Authorization": bearer(0)})
        assert pull.status_code == HTTPStatus.OK
        return "jwks_fetch_failed" in impatient.log()

    await wait_until(has_old_keys)
    clients = await asyncio.gather(*(connect(impatient, number) for number in range(300)))
    for number, client in enumerate(clients):
        client.say({"type": "auth", "token": token(number)})
    for client in clients:
        assert (await client.message())["type"] == "auth"
        await client.close()
    assert await is_ready(http)


async def test_an_instance_that_never_had_the_keys_gets_them_when_they_are_back(
    keys: KeyEndpoint, impatient: Daemon, http: httpx.AsyncClient
) -> None:
    """Without keys it is not ready, so it gets no storm, and no refusal is final."""
    assert "tokens: the issuer's keys" in (await http.get("/readyz")).text
    client = await Client.dial(impatient.port)
    assert await client.handshake(headers=(f"Authorization: {bearer(1)}",)) == 503
    assert int(client.headers["retry-after"]) > 0
    await client.close()
    await keys.start()
    await wait_until(lambda: is_ready(http))
    await (await connect(impatient, 1)).close()


async def test_a_slow_key_endpoint_lets_no_burst_through(keys: KeyEndpoint) -> None:
    """All who waited for the keys are let in when they come, but no faster than others."""
    await keys.start()
    keys.answers.clear()
    verifier = TokenVerifier(jwks_url=keys.url, audience=AUDIENCE)
    async with running(verifier=verifier, handshakes_per_s=20) as server:
        tasks = server.gateway.entrance._tasks
        others = len(tasks)

        async def handshake() -> int:
            client = await server.dial()
            return await client.handshake(headers=(f"Authorization: {bearer(1)}",))

        began: list[asyncio.Task[int]] = []
        while len(tasks) - others < 25:
            before = len(tasks)
            began.append(asyncio.create_task(handshake()))
            await wait_until(lambda: began[-1].done() or len(tasks) > before)  # noqa: B023 - at once
        keys.answers.set()
        statuses = await asyncio.gather(*began)
        assert statuses.count(101) <= 10
    await verifier.close()
