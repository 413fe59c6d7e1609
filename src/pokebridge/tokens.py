"""Who a caller is: JSON Web Tokens, signed and verified with PyJWT (protocol.md section 5).

Each key has one algorithm. The ``alg`` of a token only selects among the keys. So ``none`` selects
no key, and neither does a public key that is used as an HMAC secret (RFC 8725, section 3.1). No
message or log entry contains a token, a claim's value or a secret.

PyJWT's own client for key sets is not used: it blocks, and it forgets its keys in an outage.
"""

import asyncio
import functools
import hashlib
import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import jwt
import msgspec
import structlog
from jwt.algorithms import HMACAlgorithm

from pokebridge.errors import AuthError, ConfigError, KeysUnavailableError
from pokebridge.model import MAX_VERSION, check_recipient, is_recipient
from pokebridge.outgoing import http_client
from pokebridge.supervisor import run_once

MAX_TOKEN_BYTES = 8192
MIN_SECRET_BYTES = 32  # RFC 7518, section 3.2: as long as the hash's output
PUBLIC_ALGORITHMS = ("RS256", "ES256", "EdDSA")

LEEWAY_S = 60.0
"""By how much the issuer's clock may be ahead, for ``nbf``. ``exp`` has no leeway."""
# The keys that a token is tried with. A stranger's token costs as many verifications.
MAX_CANDIDATE_KEYS = 8
# A key set of this age is fetched again. The old keys stay in use meanwhile.
KEYS_FRESH_S = 300.0
# The least time between two fetches, so that made-up key ids do not flood the endpoint.
KEYS_RETRY_S = 10.0
KEYS_TIMEOUT_S = 5.0
MAX_VERIFIED = 32_768
"""The tokens that a verifier remembers. Each takes about 0.3 KB: 10 MB in all."""

# The members of a public key (RFC 7517, RFC 7518). Private members are not read.
_PUBLIC_TYPES = ("RSA", "EC", "OKP")
_PUBLIC_MEMBERS = ("kty", "kid", "alg", "crv", "x", "y", "n", "e")

# So that the object has 48 bytes. With one more it would take 64.
_DIGEST_BYTES = 15

