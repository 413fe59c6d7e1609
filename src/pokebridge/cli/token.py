"""``pokebridge token``: sign a token."""

import json
from pathlib import Path

import click

from pokebridge.cli.api import configured_signer
from pokebridge.cli.options import config_option, json_option
from pokebridge.errors import ConfigError


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
    type=click.FloatRange(min=0, min_open=True),
    default=3600,
    show_default=True,
    help="Seconds until the token expires.",
)
@config_option
@json_option
def token(recipient: str, scope: str, ttl_s: float, config: Path | None, *, as_json: bool) -> None:
    """Sign a token for RECIPIENT with the configured jwt_secret."""
    sign = configured_signer(config)
    if sign is None:
        raise ConfigError(
            "jwt_secret is not configured: set POKEBRIDGE_JWT_SECRET, or use --config"
        )
    signed = sign(recipient, scope.split(), ttl_s)
    click.echo(json.dumps({"token": signed}) if as_json else signed)
