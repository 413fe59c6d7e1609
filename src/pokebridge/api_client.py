"""A small client of the HTTP API, for the commands and the load generators.

Every failure is a :class:`~pokebridge.errors.PokebridgeError` whose text fits on a line.
"""

import asyncio
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec

from pokebridge.api import schema
from pokebridge.errors import (
    AuthError,
    ConfigError,
    NotFoundError,
    PokebridgeError,
    UnavailableError,
)
from pokebridge.outgoing import Answer, http_client, read_answer
from pokebridge.tokens import SignToken
from pokebridge.urls import check_bridge_url

TIMEOUT_S = 30.0
"""For a whole call, however its answer drips."""
MAX_ANSWER_BYTES = 32 * 1024 * 1024
"""Far more than the description of the largest cluster takes."""


class _Mode(msgspec.Struct):
    mode: str


class _Drained(msgspec.Struct):
    instance: str


# What the bridge answers. A login page may answer 200 as well.
_ANSWERS: Mapping[str, type[msgspec.Struct]] = {
    "/v1/pokes": schema.PokesAccepted,
    "/v1/messages": schema.Sent,
    "/v1/cluster": schema.Cluster,
    "/v1/cluster/mode": _Mode,
    "/v1/cluster/drain": _Drained,
    "/v1/dev/token": schema.Token,
    "/v1/mailbox": schema.MailboxTotals,
    "/v1/sessions": schema.RecipientState,
}


class ApiClient:
    """The HTTP API of the instance at ``url``. Close it (``async with``).

    Args:
        url: the instance's address, http:// or https://.
        token: the token of every call. Without one, :meth:`token_for` makes one.
        sign: makes tokens. Without it, a --dev instance is asked for them.

    Raises:
        ConfigError: ``url`` is no HTTP URL, ``token`` is no JWT, or the environment names a proxy
            that can't be used.
    """

    def __init__(self, url: str, token: str | None = None, sign: SignToken | None = None) -> None:
        self.url = check_bridge_url("--url", url)
        if token is not None and re.fullmatch(r"[\w.-]+", token, re.ASCII) is None:
            raise ConfigError("--token: must be a JWT")
        self._token = token
        self._sign = sign
        self._http = http_client(self.url, timeout=TIMEOUT_S)

    async def __aenter__(self) -> Self:
        """Open nothing: the first call connects."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def token_for(self, subject: str, scopes: Iterable[str], ttl_s: float = 3600) -> str:
        """Return the given token, or a new one for ``subject``.

        A new token is signed with ``sign``, or by a --dev instance.
        """
        if self._token is not None:
            return self._token
        if self._sign is not None:
            return self._sign(subject, scopes, ttl_s)
        body = {"sub": subject, "scope": " ".join(scopes), "ttl_s": ttl_s}
        answer = await self._send_json("POST", "/v1/dev/token", {}, body)
        if answer.status == HTTPStatus.NOT_FOUND and answer.detail:
            raise ConfigError(
                "no token: give --token, or configure jwt_secret (POKEBRIDGE_JWT_SECRET);"
                f" {self.url} hands none out, for it does not run with --dev"
            )
        return str(self._result("/v1/dev/token", answer)["token"])

    async def get(self, path: str, token: str) -> dict[str, Any]:
        """GET and return the JSON of the answer."""
        return self._result(path, await self._request("GET", path, _bearer(token)))

    async def post(self, path: str, token: str, body: Any) -> dict[str, Any]:
        """POST ``body`` as JSON, which bytes are already, and return the JSON of the answer."""
        return self._result(path, await self._send_json("POST", path, _bearer(token), body))

    async def put(self, path: str, token: str, body: Any) -> dict[str, Any]:
        """PUT ``body`` as JSON and return the JSON of the answer."""
        return self._result(path, await self._send_json("PUT", path, _bearer(token), body))

    async def delete(self, path: str, token: str) -> None:
        """DELETE. The answer is empty."""
        answer = await self._request("DELETE", path, _bearer(token))
        if answer.status != HTTPStatus.NO_CONTENT:
            self._result(path, answer)

    async def _send_json(
        self, method: str, path: str, headers: dict[str, str], body: Any
    ) -> Answer:
        content = body if isinstance(body, bytes) else encode_json(body)
        return await self._request(
            method, path, {"Content-Type": "application/json"} | headers, content
        )

    async def _request(
        self, method: str, path: str, headers: dict[str, str], content: bytes | None = None
    ) -> Answer:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                async with self._http.stream(
                    method, self.url + path, headers=headers, content=content
                ) as response:
                    return await read_answer(self.url, response, MAX_ANSWER_BYTES)
        except TimeoutError:
            raise UnavailableError(f"{self.url} did not answer within {TIMEOUT_S:g} s") from None
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise UnavailableError(f"{self.url} can't be reached: {reason}") from error

    def _result(self, path: str, answer: Answer) -> dict[str, Any]:
        """Return the JSON, or raise the refusal. What stands between may answer anything."""
        status, detail = answer.status, answer.detail
        if status // 100 == 2:
            with suppress(msgspec.MsgspecError, ValueError, RecursionError):
                content: dict[str, Any] = msgspec.json.decode(answer.body)
                msgspec.convert(content, _answer_of(path))
                return content
        if detail is None:
            raise UnavailableError(answer.text)
        if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            raise AuthError(f"the token was refused ({status}): {detail}")
        kind = NotFoundError if status == HTTPStatus.NOT_FOUND else PokebridgeError
        raise kind(answer.text)


def _answer_of(path: str) -> type[msgspec.Struct]:
    return _ANSWERS["/v1/sessions" if path.startswith("/v1/sessions/") else path]


def encode_json(value: Any) -> bytes:
    """Encode ``value`` compactly.

    An argument of a command may hold lone surrogates, which UTF-8 can't encode. They are escaped,
    and the instance says what is wrong with them.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}
