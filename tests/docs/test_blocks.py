"""Every block of every page runs as it stands, or is at least valid where it can't run here.

The README is typed from top to bottom in ``test_readme.py``; JavaScript runs in
``tests/js/test_docs.py``.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import yaml

from pokebridge.cli import cli
from pokebridge.errors import ConfigError
from pokebridge.settings import load_settings
from tests.docs.blocks import ROOT, Block, Command, all_blocks, blocks, commands, pages
from tests.support import Serve, block_until
from tests.support.daemon import Daemon
from tests.support.serving import JWT_SECRET

# Each is checked here or in tests/js; "" shows what a terminal prints, "calc" is an arithmetic.
LANGUAGES = {"", "calc", "go", "html", "js", "json", "jsx", "php", "python", "sh", "toml", "yaml"}
# The pages whose blocks a test runs by name. No test runs such a block on another page.
RUN_BY_NAME = {
    "calc": {"docs/redline.md"},
    "go": {"docs/backend.md"},
    "html": {"docs/javascript.md", "docs/tutorial.md"},
    "js": {"clients/js/README.md", "docs/backend.md", "docs/javascript.md", "docs/tutorial.md"},
    "jsx": {"docs/javascript.md"},
    "php": {"docs/backend.md"},
}


def _title(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _resolved(arguments: list[str]) -> tuple[click.Command, str, list[str]]:
    """The command that ``arguments`` name, its name, and what is left of them."""
    command: click.Command = cli
    name, context = "pokebridge", click.Context(cli)
    while isinstance(command, click.Group):
        found, command_or_none, arguments = command.resolve_command(context, arguments)
        assert command_or_none is not None
        command, name = command_or_none, str(found)
    return command, name, arguments


def _check(command: Command) -> None:
    """Parse the command as the program would, and its settings, if it takes any."""
    parser, name, rest = _resolved(list(command.arguments))
    # Without the parent its help would have no -h, and the help is cached for later tests.
    parent = click.Context(cli, **cli.context_settings)
    parsed = parser.make_context(name, rest, parent=parent).params
    if name in {"serve", "coordinator"}:
        roles = {"roles": "coordinator"} if name == "coordinator" else {}
        load_settings(parsed.pop("config"), parsed | roles, command.variables)


@pytest.mark.parametrize("page", pages(), ids=_title)
def test_commands_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ``pokebridge`` line has arguments that exist, and settings that would start."""
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        if block.language == "toml":
            Path("pokebridge.toml").write_text(block.text)
    problems = []
    for command in commands(page):
        try:
            _check(command)
        except (click.ClickException, ConfigError) as error:
            problems.append(f"pokebridge {' '.join(command.arguments)}: {error}")
    assert not problems


@pytest.mark.parametrize("page", pages(), ids=_title)
def test_commands_in_sentences_exist(page: Path) -> None:
    """A command that is named in a sentence exists, and so does each of its flags."""
    for span in re.findall(r"`pokebridge ([a-z][^`\n]*)`", page.read_text()):
        words = span.replace("\\|", " ").split()
        command: click.Command = cli
        while isinstance(command, click.Group) and words and not words[0].startswith("--"):
            _, found, words = command.resolve_command(click.Context(cli), words)
            assert found is not None, span
            command = found
        flags = {flag for option in command.params for flag in option.opts} | {"--help"}
        assert {word for word in words if word.startswith("--")} <= flags, span


def test_the_check_refuses_what_would_not_start() -> None:
    """The tests above notice a flag, a command and a secret that are missing, and an ellipsis."""
    for arguments in (
        ["serve", "--transport", "pubsub://my-project/push-notifications"],
        ["serve", "…", "--dev"],
        ["serve", "--dev", "--shard-counts", "3"],
        ["sessionz", "urn:user:bob"],
    ):
        with pytest.raises((click.ClickException, ConfigError)):
            _check(Command(Path("page.md"), tuple(arguments), {}))


@pytest.mark.parametrize("page", pages(), ids=_title)
def test_blocks_are_valid(page: Path) -> None:
    """Each block has a language that is checked, and is well-formed in it."""
    for block in blocks(page):
        assert block.language in LANGUAGES, block.text
        _parse(block)


def test_no_program_is_only_shown() -> None:
    """A block in a language that a test runs is on a page whose blocks one runs."""
    shown = {
        (language, _title(each.page)) for language in RUN_BY_NAME for each in all_blocks(language)
    }
    assert shown == {(language, page) for language, pages in RUN_BY_NAME.items() for page in pages}


def _parse(block: Block) -> None:
    if block.language == "python":
        ast.parse(block.text)
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "yaml":
        list(yaml.safe_load_all(block.text))
    elif block.language == "toml":
        tomllib.loads(block.text)
    elif block.language == "sh":
        subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)


def test_programs_run(serve: Serve, nats_server: Daemon, tmp_path: Path) -> None:
    """Every Python program ends well, or shows the message that comes."""
    instance = serve()
    programs = [block for block in all_blocks("python") if "asyncio.run(" in block.text]
    assert programs

    def start(number: int, block: Block) -> tuple[subprocess.Popen[bytes], Path]:
        recipient = f"urn:user:reader-{number}"
        text = block.text.replace("http://127.0.0.1:8080", instance.url)
        source, printed = tmp_path / f"program_{number}.py", tmp_path / f"{number}.txt"
        source.write_text(text.replace("nats://127.0.0.1:4222", nats_server.url))
        environ = os.environ | {
            "POKEBRIDGE_JWT_SECRET": JWT_SECRET,
            "POKEBRIDGE_TOKEN": instance.token(recipient, "send poke admin"),
            "OTEL_TRACES_SAMPLER": "always_off",  # no collector runs
        }
        with printed.open("w") as output, instance.http("urn:user:alice", "send") as http:
            message = {"recipient": recipient, "body": {"text": "hello"}}
            http.post("/v1/messages", json=message).raise_for_status()
            command = [sys.executable, str(source)]
            return subprocess.Popen(command, env=environ, stdout=output, stderr=output), printed

    running = [start(number, block) for number, block in enumerate(programs)]
    try:
        for block, (process, printed) in zip(programs, running, strict=True):
            _wait_for_a_sign(process, printed)
            assert process.poll() in {None, 0}, f"{block.text}\n{printed.read_text()}"
    finally:
        for process, _ in running:
            process.kill()
            process.wait()


def _wait_for_a_sign(process: subprocess.Popen[bytes], printed: Path) -> None:
    def is_there() -> bool:
        return process.poll() is not None or "hello" in printed.read_text()

    block_until(is_there, what="the end of a program, or a message that it shows")
