"""The command ``pokebridge`` (protocol.md section 6).

What a command prints as its result goes to stdout; errors, progress and logs go to stderr. An
error is one line. Exit status: 0 success, 1 failure, 2 wrong usage, 130 interrupted.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

import click

from pokebridge.cli.options import printable
from pokebridge.errors import ConfigError, InputError, PokebridgeError

_FAILED = 1
_WRONG_USAGE = 2
_INTERRUPTED = 130  # 128 + SIGINT, as shells count


class _Lazy(click.Group):
    """Imports the module of a command when that command is run, so that each command starts fast.

    Until then a stub takes its place, with the text for the list of commands.
    """

    def add(self, name: str, short_help: str, *, module: str | None = None) -> None:
        """Add the command ``name`` of ``pokebridge.cli.<module>``, by default its own."""
        self.add_command(_Stub(name, module or name, short_help))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that click finds, loaded."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command.load() if isinstance(command, _Stub) else command, rest


class _Stub(click.Command):
    def __init__(self, name: str, module: str, short_help: str) -> None:
        super().__init__(name, short_help=short_help)
        self._module = f"{__name__}.{module}"

    def load(self) -> click.Command:
        command: click.Command = getattr(importlib.import_module(self._module), str(self.name))
        return command


@click.group(
    cls=_Lazy,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(version("pokebridge"), prog_name="pokebridge")
def cli() -> None:
    """Clients stop polling: they sleep on one WebSocket, receive a poke, and pull.

    Each command has --help with an example.
    """


cli.add("serve", "Run an instance.")
cli.add("poke", "Poke recipients.", module="publish")
cli.add("send", "Send a message.", module="publish")
cli.add("listen", "Show messages as they come.")
cli.add("token", "Sign a token.")
cli.add("sessions", "Show where a recipient is.")
cli.add("disconnect", "Close a recipient's sessions.", module="sessions")
cli.add("plan", "Compare the costs of the modes.")
cli.add("cluster", "Show a cluster and change it.")
cli.add("coordinator", "Run a coordinator alone.")
cli.add("mailbox", "Show what the mailbox holds, and delete from it.")
cli.add("janitor", "Delete subscriptions of dead instances.")
cli.add("bench", "Put load on an instance.")


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command with ``args`` and exit. By default the arguments are the process's."""
    try:
        status = cli.main(args, prog_name="pokebridge", standalone_mode=False) or 0
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        status = error.exit_code
    except click.ClickException as error:
        status = _complain(error.format_message(), error.exit_code)
    except (ConfigError, InputError) as error:
        status = _complain(str(error), _WRONG_USAGE)
    except PokebridgeError as error:
        status = _complain(str(error), _FAILED)
    except (click.Abort, KeyboardInterrupt):
        status = _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone, as with `| head`. Python flushes again at exit, which
        # would print another error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = _FAILED
    except Exception as error:  # noqa: BLE001 - the guard of this border
        # Imported here because it brings the log, which `--help` does not need.
        from pokebridge.border import describe_unforeseen  # noqa: PLC0415

        status = _complain(describe_unforeseen("cli", error), _FAILED)
    sys.exit(status)


def _complain(message: str, status: int) -> int:
    click.echo(f"pokebridge: {printable(' '.join(message.split()))}", err=True)
    return status
