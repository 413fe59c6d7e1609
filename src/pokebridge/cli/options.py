"""Options that several commands share."""

import math
import resource
from pathlib import Path
from typing import Any

import click

from pokebridge.errors import ConfigError

# Descriptors that are not clients' sockets.
_RESERVED_DESCRIPTORS = 200

config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="TOML file with settings. Variable: POKEBRIDGE_CONFIG.",
)


def counted(number: int, what: str) -> str:
    """So many of ``what``, as people write it: ``1 message``, ``1,200 messages``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def age(seconds: float) -> str:
    """A duration in its largest unit."""
    for size_s, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size_s:
            return f"{seconds // size_s:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class Number(click.FloatRange):
    """A finite number, which may have limits."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Convert as click does, but refuse ``inf`` and ``nan``, and say so."""
        number = float(click.FLOAT.convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return float(super().convert(value, param, ctx))


def printable(text: str) -> str:
    """Return ``text``, which strangers may have written, without what moves a cursor."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def allow_clients(clients: int) -> None:
    """Raise this process's file limit so that it can open a socket for each of the ``clients``.

    Raises :class:`~pokebridge.errors.ConfigError` when the machine's limit is too low.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    at_most = hard - _RESERVED_DESCRIPTORS
    if clients > at_most:
        raise ConfigError(
            f"--clients: at most {at_most}, because of this machine's file limit (ulimit -Hn)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
