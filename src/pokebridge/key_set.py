"""The public keys of an issuer of tokens: a JWK set (RFC 7517) at a URL, and how old it may be.

PyJWT's own client for key sets is not used: it blocks, and it forgets its keys in an outage.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import jwt
import structlog

from pokebridge.border import note_unforeseen
from pokebridge.errors import AnswerTooLongError, AuthError, KeysUnavailableError
from pokebridge.outgoing import http_client, read_body
from pokebridge.supervisor import cancel, run_once

PUBLIC_ALGORITHMS = ("RS256", "ES256", "EdDSA")
# The keys that a token is tried with. A stranger's token costs as many verifications.
MAX_CANDIDATE_KEYS = 8
# A key set of this age is fetched again. The old keys stay in use meanwhile.
KEYS_FRESH_S = 300.0
# The least time between two fetches, so that made-up key ids do not flood the endpoint.
KEYS_RETRY_S = 10.0
# The whole answer of the endpoint must be here by then, and be no larger.
KEYS_TIMEOUT_S = 5.0
MAX_KEY_SET_BYTES = 256 * 1024
MAX_KEYS = 100
# When no fetch was tried for so long, one is tried before an old key is used: it may be withdrawn.
KEYS_CHECKED_S = 900.0
# How long keys stay in use while the endpoint can't be read.
KEYS_KEPT_S = 24 * 3600.0

# The members of a public key (RFC 7517, RFC 7518). Private members are not read.
_PUBLIC_TYPES = ("RSA", "EC", "OKP")
# The curve that an algorithm demands (RFC 7518, section 3.4), whatever the key says.
_CURVES = {"ES256": "P-256", "EdDSA": "Ed25519"}
# Some issuers publish what they do with the private key.
_SIGNING = {"verify", "sign"}
_PUBLIC_MEMBERS = ("kty", "kid", "alg", "crv", "x", "y", "n", "e")

log = structlog.get_logger(__name__)


class KeySet:
    """The public keys at a URL (RFC 7517), fetched when needed, by one request at a time.

    A key that was seen once stays usable while the endpoint can't be read, for a day. It goes when
    a newer key set no longer has it. ``on_change`` is called when the endpoint has a different key
    set.
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
        """Whether there are keys, from the last fetch that has succeeded."""
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
        """Begin to fetch the keys again if they are old. Call it whenever they are relied on.

        Raises:
            KeysUnavailableError: that must be tried before they are used.
        """
        now = self._clock()
        if now - self._fetched_at < KEYS_FRESH_S:
            return
        self._start()
        if now - self._tried_at >= KEYS_CHECKED_S:
            raise KeysUnavailableError("the issuer's keys are old and must be fetched, try again")

    async def fetched(self) -> None:
        """Wait for a fetch, the one under way or a new one; return at once when it is too soon."""
        fetch = self._start()
        if fetch is not None:
            # A caller that gives up must not cancel the fetch for the others.
            await asyncio.shield(fetch)

    async def close(self) -> None:
        """Cancel a fetch that is under way and close the HTTP client."""
        await cancel(self._fetch)
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
            async with asyncio.timeout(KEYS_TIMEOUT_S):
                document = await self._read()
            keys = _public_keys(json.loads(document))
        except (httpx.HTTPError, ValueError, RecursionError, TimeoutError) as error:
            # Neither the error's text nor the URL, because both may contain a secret query.
            log.warning("jwks_fetch_failed", error=type(error).__name__)
        except Exception as error:  # noqa: BLE001 - the guard of this border
            note_unforeseen("key_sets", error)
        else:
            if document != self._document:
                self._document, self._keys = document, keys
                self._on_change()
            self._last_failed = False
            self._fetched_at = self._clock()
        finally:
            self._tried_at = self._clock()
            self._fetch = None
            if self._last_failed and self._tried_at - self._fetched_at >= KEYS_KEPT_S:
                self._document, self._keys = b"", ()
                self._on_change()

    async def _read(self) -> bytes:
        """The endpoint's answer. Not compressed, because a small one could become a huge one."""
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        async with self._http.stream("GET", self._url, headers=headers) as response:
            response.raise_for_status()
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                raise ValueError("the key set is compressed")
            try:
                return await read_body(response, MAX_KEY_SET_BYTES)
            except AnswerTooLongError as error:
                raise ValueError(str(error)) from None


def _public_keys(key_set: Any) -> list[jwt.PyJWK]:
    """The keys of a JWK set that are for signatures, of a supported algorithm, and long enough.

    Raises ``ValueError`` when there is none, or too many.
    """
    members = key_set.get("keys") if isinstance(key_set, dict) else None
    if not isinstance(members, list) or len(members) > MAX_KEYS:
        raise ValueError(f"a key set is a list of at most {MAX_KEYS} keys")
    keys = [key for key in map(_public_key, members) if key is not None]
    if not keys:
        raise ValueError("no usable key")
    return keys


def _public_key(member: Any) -> jwt.PyJWK | None:
    if not isinstance(member, dict) or member.get("use") not in (None, "sig"):
        return None
    if member.get("kty") not in _PUBLIC_TYPES:
        return None
    operations = member.get("key_ops")
    if isinstance(operations, list) and not any(each in _SIGNING for each in operations):
        return None
    try:
        given = {name: member.get(name) for name in _PUBLIC_MEMBERS}
        key = jwt.PyJWK({name: value for name, value in given.items() if value is not None})
        is_usable = (
            key.algorithm_name in PUBLIC_ALGORITHMS
            and member.get("crv") == _CURVES.get(key.algorithm_name)
            and key.Algorithm.check_key_length(key.key) is None
        )
    except Exception:  # noqa: BLE001 - whatever is wrong with one key, the others are used
        return None
    return key if is_usable else None