SignToken = Callable[[str, Iterable[str], float], str]
"""Makes a token from a subject, scopes and a time to live in seconds."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Claims:
    """What a valid token says: ``subject`` has ``scopes`` until ``expires_at`` (Unix seconds).

    ``issued_at`` is in Unix seconds too, and ``None`` when the token does not say it.
    """

    subject: str
    scopes: frozenset[str]
    expires_at: float
    issued_at: float | None = field(default=None, compare=False)


class _Payload(msgspec.Struct):
    """The types of the claims that are used here; PyJWT takes ``"exp": "soon"`` for a number."""

    sub: str
    exp: float
    # RFC 8693, section 4.2, has a string. Some issuers write a list, and call it `scp`.
    scope: str | list[str] | None = None
    scp: str | list[str] | None = None


class TokenVerifier:
    """Verifies tokens with an HS256 secret, the keys at a JWKS URL, or both.

    Both is unambiguous: an HS256 token is checked with the secrets, any other with the key set.
    ``previous_secret`` is accepted too, while a new one is rolled out. A token must carry
    ``issuer`` and ``audience`` where these are given. Its ``nbf`` may be up to ``leeway_s`` seconds
    in the future. Raises
    :class:`~pokebridge.errors.ConfigError` for a secret under 32 bytes.

    A signature is verified once: the verifier remembers the last ``max_verified`` tokens that were
    valid. Whether one of them has expired or was revoked is looked up at every call, and all are
    forgotten when the key set changes. What is not valid is not remembered, so it costs a
    verification each time, and a key that appears later is found.

    Its calls belong on one event loop's thread. ``clock`` is monotonic and ages the key set.
    """

    def __init__(
        self,
        *,
        secret: str | None = None,
        previous_secret: str | None = None,
        jwks_url: str | None = None,
        issuer: str | None = None,
        audience: str | None = None,
        leeway_s: float = LEEWAY_S,
        max_verified: int = MAX_VERIFIED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._verified = _Verified(max_verified)
        self._secrets = [_secret_key(s) for s in (secret, previous_secret) if s is not None]
        self._key_set = None if jwks_url is None else _KeySet(jwks_url, clock, self._verified.clear)
        self.refuses: Callable[[str, float | None], bool] = lambda _subject, _issued_at: False
        """Whether a token of this subject, issued at this time (Unix seconds) or at an unknown one,
        was revoked."""
        self._issuer = issuer
        self._audience = audience
        self._leeway_s = leeway_s
        if jwks_url is not None and audience is None:
            log.warning(
                "jwt_audience_not_set",
                meaning="tokens that the issuer made for other services are accepted too",
            )

    def verify_now(self, token: str) -> Claims:
        """The claims of ``token``, without waiting for anything; at once when it is remembered.

        Raises :class:`~pokebridge.errors.AuthError` when it is not valid, and
        :class:`~pokebridge.errors.KeysUnavailableError` when the key that it names is not known:
        :meth:`verify` fetches it.
        """
        if len(token) > MAX_TOKEN_BYTES or not token.isascii():
            raise AuthError("the token is not valid: it is too long, or not ASCII")
        digest = self._verified.digest(token)
        claims = self._verified.find(digest)
        if claims is None:
            claims = self._check_signature(token)
            self._verified.add(digest, claims)
        elif self._key_set is not None:
            self._key_set.keep_fresh()  # or a key that was withdrawn would stay in use
        if not claims.expires_at > time.time():
            raise AuthError("the token has expired")
        if self.refuses(claims.subject, claims.issued_at):
            raise AuthError("the token was revoked")
        return claims

    async def verify(self, token: str) -> Claims:
        """Like :meth:`verify_now`, but fetches a key that is not known yet.

        :class:`~pokebridge.errors.KeysUnavailableError` then means that the fetch has failed.
        """
        try:
            return self.verify_now(token)
        except KeysUnavailableError:
            if self._key_set is not None:
                await self._key_set.fetched()
        return self.verify_now(token)

    async def check(self) -> None:
        """Fetch the key set, unless that has succeeded before: keys are kept through an outage.

        Raises :class:`~pokebridge.errors.KeysUnavailableError` when the fetch fails, because no
        token of the issuer can be verified then.
        """
        if self._key_set is not None and not self._key_set.has_keys:
            await self._key_set.fetched()
            if not self._key_set.has_keys:
                raise KeysUnavailableError("the issuer's keys could not be fetched yet")

    async def close(self) -> None:
        """Cancel a fetch that is under way and close the HTTP client. Idempotent."""
        if self._key_set is not None:
            await self._key_set.close()

    def _check_signature(self, token: str) -> Claims:
        try:
            for key in self._keys_for(token):
                with suppress(jwt.InvalidSignatureError):
                    return _claims(self._decode(token, key))
        except jwt.PyJWTError as error:
            raise AuthError(f"the token is not valid: {error}") from None
        raise AuthError("the token's signature is not valid")

    def _keys_for(self, token: str) -> Sequence[jwt.PyJWK]:
        if self._key_set is None:
            return self._secrets
        header = jwt.get_unverified_header(token)
        if header.get("alg") == "HS256" and self._secrets:
            return self._secrets
        return self._key_set.find(header.get("alg"), header.get("kid"))

    def _decode(self, token: str, key: jwt.PyJWK) -> dict[str, Any]:
        return jwt.decode(
            token,
            key,
            issuer=self._issuer,
            audience=self._audience,
            leeway=self._leeway_s,
            options={
                "require": ["sub", "exp"],
                "verify_aud": self._audience is not None,
                "verify_exp": False,  # it has no leeway
                "verify_iat": False,  # only the issuer knows when it was made
            },
        )


def _claims(payload: dict[str, Any]) -> Claims:
    try:
        used = msgspec.convert(payload, _Payload)
    except msgspec.ValidationError as error:
        raise AuthError(f"the token's claims are not usable: {error}") from None
    if not used.exp > time.time():  # so that NaN has expired
        raise AuthError("the token has expired")
    if not is_recipient(used.sub):
        raise AuthError("the token's subject is not a recipient: 1 to 256 visible ASCII characters")
    issued_at = payload.get("iat")
    is_time = isinstance(issued_at, int | float) and not isinstance(issued_at, bool)
    return Claims(
        used.sub,
        _scopes(used.scope, used.scp),
        min(used.exp, MAX_VERSION),  # JSON numbers are exact up to here
        issued_at if is_time else None,
    )


def _scopes(*given: str | list[str] | None) -> frozenset[str]:
    texts = [[each] if isinstance(each, str) else each or [] for each in given]
    return _scope_set(" ".join(text for each in texts for text in each))


@functools.lru_cache(maxsize=256)
def _scope_set(text: str) -> frozenset[str]:
    """The scopes in ``text``: one object for all tokens that grant the same."""
    return frozenset(text.split())


class _Verified:
    """The claims of the tokens that were verified last: at most ``size``, the oldest go first.

    A token is kept as a keyed hash, under a random key that never leaves the process. So no memory
    dump has tokens in it, a long token needs no more room than a short one, and nobody can choose
    tokens whose hashes resemble that of another's: how long a look-up takes says nothing about the
    tokens that are here.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._key = secrets.token_bytes(32)
        self._claims: dict[bytes, Claims] = {}
        # The keys of ``_claims``: a dict finds its own oldest key only behind all deleted ones.
        self._order: deque[bytes] = deque()

    def digest(self, token: str) -> bytes:
        """The key of ``token`` here."""
        return hashlib.blake2b(token.encode(), digest_size=_DIGEST_BYTES, key=self._key).digest()

    def find(self, digest: bytes) -> Claims | None:
        """The claims that were added for ``digest``."""
        return self._claims.get(digest)

    def add(self, digest: bytes, claims: Claims) -> None:
        """Remember the claims of a token that is not here yet."""
        if len(self._claims) == self._size:
            del self._claims[self._order.popleft()]
        self._claims[digest] = claims
        self._order.append(digest)

    def clear(self) -> None:
        """Forget all tokens."""
        self._claims.clear()
        self._order.clear()


