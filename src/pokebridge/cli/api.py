"""How a command reaches the HTTP API: its options, and the client built from them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from pokebridge.api_client import ApiClient
from pokebridge.cli.options import config_option
from pokebridge.server.token_keys import token_signer
from pokebridge.settings import load_settings
from pokebridge.tokens import SignToken

SUBJECT = "urn:pokebridge:cli"
"""The subject of a token that a command makes for itself."""

DEFAULT_URL = "http://127.0.0.1:8080"

_Command = TypeVar("_Command", bound=Callable[..., Any])

_url_option = click.option(
    "--url",
    envvar="POKEBRIDGE_URL",
    default=DEFAULT_URL,
    show_default=True,
    help="Address of the instance. Variable: POKEBRIDGE_URL.",
)
token_option = click.option(
    "--token",
    envvar="POKEBRIDGE_TOKEN",
    help="Token to use. Variable: POKEBRIDGE_TOKEN. Without one the command signs a token with the"
    " configured jwt_secret, or asks a --dev instance for one.",
)


def api_options(*, token: bool = True) -> Callable[[_Command], _Command]:
    """The options for the API's address and the token: the fields of :class:`Access`."""

    def add(command: _Command) -> _Command:
        command = config_option(command)
        if token:
            command = token_option(command)
        return _url_option(command)

    return add


def configured_signer(config: Path | None) -> SignToken | None:
    """Return what signs with the configured ``jwt_secret``; ``None`` when there is no secret."""
    # A command needs no secret, and with dev none is required. The random one that dev makes is of
    # no use here.
    settings = load_settings(config, {"dev": True})
    return token_signer(settings) if "jwt_secret" in settings.model_fields_set else None


@dataclass(frozen=True, slots=True)
class Access:
    """How to reach an instance."""

    url: str
    config: Path | None
    token: str | None = None

    def open(self) -> ApiClient:
        """A client of that instance. It signs with the configured secret when it has no token."""
        sign = configured_signer(self.config) if self.token is None else None
        return ApiClient(self.url, self.token, sign)
