"""Tokens: what is accepted, what is refused, and how the key set behaves."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from pokebridge import key_set, tokens
from pokebridge.errors import AuthError, ConfigError, InputError, KeysUnavailableError
from pokebridge.gateway.disconnects import Disconnects
from pokebridge.tokens import TokenVerifier, sign_token
from pokebridge.wire import Disconnect
from tests.support.stream_server import stream_server

SECRET = "a-secret-of-more-than-32-bytes-for-tests"
OTHER = "another-secret-of-more-than-32-bytes-too"
BOB = "urn:user:bob"

RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
ED_KEY = ed25519.Ed25519PrivateKey.generate()


def b64(data: bytes) -> str:
    """Unpadded base64url."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def claims(**changes: Any) -> dict[str, Any]:
    """Valid claims with ``changes``; ``None`` takes one away."""
    base = {"sub": BOB, "exp": time.time() + 60} | changes
    return {name: value for name, value in base.items() if value is not None}


def hs256(**changes: Any) -> str:
    """A token of :func:`claims`, signed with the secret."""
    return jwt.encode(claims(**changes), SECRET, "HS256")


RSA_JWK = RSAAlgorithm.to_jwk(RSA_KEY.public_key(), as_dict=True) | {"kid": "r"}
OTHER_CURVE_JWK = ECAlgorithm.to_jwk(
    ec.generate_private_key(ec.SECP384R1()).public_key(), as_dict=True
)
EC_JWK = ECAlgorithm.to_jwk(EC_KEY.public_key(), as_dict=True) | {"kid": "e"}
ED_JWK = OKPAlgorithm.to_jwk(ED_KEY.public_key(), as_dict=True) | {"kid": "d"}


class Issuer:
    """A key endpoint on loopback that counts its requests and can be told to fail or to hang."""

    def __init__(self) -> None:
        self.answer: Any = {"keys": [RSA_JWK, EC_JWK, ED_JWK]}
        self.status = 200
        self.requests = 0
        self.release = asyncio.Event()
        self.release.set()
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request."""
        await reader.readuntil(b"\r\n\r\n")
        self.requests += 1
        await self.release.wait()
        body = json.dumps(self.answer).encode()
        head = (
            f"HTTP/1.1 {self.status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)

    async def requested(self, count: int) -> None:
        """Wait for the request number ``count``."""
        await _until(lambda: self.requests >= count)


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    """A running key endpoint."""
    endpoint = Issuer()
    async with stream_server(endpoint.serve) as port:
        endpoint.url = f"http://127.0.0.1:{port}/keys"
        yield endpoint


class Clock:
    """A monotonic clock that the test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """The time now, in seconds."""
        return self.now


@pytest.fixture
async def clock() -> Clock:
    """The clock of :func:`jwks`."""
    return Clock()


@pytest.fixture
async def jwks(issuer: Issuer, clock: Clock) -> AsyncIterator[TokenVerifier]:
    """A verifier on ``issuer``'s keys."""
    verifier = TokenVerifier(jwks_url=issuer.url, audience="pokes", clock=clock)
    yield verifier
    await verifier.close()


def signed(key: Any, algorithm: str, kid: str | None, **changes: Any) -> str:
    """A token signed with ``key`` that names it ``kid``."""
    headers = {} if kid is None else {"kid": kid}
    return jwt.encode(claims(aud="pokes", **changes), key, algorithm, headers)


# --- HS256 ---------------------------------------------------------------------------------------


def test_a_signed_token_gives_back_its_claims() -> None:
    """What sign_token signs, the verifier reads back."""
    token = sign_token(SECRET, BOB, {"send", "poke"}, ttl_s=60)
    found = TokenVerifier(secret=SECRET).verify_now(token)
    assert found.subject == BOB
    assert found.scopes == {"send", "poke"}
    assert 55 < found.expires_at - time.time() <= 61


def test_a_token_without_scope_has_none() -> None:
    """Scope is optional."""
    assert TokenVerifier(secret=SECRET).verify_now(hs256()).scopes == frozenset()


@pytest.mark.parametrize(
    "given",
    [
        {"scope": "send poke"},
        {"scope": ["send", "poke"]},
        {"scope": ["send poke"]},
        {"scp": "send poke"},
        {"scp": ["poke", "send"]},
        {"scope": "send", "scp": ["poke"]},
    ],
)
def test_issuers_write_scopes_in_several_ways(given: dict[str, Any]) -> None:
    """A string and a list, under the standard's name and under Microsoft's and Okta's."""
    found = TokenVerifier(secret=SECRET).verify_now(hs256(**given))
    assert found.scopes == {"send", "poke"}


