"""Who a caller is: JSON Web Tokens, signed and verified (protocol.md section 5).

A token is verified at every handshake and every HTTP call, so its parsing is done here: the
compact form (RFC 7515, section 7.1) split by one regular expression, header and claims decoded by
msgspec into typed structs. That costs about a fifth of ``jwt.decode``. The cryptography is PyJWT's,
and so is signing; a test holds that whatever is accepted here, ``jwt.decode`` accepts too.

A key has one algorithm, fixed by the key's own type. The ``alg`` that a token claims only selects
among the keys, so neither ``none`` nor a public key used as an HMAC secret finds one (RFC 8725,
section 3.1). No message or log line here holds a token, a claim's value or a secret.
"""

import asyncio
import binascii
import math
import re
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx
import jwt
import msgspec
import structlog
from jwt.algorithms import Algorithm

from pokebridge.errors import AuthError, ConfigError, KeysUnavailableError
from pokebridge.model import MAX_VERSION, check_recipient, is_recipient

MAX_TOKEN_BYTES = 8192
MIN_SECRET_BYTES = 32  # RFC 7518, section 3.2: as long as the hash's output
MIN_RSA_BITS = 2048  # RFC 7518, section 3.3

# Between this host's clock and the issuer's, for `nbf`. `exp` gets none: a token ends when it says.
CLOCK_SKEW_S = 5.0
# A key set is read again after this age, while the old keys stay in use.
KEYS_FRESH_S = 300.0
# Between two requests to the key endpoint, so that made-up key ids can't hammer it.
KEYS_RETRY_S = 10.0
KEYS_TIMEOUT_S = 5.0

_COMPACT = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)")
# The algorithm that a public key is used with, by its type and curve (RFC 7518, RFC 8037).
_ALGORITHM_OF_KEY = {
    ("RSA", ""): "RS256",
    ("EC", "P-256"): "ES256",
    ("OKP", "Ed25519"): "EdDSA",
}
_PUBLIC_MEMBERS = ("kty", "crv", "x", "y", "n", "e")

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Claims:
    """What a valid token says: ``subject`` has ``scopes`` until ``expires_at`` (Unix seconds)."""

    subject: str
    scopes: frozenset[str]
    expires_at: float


class _Header(msgspec.Struct):
    alg: str
    kid: str | None = None
    # Extensions that must be understood: we understand none (RFC 7515, section 4.1.11).
    crit: Any = None


class _Payload(msgspec.Struct):
    sub: str
    exp: float
    nbf: float = 0
    scope: str = ""
    iss: str | None = None
    aud: str | list[str] | None = None


class _Key(NamedTuple):
    algorithm: Algorithm
    key: Any

    @classmethod
    def secret(cls, secret: str) -> "_Key":
        return cls(jwt.get_algorithm_by_name("HS256"), _checked_secret(secret))


_decode_header = msgspec.json.Decoder(_Header).decode
_decode_payload = msgspec.json.Decoder(_Payload).decode


