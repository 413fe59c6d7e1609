"""What is sent to each border, and what must not come of it.

Each function sends so many inputs, and raises when an answer is none that the contract allows.
"""

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import h11
import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm
from websockets.frames import Frame, Opcode

from pokebridge import border, key_set
from pokebridge.errors import AuthError, ConfigError
from pokebridge.model import Poke
from pokebridge.settings import load_settings
from pokebridge.tokens import TokenVerifier, sign_token
from pokebridge.wire import (
    Beacon,
    ListedSession,
    Lookup,
    encode_beacon,
    encode_disconnect,
    encode_lookup,
    encode_pokes,
    encode_probe,
)
from tests.fuzz.mutation import Mutator
from tests.gateway.harness import Client
from tests.support import Instance
from tests.support.stream_server import stream_server

AT_ONCE = 32
TIMEOUT_S = 60.0
BOB = "urn:user:bob"
SECRET = "0123456789abcdef" * 2
_HANDSHAKE = (
    "GET /v1/connect{query} HTTP/1.1\r\nHost: b.example\r\nUpgrade: websocket\r\n"
    "Connection: keep-alive, Upgrade\r\nSec-WebSocket-Version: 13\r\nOrigin: https://b.example\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{fields}\r\n"
)


async def http(instance: Instance, seed: int, count: int) -> None:
    """Requests: every answer is one that a strict client understands."""
    bearer = f"Authorization: Bearer {instance.token(BOB, 'send poke admin')}\r\n"
    calls = [
        ("GET", "/healthz", ""),
        ("GET", "/v1/messages?after=0&limit=5&device=d", ""),
        ("POST", "/v1/messages", json.dumps({"recipient": BOB, "body": {"a": [1]}, "ttl_s": 5})),
        ("POST", "/v1/pokes", json.dumps({"recipients": [BOB, "urn:user:eve"]})),
        ("POST", "/v1/messages/ack", '{"version":1}'),
        ("DELETE", "/v1/sessions/urn%3Auser%3Aeve?revoke=false", ""),
        ("GET", "/console", ""),
        ("OPTIONS", "/v1/messages", ""),
        ("GET", "http://b.example/v1/connect-info", ""),
    ]
    corpus = []
    for method, target, body in calls:
        head = f"{method} {target} HTTP/1.1\r\nHost: b.example\r\n{bearer}"
        chunked = f"{len(body):x};x=y\r\n{body}\r\n0\r\nX-T: t\r\n\r\n" if body else "0\r\n\r\n"
        corpus += [
            f"{head}Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n{body}".encode(),
            f"{head}Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n{chunked}".encode(),
            f"{head}Upgrade: h2c\r\nConnection: Upgrade\r\n\r\n{head}\r\n".encode(),
        ]
    await _send_all(instance, Mutator(seed, corpus), count)


async def waiting(instance: Instance, seed: int, count: int) -> None:
    """Calls that wait and look-ups, alone and in a pipeline."""
    bearer = f"Authorization: Bearer {instance.token(BOB, 'admin')}\r\n"
    corpus = []
    for target in (
        "/v1/messages?after=0&limit=5&wait_s=0.01",
        "/v1/pokes?wait_s=0.01&device=d&moved=1",
        "/v1/pokes?wait_s=0.01&session=0123456789abcdef",
        "/v1/sessions/urn%3Auser%3Aeve",
    ):
        call = f"GET {target} HTTP/1.1\r\nHost: b.example\r\n{bearer}If-None-Match: *\r\n"
        chunked = f"{call}Transfer-Encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n"
        corpus += [f"{call}\r\n{call}\r\n".encode(), f"{chunked}{call}\r\n".encode()]
    await _send_all(instance, Mutator(seed, corpus), count)


async def handshakes(instance: Instance, seed: int, count: int) -> None:
    """Upgrade requests, with the token in each place where it may be."""
    token = instance.token(BOB)
    corpus = [
        _HANDSHAKE.format(query=query, fields=fields).encode()
        for query, fields in (
            ("?device=d&moved=1", f"Authorization: Bearer {token}\r\n"),
            ("", f"Sec-WebSocket-Protocol: pokebridge.v1, bearer.{token}\r\n"),
            (f"?access_token={token}", "X-Forwarded-For: 203.0.113.7, [2001:db8::1]:443\r\n"),
            ("", ""),
        )
    ]
    await _send_all(instance, Mutator(seed, corpus), count)


async def _send_all(instance: Instance, mutator: Mutator, count: int) -> None:
    """Send each input on a connection of its own, as the last thing said on it."""

    async def send_one() -> None:
        data = mutator()
        reader, writer = await asyncio.open_connection("127.0.0.1", instance.port)
        try:
            with suppress(ConnectionError):
                writer.write(data)
                writer.write_eof()
                async with asyncio.timeout(TIMEOUT_S):
                    _check_answers(await reader.read(-1))
        finally:
            writer.transport.abort()
            with suppress(ConnectionError):
                await writer.wait_closed()

    await _many(send_one, count)


