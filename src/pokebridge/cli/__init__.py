"""The command ``pokebridge`` (protocol.md section 6).

What a command prints as its result goes to stdout; errors, progress and logs go to stderr. An
error is one line. Exit status: 0 done, 1 it failed, 2 it was asked for wrongly, 130 interrupted.
"""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

import click

from pokebridge.cli.bench import bench
from pokebridge.cli.cluster import cluster
from pokebridge.cli.coordinator import coordinator
from pokebridge.cli.janitor import janitor
from pokebridge.cli.listen import listen
from pokebridge.cli.plan import plan
from pokebridge.cli.publish import poke, send
from pokebridge.cli.serve import serve
from pokebridge.cli.token import token
from pokebridge.errors import ConfigError, InputError, PokebridgeError

_FAILED = 1
_ASKED_WRONGLY = 2
_INTERRUPTED = 130  # 128 + SIGINT, as shells count


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(version("pokebridge"), prog_name="pokebridge")
def cli() -> None:
    """Clients stop polling: they sleep on one WebSocket, hear a poke, and pull.

    Each command has --help with an example.
    """


for _command in (serve, poke, send, listen, token, plan, cluster, coordinator, janitor, bench):
    cli.add_command(_command)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command with ``args``, the process's own by default, and exit."""
    try:
        status = cli.main(args, prog_name="pokebridge", standalone_mode=False) or 0
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        status = error.exit_code
    except click.ClickException as error:
        status = _complain(error.format_message(), error.exit_code)
    except (ConfigError, InputError) as error:
        status = _complain(str(error), _ASKED_WRONGLY)
    except PokebridgeError as error:
        status = _complain(str(error), _FAILED)
    except (click.Abort, KeyboardInterrupt):
        status = _INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output is gone, as with `| head`; Python's own flush at exit would
        # complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = _FAILED
    sys.exit(status)


def _complain(message: str, status: int) -> int:
    click.echo(f"pokebridge: {' '.join(message.split())}", err=True)
    return status