def test_only_spaces_separate_scopes() -> None:
    """Other white space is part of a scope, so it cannot add a second scope."""
    found = TokenVerifier(secret=SECRET).verify_now(hs256(scope=" send  x\u00a0admin y\tadmin "))
    assert found.scopes == {"send", "x\u00a0admin", "y\tadmin"}


@pytest.mark.parametrize("name", ["scope", "scp"])
@pytest.mark.parametrize("value", ["null", "[]", '""'])
def test_an_empty_scope_grants_nothing(name: str, value: str) -> None:
    """Null is as good as absent."""
    payload = json.dumps(claims())[:-1] + f', "{name}": {value}}}'
    token = jwt.PyJWS().encode(payload.encode(), SECRET)
    assert TokenVerifier(secret=SECRET).verify_now(token).scopes == frozenset()


def test_the_leeway_is_for_tokens_of_the_near_future() -> None:
    """The issuer's clock may be ahead by the leeway, and 60 s by default."""
    for ahead_s in (6, 50, 59):
        ahead = hs256(nbf=time.time() + ahead_s)
        assert TokenVerifier(secret=SECRET).verify_now(ahead).subject == BOB
    with pytest.raises(AuthError, match="not yet valid"):
        TokenVerifier(secret=SECRET, leeway_s=5).verify_now(ahead)
    with pytest.raises(AuthError, match="not yet valid"):
        TokenVerifier(secret=SECRET).verify_now(hs256(nbf=time.time() + 90))
    with pytest.raises(AuthError, match="expired"):
        TokenVerifier(secret=SECRET, leeway_s=600).verify_now(hs256(exp=time.time() - 1))


def test_both_secrets_are_accepted_during_a_rotation() -> None:
    """The previous secret still verifies; a third one does not."""
    verifier = TokenVerifier(secret=OTHER, previous_secret=SECRET)
    assert verifier.verify_now(sign_token(SECRET, BOB)).subject == BOB
    assert verifier.verify_now(sign_token(OTHER, BOB)).subject == BOB
    with pytest.raises(AuthError, match="signature"):
        verifier.verify_now(sign_token("x" * 32, BOB))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exp": None}, "exp"),
        ({"exp": 1}, "expired"),
        ({"exp": "4102444800"}, "exp"),
        ({"exp": True}, "exp"),
        ({"exp": float("nan")}, "expired"),
        ({"exp": float("inf")}, "no time"),
        ({"exp": -float("inf")}, "expired"),
        ({"exp": []}, "exp"),
        ({"nbf": float("nan")}, "not yet valid"),
        ({"nbf": float("inf")}, "not yet valid"),
        ({"nbf": "1"}, "nbf"),
        ({"sub": None}, "sub"),
        ({"sub": 7}, "Subject"),
        ({"sub": ""}, "recipient"),
        ({"sub": "two words"}, "recipient"),
        ({"sub": "x" * 257}, "recipient"),
        ({"sub": "bj\u00f6rn"}, "recipient"),
        ({"nbf": time.time() + 86_400}, "not yet valid"),
        ({"scope": 7}, "scope"),
        ({"scope": ["send", 7]}, "scope"),
        ({"scp": {"send": True}}, "scp"),
        ({"iss": "mallory"}, "issuer"),
        ({"iss": None}, "iss"),
        ({"aud": "elsewhere"}, "Audience"),
        ({"aud": ["elsewhere"]}, "Audience"),
        ({"aud": None}, "aud"),
        ({"aud": [1]}, "claim format"),
    ],
)
def test_a_wrong_claim_is_refused(changes: dict[str, Any], message: str) -> None:
    """Each claim that is missing, malformed or not for us is named."""
    verifier = TokenVerifier(secret=SECRET, issuer="us", audience="pokes")
    good = {"iss": "us", "aud": ["else", "pokes"]}
    token = jwt.PyJWS().encode(json.dumps(claims(**(good | changes))).encode(), SECRET)
    assert verifier.verify_now(hs256(**good)).subject == BOB
    with pytest.raises(AuthError, match=message):
        verifier.verify_now(token)


