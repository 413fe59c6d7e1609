"""Who a caller is: JSON Web Tokens, with the algorithms of PyJWT (protocol.md section 5).

Each key has one algorithm. The ``alg`` of a token only selects among the keys. So ``none`` selects
no key, and neither does a public key that is used as an HMAC secret (RFC 8725, section 3.1). No
message or log entry contains a token, a claim's value or a secret.

Keys, signing and the check of a signature are PyJWT's. Its ``decode`` is not used: it takes three
times as long, which matters when all clients return with new tokens. The results are the same
(tests/test_tokens.py).
"""

import base64
import binascii
import functools
import hashlib
import json
import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jwt
import msgspec
import structlog
from jwt.algorithms import HMACAlgorithm

from pokebridge.errors import AuthError, ConfigError, KeysUnavailableError
from pokebridge.key_set import KeySet
from pokebridge.model import MAX_VERSION, check_recipient, is_recipient

MAX_TOKEN_BYTES = 8192
MIN_SECRET_BYTES = 32  # RFC 7518, section 3.2: as long as the hash's output

LEEWAY_S = 60.0
"""By how much the issuer's clock may be ahead, for ``nbf``. ``exp`` has no leeway."""
MAX_VERIFIED = 32_768
"""The tokens that a verifier remembers. Each takes about 0.3 KB: 10 MB in all."""


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


class _Header(msgspec.Struct):
    """The members of a token's header that matter here (RFC 7515, section 4.1)."""

    alg: str
    kid: str | None = None
    # Extensions that must be understood (here none is), and one that changes what is signed.
    crit: msgspec.Raw = msgspec.Raw()
    b64: bool = True


class _Payload(msgspec.Struct):
    """The claims that are used here. Those of type ``Any`` are checked by hand."""

    exp: float
    sub: Any = None
    nbf: float | None = None
    iat: Any = None
    iss: Any = None
    aud: Any = None
    # RFC 8693, section 4.2, has a string. Some issuers write a list, and call it `scp`.
    scope: str | list[str] | None = None
    scp: str | list[str] | None = None


