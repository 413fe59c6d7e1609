"""A small client of the HTTP API, for the commands and the load generators.

Every failure is a :class:`~pokebridge.errors.PokebridgeError` whose text fits on a line.
"""

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self

import httpx

from pokebridge.errors import AuthError, ConfigError, PokebridgeError, UnavailableError
from pokebridge.tokens import SignToken

TIMEOUT_S = 30.0


class ApiClient:
    """The HTTP API of the instance at ``url``. Close it (``async with``).

    Args:
        url: the instance's address, http:// or https://.
        token: the token of every call. Without one, :meth:`token_for` makes one.
        sign: makes tokens. Without it, a --dev instance is asked for them.

    Raises:
        ConfigError: ``url`` is no HTTP URL, or ``token`` is no JWT.
    """

    def __init__(self, url: str, token: str | None = None, sign: SignToken | None = None) -> None:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            parsed = httpx.URL()
        if parsed.scheme not in {"http", "https"} or not parsed.host:
            raise ConfigError("--url: must be an http:// or https:// URL")
        if token is not None and re.fullmatch(r"[\w.-]+", token, re.ASCII) is None:
            raise ConfigError("--token: must be a JWT")
        self.url = str(parsed).rstrip("/")
        self._token = token
        self._sign = sign
        self._http = httpx.AsyncClient(timeout=TIMEOUT_S)

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
        response = await self._send_json("POST", "/v1/dev/token", {}, body)
        if response.status_code == HTTPStatus.NOT_FOUND:
            raise ConfigError(
                "no token: give --token, or configure jwt_secret (POKEBRIDGE_JWT_SECRET);"
                f" {self.url} hands none out, for it does not run with --dev"
            )
        return str(self._result(response)["token"])

    async def get(self, path: str, token: str) -> dict[str, Any]:
        """GET and return the JSON of the answer."""
        return self._result(await self._request("GET", path, _bearer(token)))

    async def post(self, path: str, token: str, body: Any) -> dict[str, Any]:
        """POST ``body`` as JSON and return the JSON of the answer."""
        return self._result(await self._send_json("POST", path, _bearer(token), body))

    async def put(self, path: str, token: str, body: Any) -> dict[str, Any]:
        """PUT ``body`` as JSON and return the JSON of the answer."""
        return self._result(await self._send_json("PUT", path, _bearer(token), body))

    async def _send_json(
        self, method: str, path: str, headers: dict[str, str], body: Any
    ) -> httpx.Response:
        # ASCII, because an argument of a command may hold lone surrogates, which UTF-8 refuses.
        content = json.dumps(body).encode("ascii")
        return await self._request(
            method, path, {"Content-Type": "application/json"} | headers, content
        )

    async def _request(
        self, method: str, path: str, headers: dict[str, str], content: bytes | None = None
    ) -> httpx.Response:
        try:
            return await self._http.request(
                method, self.url + path, headers=headers, content=content
            )
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise UnavailableError(f"{self.url} can't be reached: {reason}") from error

    def _result(self, response: httpx.Response) -> dict[str, Any]:
        answer: Any = None
        with suppress(ValueError):
            answer = json.loads(response.content)
        if response.is_success and isinstance(answer, dict):
            return answer
        detail = answer.get("detail") if isinstance(answer, dict) else None
        if detail is None:
            raise UnavailableError(
                f"{self.url} answered {response.status_code}, but not as an instance of pokebridge"
            )
        if response.status_code in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            raise AuthError(f"the token was refused ({response.status_code}): {detail}")
        raise PokebridgeError(f"{self.url} answered {response.status_code}: {detail}")


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}