def test_issuer_and_audience_are_not_asked_for_unless_configured() -> None:
    """A token may carry more than we check."""
    assert TokenVerifier(secret=SECRET).verify_now(hs256(iss="x", aud="y")).subject == BOB


def test_a_time_far_away_stays_a_number_that_json_carries() -> None:
    """An expiry in the year 10^22 is cut, not passed on to timers."""
    assert TokenVerifier(secret=SECRET).verify_now(hs256(exp=10**30)).expires_at == 2**53 - 1


@pytest.mark.parametrize(
    "token",
    [
        "",
        "a",
        "a.b",
        "a.b.c",
        "a.b.c.d",
        "e30.e30.e30",
        f"{b64(b'[]')}.e30.e30",
        f"{b64(b'{' * 3000)}.e30.e30",
        b64(b'{"alg":"HS256","x":' + b"[" * 5000) + ".e30.e30",
        f"{b64(bytes([255]))}.e30.e30",
        "\u00e9.e30.e30",
        "\ud800.e30.e30",
        hs256() + "\n",
        " " + hs256(),
        hs256() + "." + hs256(),
        hs256(pad="x" * 8192),
    ],
)
def test_what_is_no_token_is_refused(token: str) -> None:
    """Garbage of every shape ends in AuthError, nothing else."""
    with pytest.raises(AuthError):
        TokenVerifier(secret=SECRET).verify_now(token)


def test_a_payload_that_is_no_json_is_refused() -> None:
    """Also when it is properly signed."""
    for payload in (b"hello", b"\xff", b"[1]", b'{"x":' + b"[" * 5000):
        with pytest.raises(AuthError, match="payload"):
            TokenVerifier(secret=SECRET).verify_now(jwt.PyJWS().encode(payload, SECRET))


@pytest.mark.parametrize("algorithm", ["none", "HS384", "HS512", "hs256", "", "RS256"])
def test_no_other_algorithm_is_taken(algorithm: str) -> None:
    """An alg that is not HS256 finds no key, whatever the signature is."""
    token = hs256()
    header = b64(json.dumps({"alg": algorithm, "typ": "JWT"}).encode())
    _, payload, signature = token.split(".")
    with pytest.raises(AuthError, match="alg"):
        TokenVerifier(secret=SECRET).verify_now(f"{header}.{payload}.{signature}")


def test_a_critical_extension_is_refused() -> None:
    """RFC 7515, section 4.1.11: what must be understood and isn't makes the token invalid."""
    token = jwt.encode(claims(), SECRET, "HS256", {"crit": ["x"], "x": 1})
    with pytest.raises(AuthError, match="extension"):
        TokenVerifier(secret=SECRET).verify_now(token)


def test_a_signature_has_one_spelling() -> None:
    """The bits that base64 leaves over must be zero: no second token with the same meaning."""
    token = hs256()
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    twin = token[:-1] + alphabet[alphabet.index(token[-1]) + 1]
    with pytest.raises(AuthError, match="padding"):
        TokenVerifier(secret=SECRET).verify_now(twin)


@given(data=st.data())
def test_a_changed_token_is_refused_or_means_the_same(data: st.DataObject) -> None:
    """Padding may be added, which the signature does not cover; nothing else."""
    token = sign_token(SECRET, BOB, ["send"], issuer="us")
    start = data.draw(st.integers(0, len(token)))
    end = data.draw(st.integers(start, min(len(token), start + 3)))
    filler = data.draw(st.text("ABCwxyz0189-_.=", max_size=3))
    changed = token[:start] + filler + token[end:]
    verifier = TokenVerifier(secret=SECRET)
    try:
        found = verifier.verify_now(changed)
    except AuthError:
        return
    assert found == verifier.verify_now(token)
    assert changed.rstrip("=") == token


# Numbers only: PyJWT accepts the string "4000000000" as a number, and we do not.
TIMES = st.sampled_from([4 * 10**9, 4e9, 10**30, -10, 0, 10**9])
NAMES: st.SearchStrategy[object] = st.sampled_from(
    ["us", "else", "", None, 7, ["us"], ["else", "us"], [7], {}]
)
HEADERS = st.fixed_dictionaries(
    {"alg": st.sampled_from(["HS256", "HS256", "HS256", "HS384", "none", 7])},
    optional={
        "typ": st.sampled_from(["JWT", "at+jwt", 7]),
        "kid": st.sampled_from(["k", "", 7]),
        "crit": st.sampled_from([["x"], [], "b64"]),
        "b64": st.sampled_from([True, False]),
    },
)
PAYLOADS = st.fixed_dictionaries(
    {"sub": st.sampled_from([BOB, BOB, BOB, 7, None]), "exp": TIMES},
    optional={"nbf": TIMES, "iat": TIMES, "iss": NAMES, "aud": NAMES},
)


