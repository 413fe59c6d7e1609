"""Key endpoints that are slow, huge, hostile or gone: what becomes of the tokens."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from pokebridge import key_set
from pokebridge.errors import AuthError, KeysUnavailableError
from pokebridge.tokens import TokenVerifier, sign_token
from tests.support.stream_server import stream_server

KEY = ec.generate_private_key(ec.SECP256R1())
JWK: dict[str, Any] = ECAlgorithm.to_jwk(KEY.public_key(), as_dict=True) | {"kid": "e"}
BODY = json.dumps({"keys": [JWK]}).encode()
TOKEN = jwt.encode({"sub": "urn:user:bob", "exp": 2**40}, KEY, "ES256", {"kid": "e"})
SECRET = "0123456789abcdef" * 2


def answer(body: bytes, *fields: str, status: int = 200) -> bytes:
    """A whole HTTP answer."""
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", "Connection: close", *fields]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Endpoint:
    """A key endpoint. It answers with ``said``; with ``drips`` it sends that a byte at a time."""

    def __init__(self) -> None:
        self.said = answer(BODY)
        self.drips = False
        self.asked: list[bytes] = []
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request."""
        self.asked.append(await reader.readuntil(b"\r\n\r\n"))
        if not self.drips:
            writer.write(self.said)
        for byte in self.said if self.drips else b"":
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.05)


@asynccontextmanager
async def served(endpoint: Endpoint, **options: Any) -> AsyncIterator[TokenVerifier]:
    """A verifier on the keys of ``endpoint``."""
    async with stream_server(endpoint.serve) as port:
        endpoint.url = f"http://127.0.0.1:{port}/keys"
        verifier = TokenVerifier(jwks_url=endpoint.url, audience=None, **options)
        try:
            yield verifier
        finally:
            await verifier.close()


async def test_a_dripping_answer_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """However steadily it drips: a call waits for the whole answer no longer than that."""
    monkeypatch.setattr(key_set, "KEYS_TIMEOUT_S", 0.5)
    endpoint = Endpoint()
    endpoint.drips = True
    async with asyncio.timeout(30), served(endpoint) as verifier:
        with pytest.raises(KeysUnavailableError):
            await verifier.verify(TOKEN)


NO_KEY_SETS = {
    "larger than allowed": answer(b'{"keys":[' + b" " * key_set.MAX_KEY_SET_BYTES + BODY[9:]),
    "compressed": answer(gzip.compress(BODY), "Content-Encoding: gzip"),
    "compressed and large": answer(gzip.compress(b" " * 60_000_000), "Content-Encoding: gzip"),
    "a redirect": answer(b"", "Location: http://127.0.0.1:1/keys", status=302),
    "an error": answer(BODY, status=500),
    "a page": answer(b"<html>"),
    "a deep array": answer(b"[" * 100_000),
    "a deep key list": answer(b'{"keys":' + b"[" * 5_000 + b"]" * 5_000 + b"}"),
    "no UTF-8": answer(b"\xff\xfe\x00"),
    "no list": answer(b'{"keys": 5}'),
    "a large number": answer(b'{"keys": [' + b"9" * 5_000 + b"]}"),
    "too many keys": answer(json.dumps({"keys": [JWK] * (key_set.MAX_KEYS + 1)}).encode()),
    "a large head": b"HTTP/1.1 200 X\r\n" + b"A: b\r\n" * 50_000,
    "no HTTP": b"nonsense\r\n\r\n",
    "nothing": b"",
}


@pytest.mark.parametrize("name", NO_KEY_SETS)
async def test_what_is_no_key_set_changes_nothing(name: str) -> None:
    """Too large, compressed, a redirect, an error or nonsense: the keys that are known stay."""
    endpoint, now = Endpoint(), [1000.0]
    async with served(endpoint, clock=lambda: now[0]) as verifier:
        assert (await verifier.verify(TOKEN)).subject == "urn:user:bob"
        assert b"accept-encoding: identity" in endpoint.asked[0].lower()
        endpoint.said, now[0] = NO_KEY_SETS[name], now[0] + key_set.KEYS_CHECKED_S
        with pytest.raises(KeysUnavailableError):
            verifier.verify_now(TOKEN)
        assert (await verifier.verify(TOKEN)).subject == "urn:user:bob"
        assert len(endpoint.asked) == 2


async def test_one_bad_key_spoils_no_other() -> None:
    """Whatever is wrong with it. A member that is null is as good as absent."""
    bad: list[Any] = [5, None, {}, {"kty": "RSA", "n": 5, "e": "AQAB"}, {"kty": "EC", "crv": "P-0"}]
    bad += [JWK | {"x": "AAAA"}, JWK | {"kty": []}, JWK | {"use": "enc"}, JWK | {"alg": 7}]
    endpoint = Endpoint()
    nulls = dict.fromkeys(("use", "alg", "key_ops"))
    endpoint.said = answer(json.dumps({"keys": [*bad, JWK | nulls]}).encode())
    async with served(endpoint) as verifier:
        assert (await verifier.verify(TOKEN)).subject == "urn:user:bob"


async def test_a_key_that_was_withdrawn_in_a_quiet_week_is_not_used_again() -> None:
    """The key is accepted neither for a new token nor for a remembered one."""
    endpoint, now = Endpoint(), [1000.0]
    async with served(endpoint, clock=lambda: now[0]) as verifier:
        await verifier.verify(TOKEN)
        other = ec.generate_private_key(ec.SECP256R1())
        theirs = ECAlgorithm.to_jwk(other.public_key(), as_dict=True) | {"kid": "new"}
        endpoint.said = answer(json.dumps({"keys": [theirs]}).encode())
        now[0] += 7 * 24 * 3600
        with pytest.raises(AuthError, match="not one of the issuer's"):
            await verifier.verify(TOKEN)


async def test_keys_outlive_an_outage_for_a_day() -> None:
    """In use they stay so, without waiting for each attempt. Then only secrets verify tokens."""
    endpoint, now = Endpoint(), [1000.0]
    own = sign_token(SECRET, "urn:user:eve", ttl_s=10 * 24 * 3600)
    async with served(endpoint, clock=lambda: now[0], secret=SECRET) as verifier:
        await verifier.verify(TOKEN)
        assert verifier._key_set is not None
        endpoint.said = answer(b"", status=503)
        for _ in range(int(key_set.KEYS_KEPT_S // 800)):
            await verifier.check()
            now[0] += 800
            verifier.verify_now(TOKEN)  # at once: there was an attempt lately
            await verifier._key_set.fetched()
        for attempt in (verifier.verify(TOKEN), verifier.check()):
            with pytest.raises(KeysUnavailableError):
                await attempt
        assert verifier.verify_now(own).subject == "urn:user:eve"
