"""The HTTP API as the commands use it: where it is, with which token, and its errors in a line."""

import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import click
import httpx

from pokebridge.cli.options import config_option
from pokebridge.errors import AuthError, ConfigError, PokebridgeError, UnavailableError
from pokebridge.settings import load_settings
from pokebridge.tokens import sign_token

TIMEOUT_S = 30.0

Sign = Callable[[str, Iterable[str], float], str]
"""Makes a token from a subject, scopes and a time to live in seconds."""

_Command = TypeVar("_Command", bound=Callable[..., Any])

_url_option = click.option(
    "--url",
    envvar="POKEBRIDGE_URL",
    default="http://127.0.0.1:8080",
    show_default=True,
    help="The instance's address; POKEBRIDGE_URL does the same.",
)
token_option = click.option(
    "--token",
    envvar="POKEBRIDGE_TOKEN",
    help="Token to use; POKEBRIDGE_TOKEN does the same. Without one it is signed with the"
    " configured jwt_secret, or asked of a --dev instance.",
)


def api_options(*, token: bool = True) -> Callable[[_Command], _Command]:
    """The options that say where the API is and with which token: the fields of :class:`Access`."""

    def add(command: _Command) -> _Command:
        command = config_option(command)
        if token:
            command = token_option(command)
        return _url_option(command)

    return add


def configured_signer(config: Path | None) -> Sign | None:
    """Signs with the configured ``jwt_secret``; ``None`` when there is none."""
    # A command needs no secret of its own, and with dev none is demanded. The one that dev makes
    # up is of no use here.
    settings = load_settings(config, {"dev": True})
    secret = settings.jwt_secret
    if secret is None or "jwt_secret" not in settings.model_fields_set:
        return None

    def sign(subject: str, scopes: Iterable[str], ttl_s: float) -> str:
        return sign_token(
            secret.get_secret_value(),
            subject,
            scopes,
            ttl_s,
            issuer=settings.jwt_issuer,
            audience=settings.jwt_audience,
        )

    return sign


@dataclass(frozen=True, slots=True)
class Access:
    """How to reach an instance."""

    url: str
    config: Path | None
    token: str | None = None


class Api:
    """The HTTP API at ``url``. Close it (``async with``).

    Every call raises a :class:`~pokebridge.errors.PokebridgeError` that fits on a line: the
    instance can't be reached, refuses, or is no instance of ours.
    """

    def __init__(self, access: Access) -> None:
        try:
            url = httpx.URL(access.url)
        except httpx.InvalidURL:
            url = httpx.URL()
        if url.scheme not in {"http", "https"} or not url.host:
            raise ConfigError("--url: must be an http:// or https:// URL")
        self.url = str(url).rstrip("/")
        if access.token is not None and re.fullmatch(r"[\w.-]+", access.token, re.ASCII) is None:
            raise ConfigError("--token: must be a JWT")
        self._given_token = access.token
        self._sign = configured_signer(access.config) if access.token is None else None
        self._http = httpx.AsyncClient(timeout=TIMEOUT_S)

    async def __aenter__(self) -> Self:
        """Nothing to open: the first call does."""
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
        """The token that was given, or one for ``subject``: signed here, or by a --dev instance."""
        if self._given_token is not None:
            return self._given_token
        if self._sign is not None:
            return self._sign(subject, scopes, ttl_s)
        body = {"sub": subject, "scope": " ".join(scopes), "ttl_s": ttl_s}
        response = await self._send("POST", "/v1/dev/token", body, {})
        if response.status_code == HTTPStatus.NOT_FOUND:
            raise ConfigError(
                "no token: give --token, or configure jwt_secret (POKEBRIDGE_JWT_SECRET);"
                f" {self.url} hands none out, for it does not run with --dev"
            )
        return str(self._result(response)["token"])

    async def post(self, path: str, token: str, body: Any) -> dict[str, Any]:
        """POST ``body`` as JSON and return the answer's."""
        return await self.send("POST", path, token, body)

    async def send(self, method: str, path: str, token: str, body: Any) -> dict[str, Any]:
        """Send ``body`` as JSON and return the answer's."""
        headers = {"Authorization": f"Bearer {token}"}
        return self._result(await self._send(method, path, body, headers))

    async def get(self, path: str, token: str) -> dict[str, Any]:
        """GET and return the answer's JSON."""
        headers = {"Authorization": f"Bearer {token}"}
        return self._result(await self._request("GET", path, headers))

    async def _send(
        self, method: str, path: str, body: Any, headers: dict[str, str]
    ) -> httpx.Response:
        # ASCII, so that no text is beyond it: an argument may hold lone surrogates.
        content = json.dumps(body).encode("ascii")
        headers = {"Content-Type": "application/json"} | headers
        return await self._request(method, path, headers, content)

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