@given(HEADERS, PAYLOADS, st.sampled_from([SECRET, SECRET, OTHER]), st.sampled_from(["us", None]))
def test_the_verdict_is_that_of_pyjwt(
    header: dict[str, Any], payload: dict[str, Any], secret: str, us: str | None
) -> None:
    """Whatever header, claims and key a token has, PyJWT accepts it exactly if we do."""
    parts = ".".join(b64(json.dumps(part).encode()) for part in (header, payload))
    hmac = jwt.get_algorithm_by_name("HS256")
    given_token = f"{parts}.{b64(hmac.sign(parts.encode(), secret.encode()))}"
    verifier = TokenVerifier(secret=SECRET, issuer=us, audience=us)
    with suppress(AuthError):
        verifier.verify_now(given_token)
    options: Any = {"require": ["sub", "exp"], "verify_iat": False, "verify_aud": us is not None}
    try:
        jwt.decode(given_token, SECRET, ["HS256"], options, leeway=60, issuer=us, audience=us)
        is_valid = True
    except (jwt.PyJWTError, TypeError):
        is_valid = False
    assert (len(verifier._verified._claims) == 1) == is_valid, (header, payload)


@pytest.mark.parametrize("secret", ["", "short", "x" * 31])
def test_a_short_secret_is_refused(secret: str) -> None:
    """RFC 7518 asks for 32 bytes, of the signer as of the verifier."""
    with pytest.raises(ConfigError, match="32 bytes"):
        TokenVerifier(secret=secret)
    with pytest.raises(ConfigError, match="32 bytes"):
        sign_token(secret, BOB)


def test_a_public_key_can_be_no_secret() -> None:
    """A public key as the secret is a mistake with which anybody could sign."""
    pem = RSA_KEY.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    with pytest.raises(ConfigError, match="of another kind"):
        TokenVerifier(secret=pem.decode())


def test_only_a_recipient_can_be_signed_for() -> None:
    """The signer refuses what no verifier would take."""
    with pytest.raises(InputError, match="recipient"):
        sign_token(SECRET, "two words")


def test_no_message_holds_the_token_or_the_secret() -> None:
    """Errors go to logs and to callers."""
    token = hs256(exp=1, nbf=1)
    with pytest.raises(AuthError) as caught:
        TokenVerifier(secret=OTHER).verify_now(token)
    assert token not in str(caught.value)
    assert OTHER not in str(caught.value)
    with pytest.raises(ConfigError) as short:
        TokenVerifier(secret="hunter2")
    assert "hunter2" not in str(short.value)


# --- What is remembered --------------------------------------------------------------------------


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tokens whose signatures were checked, in order, each as often as it was."""
    checked: list[str] = []
    check = TokenVerifier._check_signature

    def spy(self: TokenVerifier, token: str) -> tokens.Claims:
        checked.append(token)
        return check(self, token)

    monkeypatch.setattr(TokenVerifier, "_check_signature", spy)
    return checked


def test_a_signature_is_checked_once(checks: list[str]) -> None:
    """The second call finds the same claims without a look at the signature."""
    verifier = TokenVerifier(secret=SECRET)
    token = hs256(scope="send poke", iat=1)
    first = verifier.verify_now(token)
    assert verifier.verify_now(token) is first
    assert first.scopes == {"send", "poke"}
    assert checks == [token]


async def test_a_token_may_be_known_and_yet_not_be_remembered(checks: list[str]) -> None:
    """Without ``remember`` a token is not stored, but a stored one is found."""
    verifier = TokenVerifier(secret=SECRET)
    token = hs256()
    assert verifier.verify_now(token, remember=False).subject == BOB
    assert (await verifier.verify(token, remember=False)).subject == BOB
    assert checks == [token, token]
    known = verifier.verify_now(token)
    assert verifier.verify_now(token, remember=False) is known
    assert checks == [token, token, token]


def test_a_remembered_token_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is accepted until the moment that ``exp`` names, and not in it."""
    verifier = TokenVerifier(secret=SECRET, leeway_s=600)
    expires_at = time.time() + 1000
    token = hs256(exp=expires_at)
    verifier.verify_now(token)
    monkeypatch.setattr("pokebridge.tokens.time.time", lambda: expires_at - 0.001)
    assert verifier.verify_now(token).expires_at == expires_at
    monkeypatch.setattr("pokebridge.tokens.time.time", lambda: expires_at)
    with pytest.raises(AuthError, match="expired"):
        verifier.verify_now(token)