class TokenVerifier:
    """Verifies tokens with an HS256 secret, the keys at a JWKS URL, or both.

    Both is unambiguous: an HS256 token is checked with the secrets, any other with the key set.
    ``previous_secret`` is accepted too, while a new one is rolled out. A token must carry
    ``issuer`` and ``audience`` where these are given. Raises
    :class:`~pokebridge.errors.ConfigError` for a secret under 32 bytes.

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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._secrets = [_Key.secret(s) for s in (secret, previous_secret) if s is not None]
        self._key_set = _KeySet(jwks_url, clock) if jwks_url is not None else None
        self._issuer = issuer
        self._audience = audience
        if jwks_url is not None and audience is None:
            _log.warning(
                "jwt_audience_not_set",
                meaning="tokens that the issuer made for other services are accepted too",
            )

    def verify_now(self, token: str) -> Claims:
        """The claims of ``token``, without waiting for anything.

        Raises :class:`~pokebridge.errors.AuthError` when it is not valid, and
        :class:`~pokebridge.errors.KeysUnavailableError` when the key that it names is not known:
        :meth:`verify` fetches it.
        """
        compact = _COMPACT.fullmatch(token) if len(token) <= MAX_TOKEN_BYTES else None
        if compact is None:
            raise AuthError("the token is not a JWT")
        header_part, payload_part, signature_part = compact.groups()
        try:
            header = _decode_header(_decode_segment(header_part))
            signature = _decode_segment(signature_part)
        except (ValueError, RecursionError):
            raise AuthError("the token is not a JWT") from None
        signed = token[: compact.start(3) - 1].encode("ascii")
        for algorithm, key in self._keys_for(header):
            if algorithm.verify(signed, key, signature):
                return self._check(payload_part)
        raise AuthError("the token's signature is not valid")

    async def verify(self, token: str) -> Claims:
        """Like :meth:`verify_now`, but fetches a key that is not known yet.

        :class:`~pokebridge.errors.KeysUnavailableError` then means that it can't be had just now.
        """
        try:
            return self.verify_now(token)
        except KeysUnavailableError:
            if self._key_set is not None:
                await self._key_set.fetched()
        return self.verify_now(token)

    async def close(self) -> None:
        """Give up a fetch that is under way and close the HTTP client. May be called twice."""
        if self._key_set is not None:
            await self._key_set.close()

    def _keys_for(self, header: _Header) -> Iterable[_Key]:
        if header.crit is not None:
            raise AuthError("the token demands an extension that is not supported")
        if header.alg == "HS256" and self._secrets:
            return self._secrets
        if self._key_set is not None and header.alg in _ALGORITHM_OF_KEY.values():
            return (self._key_set.find(header.alg, header.kid),)
        raise AuthError("the token's algorithm is not allowed")

    def _check(self, payload_part: str) -> Claims:
        try:
            payload = _decode_payload(_decode_segment(payload_part))
        except msgspec.ValidationError as error:
            raise AuthError(f"the token's claims are not usable: {error}") from None
        except (ValueError, RecursionError):
            raise AuthError("the token's claims are not JSON") from None
        now = time.time()
        if payload.exp <= now:
            raise AuthError("the token has expired")
        if payload.nbf > now + CLOCK_SKEW_S:
            raise AuthError("the token is not valid yet")
        if self._issuer is not None and payload.iss != self._issuer:
            raise AuthError("the token is from another issuer")
        if self._audience is not None and self._audience not in _as_list(payload.aud):
            raise AuthError("the token is for another audience")
        if not is_recipient(payload.sub):
            raise AuthError(
                "the token's subject is no recipient: 1 to 256 visible ASCII characters"
            )
        # A time beyond what a JSON number holds exactly is as good as never.
        expires_at = min(payload.exp, MAX_VERSION)
        return Claims(payload.sub, frozenset(payload.scope.split()), expires_at)


class _KeySet:
    """The public keys at a URL (RFC 7517), fetched when needed, by one request at a time.

    A key that was seen once stays usable while the endpoint can't be read; it goes when a newer
    key set no longer has it.
    """

    def __init__(self, url: str, clock: Callable[[], float]) -> None:
        self._url = url
        self._clock = clock
        self._http = httpx.AsyncClient(timeout=KEYS_TIMEOUT_S)
        self._keys: Mapping[tuple[str, str | None], _Key] = {}
        self._fetch: asyncio.Task[None] | None = None
        self._tried_at = -KEYS_RETRY_S
        self._fetched_at = -KEYS_FRESH_S
        self._last_failed = False

    def find(self, algorithm: str, key_id: str | None) -> _Key:
        """The key called ``key_id``; without an id, the only key of ``algorithm``.

        Raises :class:`~pokebridge.errors.KeysUnavailableError` when a fetch might bring it, and
        :class:`~pokebridge.errors.AuthError` when one has just shown that it is not there.
        """
        key = self._keys.get((algorithm, key_id))
        if key is not None:
            if self._clock() - self._fetched_at >= KEYS_FRESH_S:
                self._start()
            return key
        if self._fetch is not None or self._last_failed or self._may_fetch():
            raise KeysUnavailableError("the issuer's keys can't be had just now")
        raise AuthError("the token's key is none of the issuer's")

    async def fetched(self) -> None:
        """Wait for a fetch, the one under way or a new one; return at once when it is too soon."""
        fetch = self._start()
        if fetch is not None:
            # A caller that gives up must not take the fetch from the others.
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
            self._fetch = asyncio.get_running_loop().create_task(self._refresh())
        return self._fetch

    async def _refresh(self) -> None:
        try:
            response = await self._http.get(self._url)
            keys = _usable_keys(response.raise_for_status().json())
        except (httpx.HTTPError, ValueError, RecursionError) as error:
            self._last_failed = True
            # Neither the error's text nor the URL: both may hold a query that is secret.
            _log.warning("jwks_fetch_failed", error=type(error).__name__)
        else:
            self._keys = keys
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


def _checked_secret(secret: str) -> bytes:
    encoded = secret.encode()
    if len(encoded) < MIN_SECRET_BYTES:
        raise ConfigError(f"a secret for HS256 must have at least {MIN_SECRET_BYTES} bytes")
    return encoded


def _decode_segment(segment: str) -> bytes:
    """Unpadded base64url in its one canonical spelling; anything else raises ``ValueError``."""
    decoded = urlsafe_b64decode(segment + "==")
    if urlsafe_b64encode(decoded).rstrip(b"=") != segment.encode("ascii"):
        raise binascii.Error("not canonical base64url")
    return decoded


def _as_list(audience: str | list[str] | None) -> list[str]:
    if audience is None:
        return []
    return [audience] if isinstance(audience, str) else audience


def _usable_keys(key_set: Any) -> dict[tuple[str, str | None], _Key]:
    """The keys of a JWK set by (algorithm, id); raises ``ValueError`` when there is none.

    Keys that are not for signatures, or not RS256, ES256 or EdDSA, are left out. The only key of
    its algorithm is there without an id too, for issuers that put none into their tokens.
    """
    members = key_set.get("keys") if isinstance(key_set, dict) else None
    keys: dict[tuple[str, str | None], _Key] = {}
    by_algorithm: dict[str, list[_Key]] = {}
    for member in members if isinstance(members, list) else []:
        named = _public_key(member) if isinstance(member, dict) else None
        if named is not None:
            name, key = named
            by_algorithm.setdefault(name, []).append(key)
            if isinstance(member.get("kid"), str):
                keys[name, member["kid"]] = key
    keys.update({(name, None): found[0] for name, found in by_algorithm.items() if len(found) == 1})
    if not keys:
        raise ValueError("no usable key")
    return keys


def _public_key(member: Mapping[str, Any]) -> tuple[str, _Key] | None:
    """One JWK as (algorithm's name, key), or ``None`` when it is no key of ours."""
    try:
        name = _ALGORITHM_OF_KEY[member["kty"], member.get("crv", "")]
        if (
            member.get("alg", name) != name
            or member.get("use", "sig") != "sig"
            or "verify" not in member.get("key_ops", ["verify"])
        ):
            return None
        jwk = jwt.PyJWK({part: member[part] for part in _PUBLIC_MEMBERS if part in member}, name)
    except (LookupError, TypeError, ValueError, jwt.PyJWTError):
        return None
    if name == "RS256" and jwk.key.key_size < MIN_RSA_BITS:
        return None
    return name, _Key(jwk.Algorithm, jwk.key)
