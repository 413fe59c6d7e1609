"""What several commands share: options, and what they make of the settings."""

from pathlib import Path

import click

from pokebridge.mailbox.base import Limits
from pokebridge.settings import Settings

config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="TOML file with settings; POKEBRIDGE_CONFIG does the same.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def mailbox_limits(settings: Settings) -> Limits:
    """The mailbox's limits as the settings have them."""
    return Limits(
        max_messages=settings.max_messages_per_recipient,
        max_bytes=settings.max_bytes_per_recipient,
        forget_device_s=settings.forget_device_days * 24 * 3600,
    )