def test_a_remembered_token_is_revoked() -> None:
    """The recipient's old tokens are refused from then on, and those issued later are not."""
    now = time.time()
    disconnects = Disconnects()
    verifier = TokenVerifier(secret=SECRET)
    verifier.refuses = lambda subject, issued_at: disconnects.refuses(subject, issued_at, now)
    old, undated, new = hs256(iat=now - 60), hs256(), hs256(iat=now + 1)
    eve = hs256(sub="urn:user:eve", iat=now - 60)
    odd = [hs256(iat=iat) for iat in (now + 9e6, float("inf"), float("nan"), 10**400, True, "1")]
    for token in (old, undated, new, eve, *odd):
        verifier.verify_now(token)
    at_ms = int(now * 1000)
    disconnects.note(Disconnect(BOB, at_ms, at_ms + 60_000), now)
    for token in (old, undated, old, *odd):
        with pytest.raises(AuthError, match="revoked"):
            verifier.verify_now(token)
    assert verifier.verify_now(new).subject == BOB
    assert verifier.verify_now(eve).subject == "urn:user:eve"


def test_a_rotated_secret_ends_what_was_remembered() -> None:
    """What one verifier remembers, another that has only the new secret does not know."""
    token = hs256()
    during = TokenVerifier(secret=OTHER, previous_secret=SECRET)
    assert [during.verify_now(token).subject for _ in range(2)] == [BOB, BOB]
    after = TokenVerifier(secret=OTHER)
    for _ in range(2):
        with pytest.raises(AuthError, match="signature"):
            after.verify_now(token)


async def test_a_token_that_is_not_valid_yet_is_not_remembered(checks: list[str]) -> None:
    """It is checked again each time, and accepted when its ``nbf`` has come."""
    verifier = TokenVerifier(secret=SECRET, leeway_s=0)
    token = hs256(nbf=int(time.time()) + 2)
    for _ in range(2):
        with pytest.raises(AuthError, match="not yet valid"):
            verifier.verify_now(token)
    assert len(checks) == 2

    def accepted() -> bool:
        with suppress(AuthError):
            verifier.verify_now(token)
            return True
        return False

    await _until(accepted)


def test_few_tokens_are_remembered(checks: list[str]) -> None:
    """The newest are kept. One that was pushed out is checked again, and accepted."""
    verifier = TokenVerifier(secret=SECRET, max_verified=3)
    issued = [hs256(sub=f"urn:user:{number}") for number in range(10)]
    for number, token in enumerate(issued):
        assert verifier.verify_now(token).subject == f"urn:user:{number}"
        assert len(verifier._verified._claims) == len(verifier._verified._order) <= 3
    checks.clear()
    for token in issued[7:]:
        verifier.verify_now(token)
    assert checks == []
    assert verifier.verify_now(issued[0]).subject == "urn:user:0"
    assert checks == issued[:1]


@given(st.lists(st.integers(0, 9), min_size=20, max_size=60), st.integers(1, 10))
def test_recipients_are_never_mixed_up(order: list[int], size: int) -> None:
    """In any order of tokens, and with any room, each gives its own recipient and scopes."""
    verifier = TokenVerifier(secret=SECRET, max_verified=size)
    for number in order:
        found = verifier.verify_now(ISSUED[number])
        assert found.subject == f"urn:user:{number}"
        assert found.scopes == {f"scope-{number}"}


ISSUED = [sign_token(SECRET, f"urn:user:{n}", [f"scope-{n}"], ttl_s=10**6) for n in range(10)]


def test_a_remembered_token_helps_no_other() -> None:
    """One changed character anywhere, and a token is refused as it was before."""
    verifier = TokenVerifier(secret=SECRET)
    token = ISSUED[0]
    verifier.verify_now(token)
    for at, character in enumerate(token):
        changed = token[:at] + ("A" if character != "A" else "B") + token[at + 1 :]
        with pytest.raises(AuthError):
            verifier.verify_now(changed)
    for changed in (token[:-1], f"{token}A", f" {token}"):
        with pytest.raises(AuthError):
            verifier.verify_now(changed)