_decode_header = msgspec.json.Decoder(_Header).decode
_decode_claims = msgspec.json.Decoder(_Payload).decode


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
        self._key_set = None if jwks_url is None else KeySet(jwks_url, clock, self._verified.clear)
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

    def verify_now(self, token: str, *, remember: bool = True) -> Claims:
        """The claims of ``token``, without waiting for anything; at once when it is remembered.

        Unless ``remember`` is set, a token that is new here is not remembered.

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
            if remember:
                self._verified.add(digest, claims)
        elif self._key_set is not None:
            self._key_set.keep_fresh()  # or a key that was withdrawn would stay in use
        if not claims.expires_at > time.time():
            raise AuthError("the token has expired")
        if self.refuses(claims.subject, claims.issued_at):
            raise AuthError("the token was revoked")
        return claims

    async def verify(self, token: str, *, remember: bool = True) -> Claims:
        """Like :meth:`verify_now`, but fetches a key that is not known yet.

        :class:`~pokebridge.errors.KeysUnavailableError` then means that the fetch has failed.
        """
        try:
            return self.verify_now(token, remember=remember)
        except KeysUnavailableError:
            if self._key_set is not None:
                await self._key_set.fetched()
        return self.verify_now(token, remember=remember)

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
        signed, _, signature_text = token.rpartition(".")
        header_text, _, payload_text = signed.partition(".")
        try:
            header = _read_header(header_text)
            signature = _from_base64url(signature_text)
        except (ValueError, RecursionError) as error:
            raise AuthError(f"the token is not valid: {error}") from None
        if header.crit or not header.b64:
            raise AuthError("the token is not valid: its header demands an extension (crit, b64)")
        for key in self._keys_for(header):
            if key.Algorithm.verify(signed.encode(), key.key, signature):
                return self._check_claims(_decode_payload(payload_text))
        raise AuthError("the token's signature is not valid")

    def _keys_for(self, header: _Header) -> Sequence[jwt.PyJWK]:
        if header.alg == "HS256" and self._secrets:
            return self._secrets
        if self._key_set is None:
            raise AuthError("the token's algorithm is not allowed")
        return self._key_set.find(header.alg, header.kid)

    def _check_claims(self, payload: _Payload) -> Claims:
        now = time.time()
        if not now < payload.exp < math.inf:  # so that NaN has expired
            raise AuthError("the token has expired, or its exp is no time")
        if payload.nbf is not None and not payload.nbf <= now + self._leeway_s:
            raise AuthError("the token is not yet valid (nbf)")
        if self._issuer is not None and payload.iss != self._issuer:
            raise AuthError("the token is of another issuer (iss)")
        if self._audience is not None:
            _check_audience(payload.aud, self._audience)
        if not isinstance(payload.sub, str) or not is_recipient(payload.sub):
            raise AuthError(
                "Subject (sub) of a token must be a recipient: 1 to 256 visible ASCII characters"
            )
        # One from the future would outlive every revocation, so it counts as none.
        is_time = (
            isinstance(payload.iat, int | float)
            and not isinstance(payload.iat, bool)
            and payload.iat <= now + self._leeway_s
        )
        return Claims(
            payload.sub,
            _scopes(payload.scope, payload.scp),
            min(payload.exp, MAX_VERSION),  # JSON numbers are exact up to here
            payload.iat if is_time else None,
        )


def _from_base64url(text: str) -> bytes:
    """The bytes of a part of a token. They have one spelling, but for padding at the end.

    Raises ``ValueError`` for any other spelling.
    """
    text = text.rstrip("=")
    decoded = base64.urlsafe_b64decode(text + "==")  # skips what is not of the alphabet
    if base64.urlsafe_b64encode(decoded).rstrip(b"=") != text.encode():
        raise ValueError("its parts must be in Base64url, with no other character or padding")
    return decoded


@functools.lru_cache(maxsize=64)
def _read_header(text: str) -> _Header:
    """The header in ``text``. All tokens that were signed with one key have the same."""
    try:
        return _decode_header(_from_base64url(text))
    except msgspec.ValidationError:
        raise
    except (msgspec.DecodeError, binascii.Error):
        raise ValueError("it is not a JWT: the header must be JSON in Base64url") from None


def _decode_payload(text: str) -> _Payload:
    try:
        payload = _from_base64url(text)
        try:
            return _decode_claims(payload)
        except msgspec.DecodeError:
            # It may have a NaN, which is no JSON, but which PyJWT writes.
            return msgspec.convert(json.loads(payload), _Payload)
    except msgspec.ValidationError as error:
        raise AuthError(f"the token's claims are not usable: its payload: {error}") from None
    except (ValueError, RecursionError):
        raise AuthError("the token's payload is not JSON in Base64url") from None


def _check_audience(given: object, ours: str) -> None:
    """Raise AuthError unless the claim ``aud`` names ``ours`` (RFC 7519, section 4.1.3)."""
    names = given if isinstance(given, list) else [given]
    if given is not None and not all(isinstance(name, str) for name in names):
        raise AuthError("the token's aud has not its claim format: a string, or a list of strings")
    if ours not in names:
        raise AuthError("Audience (aud) of the token: it is for another service")


def _scopes(*given: str | list[str] | None) -> frozenset[str]:
    texts = [[each] if isinstance(each, str) else each or [] for each in given]
    return _scope_set(" ".join(text for each in texts for text in each))


@functools.lru_cache(maxsize=256)
def _scope_set(text: str) -> frozenset[str]:
    """The scopes in ``text``: one object for all tokens that grant the same."""
    return frozenset(filter(None, text.split(" ")))  # RFC 6749, section 3.3: no other white space


class _Verified:
    """The claims of the tokens that were verified last: at most ``size``, the oldest go first.

    A token is kept as a keyed hash, under a random key that never leaves the process. So a memory
    dump has no tokens in it, and a long token needs no more room than a short one. Nobody can
    choose tokens whose hashes collide with another's, so the time of a look-up reveals nothing
    about the tokens here.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        # A copy of it hashes a token sooner than a new one, which would take in the key again.
        self._keyed = hashlib.blake2b(digest_size=_DIGEST_BYTES, key=secrets.token_bytes(32))
        self._claims: dict[bytes, Claims] = {}
        # The keys of ``_claims``: a dict finds its own oldest key only behind all deleted ones.
        self._order: deque[bytes] = deque()

    def digest(self, token: str) -> bytes:
        """The key of ``token`` here."""
        keyed = self._keyed.copy()
        keyed.update(token.encode())
        return keyed.digest()

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


def sign_token(
    secret: str,
    subject: str,
    scopes: Iterable[str] = (),
    ttl_s: float = 3600,
    *,
    issuer: str | None = None,
    audience: str | None = None,
) -> str:
    """An HS256 token for ``subject``, valid for ``ttl_s`` seconds.

    Raises :class:`~pokebridge.errors.ConfigError` for a secret under 32 bytes and
    :class:`~pokebridge.errors.InputError` when ``subject`` is no recipient.
    """
    issued_at = time.time()
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
    """Return the subject that ``token`` claims to have. Nothing is verified.

    ``None``: the token is malformed, or has no subject.
    """
    try:
        claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    except (jwt.InvalidTokenError, ValueError, RecursionError):
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


def _secret_key(secret: str) -> jwt.PyJWK:
    return jwt.PyJWK(HMACAlgorithm.to_jwk(_checked_secret(secret), as_dict=True), "HS256")
