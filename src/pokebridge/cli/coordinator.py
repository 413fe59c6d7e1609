"""``pokebridge coordinator``: the Coordinator alone, as a service of its own."""

from pathlib import Path
from typing import Any

import click

from pokebridge.cli.options import config_option
from pokebridge.cli.serve import run_instance, setting_options
from pokebridge.settings import load_settings

_SETTINGS = (
    "coordination",
    "cluster",
    "shard_count",
    "mode",
    "lease_s",
    "instance",
    "host",
    "port",
    "log_format",
    "log_level",
)


@click.command(
    epilog="Example: pokebridge coordinator --coordination nats://localhost:4222",
    short_help="Run a Coordinator alone.",
)
@config_option
@setting_options(*_SETTINGS)
def coordinator(config: Path | None, **overrides: Any) -> None:
    """Plan which instance owns which shard, and do nothing else.

    Instances elect one among themselves; run this when that is to be kept apart, and start them
    with --roles gateway,api,processor then. Two or more stand by for each other. It needs no
    transport, mailbox or secret, and answers /healthz, /readyz and /metrics.
    """
    run_instance(load_settings(config, overrides | {"roles": "coordinator"}))