async def test_an_unchanged_key_set_forgets_no_token(
    jwks: TokenVerifier, issuer: Issuer, clock: Clock, checks: list[str]
) -> None:
    """Keys are fetched again although no token needs a check, and nothing is lost by it."""
    token = signed(EC_KEY, "ES256", "e")
    await jwks.verify(token)
    checks.clear()
    clock.now += key_set.KEYS_FRESH_S
    jwks.verify_now(token)
    assert jwks._key_set is not None
    await jwks._key_set.fetched()
    assert issuer.requests == 2
    jwks.verify_now(token)
    assert checks == []


async def test_a_token_of_a_withdrawn_key_is_forgotten(
    jwks: TokenVerifier, issuer: Issuer, clock: Clock, checks: list[str]
) -> None:
    """After each fetch of the keys the remembered tokens are checked again."""
    token, other = signed(EC_KEY, "ES256", "e"), signed(RSA_KEY, "RS256", "r")
    for each in (token, other):
        await jwks.verify(each)
    clock.now += key_set.KEYS_RETRY_S
    issuer.answer = {"keys": [RSA_JWK]}
    with pytest.raises(AuthError):
        await jwks.verify(signed(EC_KEY, "ES256", "unknown"))
    checks.clear()
    with pytest.raises(AuthError, match="not one of the issuer's"):
        jwks.verify_now(token)
    assert jwks.verify_now(other).subject == BOB
    assert checks == [token, other]


# --- JWKS ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "algorithm", "kid"),
    [
        (RSA_KEY, "RS256", "r"),
        (EC_KEY, "ES256", "e"),
        (ED_KEY, "EdDSA", "d"),
        (ED_KEY, "EdDSA", None),
    ],
)
async def test_the_issuers_keys_verify(
    jwks: TokenVerifier, issuer: Issuer, key: Any, algorithm: str, kid: str | None
) -> None:
    """Each key type, and no key id where the key is the only one of its kind."""
    token = signed(key, algorithm, kid)
    with pytest.raises(KeysUnavailableError):
        jwks.verify_now(token)
    assert (await jwks.verify(token)).subject == BOB
    assert jwks.verify_now(token).subject == BOB
    assert issuer.requests == 1
    with pytest.raises(AuthError, match="signature"):
        jwks.verify_now(token[:-8] + "AAAAAAAA")
    with pytest.raises(AuthError, match="signature"):
        jwks.verify_now(token.rpartition(".")[0] + ".e30")


def rsa_jwk(key: Any, kid: str | None) -> dict[str, Any]:
    """The public half of ``key``, with an id if given."""
    named = {} if kid is None else {"kid": kid}
    return RSAAlgorithm.to_jwk(key.public_key(), as_dict=True) | named


OTHER_RSA_KEY = rsa.generate_private_key(65537, 2048)


@pytest.mark.parametrize("of_token", ["r", None])
@pytest.mark.parametrize("of_keys", [("r", "r"), (None, None), ("r", None)])
async def test_a_key_id_is_a_hint(
    jwks: TokenVerifier,
    issuer: Issuer,
    of_keys: tuple[str | None, str | None],
    of_token: str | None,
) -> None:
    """Keys that share an id, or have none, are tried one after the other."""
    kids = dict(zip((RSA_KEY, OTHER_RSA_KEY), of_keys, strict=True))
    issuer.answer = {"keys": [rsa_jwk(key, kid) for key, kid in kids.items()]}
    for key, kid in kids.items():
        token = signed(key, "RS256", of_token and kid)
        assert (await jwks.verify(token)).subject == BOB
    strange = rsa.generate_private_key(65537, 2048)
    with pytest.raises(AuthError, match="signature"):
        await jwks.verify(signed(strange, "RS256", of_token))
    assert issuer.requests == 1


async def test_a_token_is_tried_with_a_few_keys_only(jwks: TokenVerifier, issuer: Issuer) -> None:
    """A stranger's token does not cost a verification with each of a hundred keys."""
    issuer.answer = {"keys": [rsa_jwk(RSA_KEY, None)] * 100}
    await jwks.verify(signed(RSA_KEY, "RS256", None))
    assert jwks._key_set is not None
    assert len(jwks._key_set.find("RS256", None)) == key_set.MAX_CANDIDATE_KEYS