class _KeySet:
    """The public keys at a URL (RFC 7517), fetched when needed, by one request at a time.

    A key that was seen once stays usable while the endpoint can't be read; it goes when a newer
    key set no longer has it. ``on_change`` is called when the endpoint has a different key set.
    """

    def __init__(self, url: str, clock: Callable[[], float], on_change: Callable[[], None]) -> None:
        self._url = url
        self._clock = clock
        self._on_change = on_change
        # What the endpoint answered, and the keys in it.
        self._document = b""
        self._http = http_client(url, timeout=KEYS_TIMEOUT_S)
        self._keys: Sequence[jwt.PyJWK] = ()
        self._fetch: asyncio.Task[None] | None = None
        self._tried_at = -KEYS_RETRY_S
        self._fetched_at = -KEYS_FRESH_S
        self._last_failed = False

    @property
    def has_keys(self) -> bool:
        """Whether a fetch has ever succeeded."""
        return bool(self._keys)

    def find(self, algorithm: object, key_id: str | None) -> Sequence[jwt.PyJWK]:
        """Return the keys of ``algorithm`` that may have signed a token that names ``key_id``.

        An id is a hint: two keys may share it, and a key may have none. A token without one may be
        signed by any key.

        Raises:
            KeysUnavailableError: a fetch might bring such a key.
            AuthError: a fetch has just shown that there is none.
        """
        if algorithm not in PUBLIC_ALGORITHMS:
            raise AuthError("the token's algorithm is not allowed")
        usable = [key for key in self._keys if key.algorithm_name == algorithm]
        found = [key for key in usable if key_id in (None, key.key_id)]
        found = found or [key for key in usable if key.key_id is None]
        if found:
            self.keep_fresh()
            return found[:MAX_CANDIDATE_KEYS]
        if self._fetch is not None or self._last_failed or self._may_fetch():
            raise KeysUnavailableError("the issuer's keys are unavailable, try again")
        raise AuthError("the token's key is not one of the issuer's")

    def keep_fresh(self) -> None:
        """Begin to fetch the keys again if they are old. Call it whenever they are relied on."""
        if self._clock() - self._fetched_at >= KEYS_FRESH_S:
            self._start()

    async def fetched(self) -> None:
        """Wait for a fetch, the one under way or a new one; return at once when it is too soon."""
        fetch = self._start()
        if fetch is not None:
            # A caller that gives up must not cancel the fetch for the others.
            await asyncio.shield(fetch)

    async def close(self) -> None:
        if self._fetch is not None:
            self._fetch.cancel()
            await asyncio.gather(self._fetch, return_exceptions=True)
        await self._http.aclose()

    def _may_fetch(self) -> bool:
        return self._clock() - self._tried_at >= KEYS_RETRY_S

    def _start(self) -> asyncio.Task[None] | None:
        if self._fetch is None and self._may_fetch():
            self._fetch = run_once("jwks_fetch", self._refresh())
        return self._fetch

    async def _refresh(self) -> None:
        self._last_failed = True
        try:
            response = await self._http.get(self._url)
            keys = _public_keys(response.raise_for_status().json())
        except (httpx.HTTPError, ValueError, RecursionError, jwt.PyJWTError) as error:
            # Neither the error's text nor the URL, because both may contain a secret query.
            log.warning("jwks_fetch_failed", error=type(error).__name__)
        else:
            if response.content != self._document:
                self._document, self._keys = response.content, keys
                self._on_change()
            self._last_failed = False
            self._fetched_at = self._clock()
        finally:
            self._tried_at = self._clock()
            self._fetch = None


