"""``pokebridge serve``: run an instance."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
import uvloop
from pydantic.fields import FieldInfo

from pokebridge.cli.api import DEFAULT_URL
from pokebridge.cli.options import config_option
from pokebridge.settings import Settings, groups, load_settings
from pokebridge.telemetry import configure_logging

# A flag would show them to everyone who can list processes.
_NO_FLAGS = frozenset({"jwt_secret", "jwt_previous_secret", "push_webhook_secret"})

_Command = TypeVar("_Command", bound=Callable[..., Any])


def setting_options(*names: str) -> Callable[[_Command], _Command]:
    """One flag for each named setting. The values are checked by the settings, not by click."""

    def add(command: _Command) -> _Command:
        for name in reversed(names):
            command = _setting_option(name, Settings.model_fields[name])(command)
        return command

    return add


def _setting_option(name: str, field: FieldInfo) -> Callable[[_Command], _Command]:
    flag = f"--{name.replace('_', '-')}"
    if field.annotation is bool:
        return click.option(flag, is_flag=True, default=None, help=field.description)
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    value = f"{field.default:g}" if isinstance(field.default, float) else field.default
    default = f" [default: {value}]" if isinstance(value, (str, int)) else ""
    metavar = "|".join(choices) or "VALUE"
    return click.option(flag, metavar=metavar, help=f"{field.description}{default}")


class _Grouped(click.Command):
    """Shows its options by the groups of docs/settings.md."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One list for each group, and one for what is no setting."""
        left = {str(param.name): param.get_help_record(ctx) for param in self.get_params(ctx)}
        for title, names in groups().items():
            records = [record for name in names if (record := left.pop(name, None))]
            with formatter.section(title):
                formatter.write_dl(records)
        with formatter.section("Other options"):
            formatter.write_dl([record for record in left.values() if record])


@click.command(
    cls=_Grouped,
    epilog="Example: pokebridge serve --dev --port 8080",
    short_help="Run an instance.",
)
@config_option
@setting_options(*(name for name in Settings.model_fields if name not in _NO_FLAGS))
def serve(config: Path | None, **overrides: Any) -> None:
    """Run an instance until SIGTERM, then drain it and exit.

    Every setting is also a TOML key and an environment variable: --shard-count is shard_count and
    POKEBRIDGE_SHARD_COUNT. A flag beats the environment, which beats the file. The secrets
    jwt_secret, jwt_previous_secret and push_webhook_secret have no flag. docs/settings.md lists
    all settings by topic.
    """
    run_instance(load_settings(config, overrides))


def run_instance(settings: Settings) -> None:
    """Run an instance with ``settings`` until SIGTERM."""
    # The server takes half a second to import, and `serve --help` does not need it.
    from pokebridge.server.assemble import serve as serve_instance  # noqa: PLC0415

    configure_logging(settings.log_format, settings.log_level)
    if settings.dev and settings.log_format == "console":  # JSON is for programs
        uvloop.run(serve_instance(settings, on_listening=_greet))
    else:
        uvloop.run(serve_instance(settings))


def _greet(url: str) -> None:
    """Tell a person at a terminal where to go from here."""
    command, at = sys.argv[0], "" if url == DEFAULT_URL else f" --url {url}"
    click.echo(
        f"""
pokebridge runs in development mode. Ctrl-C stops it.

  page      {url}/
  console   {url}/console
  API       {url}/docs
  listen    {command} listen urn:user:bob{at}
  send      {command} send urn:user:bob '{{"text": "hello"}}'{at}
""",
        err=True,
    )