async def test_a_public_key_is_no_hmac_secret(jwks: TokenVerifier) -> None:
    """The classic confusion: HS256 signed with the PEM, or the JWK, that everybody can read."""
    await jwks.verify(signed(RSA_KEY, "RS256", "r"))
    pem = RSA_KEY.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    header = b64(b'{"alg":"HS256","kid":"r"}')
    payload = b64(json.dumps(claims(aud="pokes")).encode())
    hmac = jwt.get_algorithm_by_name("HS256")
    for secret in (pem, pem.strip(), json.dumps(RSA_JWK).encode(), b""):
        signature = b64(hmac.sign(f"{header}.{payload}".encode(), secret))
        with pytest.raises(AuthError, match="algorithm"):
            await jwks.verify(f"{header}.{payload}.{signature}")


async def test_the_key_decides_the_algorithm(jwks: TokenVerifier, issuer: Issuer) -> None:
    """PS256 with an RS256 key, or ES256 under the RSA key's name, finds no key."""
    await jwks.verify(signed(RSA_KEY, "RS256", "r"))
    for token in (signed(RSA_KEY, "PS256", "r"), signed(RSA_KEY, "RS512", "r")):
        with pytest.raises(AuthError, match="algorithm"):
            await jwks.verify(token)
    with pytest.raises(AuthError, match="not one of the issuer's"):
        await jwks.verify(signed(EC_KEY, "ES256", "r"))
    assert issuer.requests == 1


async def test_secret_and_key_set_work_side_by_side(issuer: Issuer) -> None:
    """HS256 goes to the secret, the rest to the key set."""
    verifier = TokenVerifier(secret=SECRET, jwks_url=issuer.url, audience="pokes")
    assert (await verifier.verify(hs256(aud="pokes"))).subject == BOB
    assert issuer.requests == 0
    assert (await verifier.verify(signed(EC_KEY, "ES256", "e"))).subject == BOB
    await verifier.close()
    await verifier.close()


async def test_one_fetch_serves_all_who_wait(jwks: TokenVerifier, issuer: Issuer) -> None:
    """A reconnect storm costs one request. A caller that gives up does not cancel it."""
    issuer.release.clear()
    token = signed(EC_KEY, "ES256", "e")
    waiting = [asyncio.create_task(jwks.verify(token)) for _ in range(50)]
    await issuer.requested(1)
    waiting[0].cancel()
    issuer.release.set()
    done = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(done[0], asyncio.CancelledError)
    assert all(isinstance(found, tokens.Claims) for found in done[1:])
    assert issuer.requests == 1


async def test_garbage_key_ids_do_not_hammer_the_issuer(
    jwks: TokenVerifier, issuer: Issuer, clock: Clock
) -> None:
    """Unknown ids cause one fetch an interval, and are refused in between."""
    for round_ in range(1, 4):
        for n in range(20):
            with pytest.raises(AuthError, match="not one of the issuer's"):
                await jwks.verify(signed(EC_KEY, "ES256", f"made-up-{n}"))
        assert issuer.requests == round_
        clock.now += key_set.KEYS_RETRY_S


async def test_a_rotated_key_is_found(jwks: TokenVerifier, issuer: Issuer, clock: Clock) -> None:
    """A new key id causes a fetch. A key that is no longer in the set is refused."""
    new = ec.generate_private_key(ec.SECP256R1())
    await jwks.verify(signed(EC_KEY, "ES256", "e"))
    issuer.answer = {"keys": [ECAlgorithm.to_jwk(new.public_key(), as_dict=True) | {"kid": "new"}]}
    clock.now += key_set.KEYS_RETRY_S
    assert (await jwks.verify(signed(new, "ES256", "new"))).subject == BOB
    with pytest.raises(AuthError, match="not one of the issuer's"):
        await jwks.verify(signed(EC_KEY, "ES256", "e"))


async def test_an_old_key_set_is_renewed_without_a_wait(
    jwks: TokenVerifier, issuer: Issuer, clock: Clock
) -> None:
    """A stale set verifies at once, and the new one replaces it behind the scenes."""
    token = signed(EC_KEY, "ES256", "e")
    await jwks.verify(token)
    clock.now += key_set.KEYS_FRESH_S
    issuer.answer = {"keys": [RSA_JWK]}
    assert jwks.verify_now(token).subject == BOB

    def revoked() -> bool:
        try:
            jwks.verify_now(token)
        except AuthError:
            return True
        return False

    await _until(revoked)
    assert issuer.requests == 2