def _check_answers(said: bytes) -> None:
    """Check that ``said`` begins with a complete answer, if with anything."""
    if not said or said.startswith(b"HTTP/1.1 101 "):
        return
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    parser.send(h11.EndOfMessage())
    parser.receive_data(said)
    event = parser.next_event()
    while isinstance(event, h11.InformationalResponse):
        event = parser.next_event()
        if event is h11.NEED_DATA:  # 100 Continue, and the body never came
            return
    assert isinstance(event, h11.Response), said[:200]
    assert event.status_code in {*range(200, 206), 304, *range(400, 418), 422, 426, 429, 431} | {
        *range(501, 508)
    }, said[:400]


async def frames(instance: Instance, seed: int, count: int) -> None:
    """Frames: a session goes on, or is closed with a code that the contract has."""
    texts = [
        b'{"type":"ping"}',
        json.dumps({"type": "auth", "token": instance.token(BOB)}).encode(),
        b'{"type":"ack","version":7}',
        json.dumps({"type": "listen", "token": instance.token("urn:group:x")}).encode(),
        b'{"type":"unlisten","recipient":"urn:group:x"}',
    ]
    corpus = [Frame(Opcode.TEXT, text).serialize(mask=True) for text in texts]
    corpus += [
        Frame(Opcode.PING, b"x").serialize(mask=True),
        Frame(Opcode.PONG, b"").serialize(mask=True),
        Frame(Opcode.CLOSE, b"\x03\xe8bye").serialize(mask=True),
        Frame(Opcode.TEXT, texts[0][:5], fin=False).serialize(mask=True)
        + Frame(Opcode.CONT, texts[0][5:]).serialize(mask=True),
    ]
    # Unmasked, so that a changed payload changes what the server reads.
    corpus += [b"\x81" + bytes([0x80 | len(text)]) + bytes(4) + text for text in texts[::2]]
    mutator = Mutator(seed, corpus)
    bearer = f"Authorization: Bearer {instance.token('urn:user:eve')}"

    async def send_one() -> None:
        client = await Client.dial(instance.port)
        try:
            assert await client.handshake(headers=(bearer,), timeout_s=TIMEOUT_S) == 101
            client.send_raw(mutator())
            client.writer.write_eof()
            async with asyncio.timeout(TIMEOUT_S):
                while True:
                    opcode, payload = await client.frame(TIMEOUT_S)
                    if opcode == Opcode.CLOSE:
                        code = int.from_bytes(payload[:2], "big")
                        assert code != 1011, payload
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            await client.close()

    await _many(send_one, count)


SIGNALS = (
    encode_pokes([Poke(BOB, 7)]),
    encode_pokes([Poke(BOB), Poke("urn:user:eve", 2**53 - 1)]),
    encode_disconnect("urn:user:eve", at_ms=1, until_ms=2, is_repeated=True),
    encode_probe("a:1"),
    encode_lookup(Lookup("1f", "other", "urn:user:eve")),
    encode_lookup(Lookup("1f", "other", BOB, [ListedSession("phone", "::1", 5, 17)])),
    encode_beacon(
        Beacon(
            sender="other",
            incarnation="x",
            number=1,
            up_s=1.0,
            every_s=2.0,
            cluster="default",
            shard_count=100,
            carrier="filter",
            assignment="coordinator",
            group_prefixes="urn:room:",
            last=True,
        )
    ),
)

PublishRaw = Callable[[str, bytes], Awaitable[None]]
"""Publishes a body on a subject, as it is."""


async def signals(publish: PublishRaw, seed: int, count: int) -> None:
    """Signals by hand, on the subject of a shard, of none, and on one that is neither."""
    mutator = Mutator(seed, SIGNALS)
    for _ in range(count):
        tag = mutator.rng.choice(("", ".42", ".69", ".x", ".999999999999"))
        await publish(f"push-notifications{tag}", mutator())


async def ingress(publish: PublishRaw, seed: int, count: int) -> None:
    """Messages of a queue: each is committed, or becomes a dead letter."""
    message = {"sender": "urn:service:x", "recipient": BOB, "body": {"a": [1]}}
    corpus = [
        json.dumps(message | more).encode()
        for more in ({}, {"id": "order-1", "ttl_s": 0.5}, {"ephemeral": True, "body": "\u00e9"})
    ]
    mutator = Mutator(seed, corpus)
    for _ in range(count):
        await publish("orders", mutator())


