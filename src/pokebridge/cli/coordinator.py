"""``pokebridge coordinator``: a coordinator alone, as a separate service."""

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
    short_help="Run a coordinator alone.",
)
@config_option
@setting_options(*_SETTINGS)
def coordinator(config: Path | None, **overrides: Any) -> None:
    """Assign shards to instances, and do nothing else.

    Normally the instances elect a coordinator among themselves. To run it as a separate service,
    use this command, and start the instances with --roles gateway,api,processor. Run two or more:
    one leads and the others stand by. A coordinator needs no transport, mailbox or secret, and
    serves /healthz, /readyz and /metrics.
    """
    run_instance(load_settings(config, overrides | {"roles": "coordinator"}))