@pytest.mark.parametrize(
    ("status", "answer"),
    [(500, {}), (302, {}), (200, {"keys": []}), (200, []), (200, {"keys": [7, {"kty": "oct"}]})],
)
async def test_keys_outlive_an_outage(
    jwks: TokenVerifier, issuer: Issuer, clock: Clock, status: int, answer: Any
) -> None:
    """While the endpoint fails, known keys verify; an unknown one means 'try again'."""
    token = signed(EC_KEY, "ES256", "e")
    await jwks.verify(token)
    issuer.status, issuer.answer = status, answer
    clock.now += key_set.KEYS_FRESH_S
    for _ in range(5):
        with pytest.raises(KeysUnavailableError):
            await jwks.verify(signed(EC_KEY, "ES256", "unknown"))
        assert (await jwks.verify(token)).subject == BOB
    assert issuer.requests == 2


async def test_an_unreachable_issuer_is_unavailable() -> None:
    """If the issuer is unreachable, the caller is told to retry, not that its token is bad."""
    verifier = TokenVerifier(jwks_url="http://127.0.0.1:9/keys", audience="pokes")
    with pytest.raises(KeysUnavailableError):
        await verifier.verify(signed(EC_KEY, "ES256", "e"))
    await verifier.close()


@pytest.mark.parametrize(
    "jwk",
    [
        EC_JWK | {"use": "enc"},
        EC_JWK | {"alg": "ES384"},
        EC_JWK | {"kid": ["e"]},
        EC_JWK | {"kty": ["EC"]},
        EC_JWK | {"key_ops": ["deriveKey"]},
        EC_JWK | {"crv": "P-384"},
        OTHER_CURVE_JWK | {"kid": "e", "alg": "ES256"},
        EC_JWK | {"crv": ["P-256"]},
        EC_JWK | {"x": "AAAA"},
        EC_JWK | {"x": None},
        {"kty": "oct", "k": b64(SECRET.encode()), "kid": "e", "alg": "HS256"},
        {},
    ],
)
async def test_an_unusable_key_is_left_out(jwks: TokenVerifier, issuer: Issuer, jwk: Any) -> None:
    """A strange key in the set is not used, and does not spoil the others."""
    issuer.answer = {"keys": [jwk, ED_JWK]}
    assert (await jwks.verify(signed(ED_KEY, "EdDSA", "d"))).subject == BOB
    with pytest.raises(AuthError, match="not one of the issuer's"):
        jwks.verify_now(signed(EC_KEY, "ES256", "e"))


async def test_private_parts_of_a_key_are_not_read(jwks: TokenVerifier, issuer: Issuer) -> None:
    """An issuer that publishes them by mistake is still an issuer with a public key."""
    issuer.answer = {"keys": [RSAAlgorithm.to_jwk(RSA_KEY, as_dict=True) | {"kid": "r"}]}
    assert (await jwks.verify(signed(RSA_KEY, "RS256", "r"))).subject == BOB


async def test_a_short_rsa_key_is_left_out(jwks: TokenVerifier, issuer: Issuer) -> None:
    """RFC 7518 asks for 2048 bits."""
    short = rsa.generate_private_key(65537, 1024)
    issuer.answer["keys"].append(
        RSAAlgorithm.to_jwk(short.public_key(), as_dict=True) | {"kid": "short"}
    )
    with (
        pytest.warns(jwt.InsecureKeyLengthWarning),
        pytest.raises(AuthError, match="not one of the issuer's"),
    ):
        await jwks.verify(signed(short, "RS256", "short"))


async def test_close_gives_up_a_fetch(issuer: Issuer) -> None:
    """A shutdown does not wait for a hanging key endpoint."""
    issuer.release.clear()
    verifier = TokenVerifier(jwks_url=issuer.url, audience="pokes")
    waiting = asyncio.create_task(verifier.verify(signed(EC_KEY, "ES256", "e")))
    await issuer.requested(1)
    async with asyncio.timeout(2):
        await verifier.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  # the condition is another object's state
            await asyncio.sleep(0.001)