async def verify_tokens(seed: int, count: int) -> None:
    """Tokens: parts that are signed, and whole ones that are not. Nothing but AuthError."""
    verifier = TokenVerifier(secret=SECRET)
    whole = [sign_token(SECRET, BOB, ["send"]).encode()]
    parts = [
        json.dumps(
            {"sub": BOB, "exp": 2**33, "nbf": 1, "iat": 1, "scope": ["a"], "aud": []}
        ).encode(),
        json.dumps(
            {"alg": "HS256", "typ": "JWT", "kid": "k", "crit": ["b64"], "b64": False}
        ).encode(),
    ]
    mutate, mutate_part = Mutator(seed, whole), Mutator(seed, parts)
    key = jwt.get_algorithm_by_name("HS256").prepare_key(SECRET.encode())
    for number in range(count):
        token = mutate().decode("latin-1")
        if number % 2:
            head = parts[1] if number % 4 == 1 else mutate_part()
            signed = b".".join(map(_base64, (head, mutate_part())))
            signature = jwt.get_algorithm_by_name("HS256").sign(signed, key)
            token = b".".join((signed, _base64(signature))).decode()
        with suppress(AuthError):
            verifier.verify_now(token)
        if not number % 1000:
            await asyncio.sleep(0)


def _base64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


async def key_sets(seed: int, count: int) -> None:
    """Answers of a key endpoint, bytes on a socket: there are keys, or there are none."""
    key = ec.generate_private_key(ec.SECP256R1())
    keys = [ECAlgorithm.to_jwk(key.public_key(), as_dict=True) | {"kid": name} for name in "ab"]
    keys.append({"kty": "RSA", "n": "u" * 342 + "w", "e": "AQAB", "alg": "RS256"})
    keys.append(
        {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}
    )
    body = json.dumps({"keys": keys}).encode()
    fields = b"Connection: close\r\nContent-Encoding: identity\r\n"
    mutator = Mutator(
        seed,
        [
            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%s\r\n%s" % (len(body), fields, body),
            b"HTTP/1.1 200 OK\r\n%s\r\n%s" % (fields, body),
            b"HTTP/1.1 200 OK\r\n%s\r\n%s" % (fields, json.dumps({"keys": keys[2:]}).encode()),
        ],
    )

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(mutator())

    now = [0.0]
    async with stream_server(answer) as port:
        url = f"http://127.0.0.1:{port}/keys"
        verifier = TokenVerifier(jwks_url=url, audience="a", clock=lambda: now[0])
        assert verifier._key_set is not None
        for _ in range(count):
            now[0] += key_set.KEYS_RETRY_S
            await verifier._key_set.fetched()
        assert not border.unforeseen["key_sets"]
        await verifier.close()


def read_settings(directory: Path, seed: int, count: int) -> None:
    """Settings from the environment and from a file: settings, or one line that hides the value."""
    values: Mapping[str, Any] = {
        "jwt_secret": SECRET,
        "allowed_origins": "https://*.example.com, http://a.example:8080",
        "advertise_url": "wss://b1.example.com:8443/v1/connect",
        "trusted_proxies": "10.0.0.0/8, ::1/128",
        "transport": "nats://user:pa%23ss@h:4222?ca_file=/x",
        "mailbox": "postgresql://u:p@h1:5432,h2/db?sslmode=require",
        "jwks_url": "https://issuer.example/keys?a=b",
        "max_sessions": "100",
        "lease_s": "5.0",
        "roles": "gateway,api",
        "host": "::",
        "push_webhook_url": "https://h/x",
    }
    mutators = {name: Mutator(seed, [str(value).encode()]) for name, value in values.items()}
    rng = Mutator(seed, [b"x"]).rng
    file = directory / "settings.toml"
    in_file = Mutator(seed, ["\n".join(f'{k} = "{v}"' for k, v in values.items()).encode()])
    for number in range(count):
        environ = {"POKEBRIDGE_JWT_SECRET": SECRET}
        for name in rng.sample(sorted(values), 2):
            environ[f"POKEBRIDGE_{name.upper()}"] = mutators[name]().decode("utf-8", "replace")
        config = None
        if not number % 20:
            config = file
            file.write_bytes(in_file())
        said = ""
        try:
            load_settings(config, {}, environ)
        except ConfigError as error:
            said = str(error)
        assert "\n" not in said
    assert not border.unforeseen["settings"]


async def _many(send_one: Callable[[], Awaitable[None]], count: int) -> None:
    """``count`` calls, some of them at once."""
    left = iter(range(count))

    async def worker() -> None:
        for _ in left:
            await send_one()

    async with asyncio.TaskGroup() as group:
        for _ in range(min(AT_ONCE, count)):
            group.create_task(worker())
