"""What several commands share: options, and what they make of the settings."""

import resource
from pathlib import Path

import click

from pokebridge.errors import ConfigError
from pokebridge.mailbox.base import Limits
from pokebridge.mailbox.pushes import PushTiming
from pokebridge.settings import Settings

# Descriptors that are not clients' sockets.
_RESERVED_DESCRIPTORS = 200

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


def allow_clients(clients: int) -> None:
    """Let this process open a socket for each of so many ``clients``.

    Raises :class:`~pokebridge.errors.ConfigError` when the machine does not.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    at_most = hard - _RESERVED_DESCRIPTORS
    if clients > at_most:
        raise ConfigError(f"--clients: at most {at_most}, by this machine's file limit, ulimit -Hn")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def push_timing(settings: Settings) -> PushTiming | None:
    """When pushes are due; ``None`` when nobody is to be told."""
    if settings.push_webhook_url is None:
        return None
    return PushTiming(grace_s=settings.push_grace_s, quiet_s=settings.push_quiet_s)
