"""``pokebridge token``: sign a token."""

import asyncio
import json
from typing import Any

import click

from pokebridge.cli.api import Access, api_options, configured_signer
from pokebridge.cli.options import Number, json_option
from pokebridge.errors import ConfigError, UnavailableError


@click.command(
    epilog="Example: pokebridge token urn:user:bob --scope 'send poke' --ttl-s 600",
    short_help="Sign a token.",
)
@click.argument("recipient")
@click.option(
    "--scope", default="", help="What the token allows: send, poke, admin; separated by spaces."
)
@click.option(
    "--ttl-s",
    type=Number(min=0, min_open=True),
    default=3600,
    show_default=True,
    help="Seconds until the token expires.",
)
@api_options(token=False)
@json_option
def token(recipient: str, scope: str, ttl_s: float, *, as_json: bool, **access: Any) -> None:
    """Sign a token for RECIPIENT with the configured jwt_secret.

    Without a jwt_secret the command asks the instance at --url, which must run with --dev.
    """
    reach = Access(**access)
    sign = configured_signer(reach.config)
    scopes = scope.split()
    if sign is None:
        signed = asyncio.run(_ask(reach, recipient, scopes, ttl_s))
    else:
        signed = sign(recipient, scopes, ttl_s)
    click.echo(json.dumps({"token": signed}) if as_json else signed)


async def _ask(access: Access, recipient: str, scopes: list[str], ttl_s: float) -> str:
    async with access.open() as api:
        try:
            return await api.token_for(recipient, scopes, ttl_s)
        except UnavailableError as error:
            raise ConfigError(
                "jwt_secret is not configured: set POKEBRIDGE_JWT_SECRET, use --config, or give"
                f" the --url of a --dev instance ({error})"
            ) from None