def sign_token(
    secret: str,
    subject: str,
    scopes: Iterable[str] = (),
    ttl_s: float = 3600,
    *,
    issuer: str | None = None,
    audience: str | None = None,
    now: float | None = None,
) -> str:
    """An HS256 token for ``subject``, valid ``ttl_s`` seconds from ``now`` (Unix seconds).

    Raises :class:`~pokebridge.errors.ConfigError` for a secret under 32 bytes and
    :class:`~pokebridge.errors.InputError` when ``subject`` is no recipient.
    """
    issued_at = time.time() if now is None else now
    claims = {
        "sub": check_recipient(subject),
        "iat": int(issued_at),
        "exp": math.ceil(issued_at + ttl_s),
        "scope": " ".join(sorted(scopes)) or None,
        "iss": issuer,
        "aud": audience,
    }
    present = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(present, _checked_secret(secret), "HS256")


def unverified_subject(token: str) -> str | None:
    """Return the subject that ``token`` claims to have, for messages only: nothing is verified.

    ``None``: the token is malformed, or has no subject.
    """
    try:
        claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    except jwt.InvalidTokenError:
        return None
    subject = claims.get("sub")
    return subject if isinstance(subject, str) else None


def _checked_secret(secret: str) -> bytes:
    encoded = secret.encode()
    if len(encoded) < MIN_SECRET_BYTES:
        raise ConfigError(f"a secret for HS256 must have at least {MIN_SECRET_BYTES} bytes")
    try:
        jwt.get_algorithm_by_name("HS256").prepare_key(encoded)
    except jwt.InvalidKeyError:
        raise ConfigError("a secret for HS256 must not be a key of another kind") from None
    return encoded


class _CheckedHmac(HMACAlgorithm):
    """HMAC with a secret that was checked before.

    PyJWT would look at every token whether the secret is a key of another kind. That is a quarter
    of a verification.
    """

    def prepare_key(self, key: str | bytes) -> bytes:
        """Return ``key``, the secret's bytes."""
        assert isinstance(key, bytes), "the key of a JWK"  # noqa: S101 - narrows the type
        return key


def _secret_key(secret: str) -> jwt.PyJWK:
    key = jwt.PyJWK(HMACAlgorithm.to_jwk(_checked_secret(secret), as_dict=True), "HS256")
    key.Algorithm = _CheckedHmac(HMACAlgorithm.SHA256)
    return key


def _public_keys(key_set: Any) -> list[jwt.PyJWK]:
    """The keys of a JWK set that are for signatures, of an algorithm of ours, and long enough.

    Raises ``ValueError`` or :class:`jwt.PyJWTError` when there is none.
    """
    members = key_set.get("keys") if isinstance(key_set, dict) else None
    found = jwt.PyJWKSet(
        [
            {name: member[name] for name in _PUBLIC_MEMBERS if name in member}
            for member in (members if isinstance(members, list) else [])
            if isinstance(member, dict)
            and member.get("kty") in _PUBLIC_TYPES
            and member.get("use", "sig") == "sig"
        ]
    )
    keys = [
        key
        for key in found
        if key.algorithm_name in PUBLIC_ALGORITHMS
        and key.Algorithm.check_key_length(key.key) is None
    ]
    if not keys:
        raise ValueError("no usable key")
    return keys
