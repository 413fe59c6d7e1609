"""What holds for every command: help, one line for an error, the exit status."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from pokebridge.cli import cli, main
from tests.cli.conftest import Result, Run
from tests.support import free_port
from tests.support.serving import POKEBRIDGE

SHORT = "hunter2"


def assert_one_line(result: Result, status: int, text: str) -> None:
    """The command said ``text`` on stderr, in one line, and nothing else."""
    assert result.out == ""
    assert result.err.startswith("pokebridge: ")
    assert result.err.count("\n") == 1
    assert text in result.err
    assert result.status == status


def commands() -> Iterator[tuple[list[str], click.Command]]:
    """Every command with the words that call it, those of groups too."""
    for name in cli.list_commands(click.Context(cli)):
        _, command, _ = cli.resolve_command(click.Context(cli), [name])
        assert command is not None
        for part, inner in getattr(command, "commands", {}).items():
            yield [name, part], inner
        yield [name], command


def test_every_command_has_help_with_an_example(run: Run) -> None:
    """And the list has them all."""
    for words, command in commands():
        shown = run(*words, "--help")
        assert shown.status == 0
        if not isinstance(command, click.Group):
            assert f"pokebridge {' '.join(words)}" in shown.out.partition("Example")[2]
            options = {option for item in command.params for option in item.opts}
            assert "--json" in options or words[0] in {"serve", "coordinator"}


def test_the_list_says_of_a_command_what_it_says_of_itself(run: Run) -> None:
    """Its own module, which has that line too, is not imported for the list."""
    listed = {tuple(line.split(None, 1)) for line in run("--help").out.splitlines()}
    for words, command in commands():
        if len(words) == 1:
            assert (words[0], command.short_help) in listed


def test_without_a_command_the_help_is_shown(run: Run) -> None:
    """It is still a usage error, so the help goes to stderr."""
    result = run()
    assert result.status == 2
    assert "Usage: pokebridge" in result.err


def test_the_version_is_shown(run: Run) -> None:
    """--version, for bug reports."""
    assert run("--version").out.startswith("pokebridge, version 0.")


def test_the_module_is_the_command() -> None:
    """It is python -m pokebridge, where the script is not on the PATH."""
    done = subprocess.run(
        [sys.executable, "-m", "pokebridge", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("pokebridge, version")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["fly"], "No such command 'fly'"),
        (["poke"], "Missing argument"),
        (["poke", "bob", "--what"], "No such option"),
        (["poke", "bob", "--url", "ftp://x"], "--url: must be an http:// or https:// URL"),
        (["poke", "bob", "--url", "127.0.0.1:8080"], "--url: must be an http:// or https:// URL"),
        (["poke", "bob", "--url", "http://"], "--url: must be an http:// or https:// URL"),
        (
            ["poke", "bob", "--url", "http://127.0.0.1:x"],
            "--url: a port must be a number",
        ),
        (["poke", "bob", "--token", "two words"], "--token: must be a JWT"),
        (["poke", "bob", "--config", "/no/such/file"], "config /no/such/file: No such file"),
        (["send", "bob", "x", "--ttl-s", "soon"], "--ttl-s"),
        (["send", "bob", "x", "--ttl-s", "-1"], "--ttl-s': -1.0 is not in the range"),
        (["send", "bob", "x", "--ttl-s", "nan"], "--ttl-s': 'nan' is not a finite number"),
        (["token", "bob", "--ttl-s", "inf"], "--ttl-s': 'inf' is not a finite number"),
        (["token", "bob", "--ttl-s", "1e400"], "--ttl-s': '1e400' is not a finite number"),
        (["bench", "--duration-s", "nan"], "--duration-s': 'nan' is not a finite number"),
        (["bench", "--pokes-per-s", "-1"], "--pokes-per-s"),
        (["cluster", "drain", "one", "--timeout", "nan"], "--timeout': 'nan' is not a finite"),
        (["listen", "bob", "--after", "9" * 400], "--after"),
        (["bench", "--clients", "0"], "--clients"),
        (["bench", "--clients", "100000000"], "--clients: at most"),
        (["bench", "--pokes-per-s", "1", "--messages-per-s", "1"], "exclude each other"),
        (["serve"], "jwt_secret"),
        (["serve", "--dev", "--port", "http"], "--port: must be a valid integer"),
        (["serve", "--dev", "--transport", "kafka://x"], "transport: must be memory://"),
        (["serve", "--dev", "--mailbox", "mysql://x"], "mailbox: must be sqlite:///FILE"),
        (
            ["serve", "--dev", "--mailbox", "sqlite:x.db"],
            "--mailbox: must be a URL, like memory://, sqlite:///FILE",
        ),
        (["serve", "--dev", "--mailbox", "sqlite:////no/such/dir/x.db"], "/no/such/dir"),
        (
            ["serve", "--dev", "--mode", "partitioned", "--transport", "nats://h:1"],
            "coordination must be a store that the instances share",
        ),
        (
            ["serve", "--dev", "--roles", "api,processor"],
            "transport must be an engine that the instances share",
        ),
        (["serve", "--dev", "--roles", "cook"], "--roles: must be 'gateway', 'api', 'processor'"),
    ],
)
def test_a_wrong_use_is_one_line_and_status_2(run: Run, args: list[str], text: str) -> None:
    """Whatever was asked for wrongly is named, and nothing is tried."""
    assert_one_line(run(*args), 2, text)


def test_a_defect_is_one_line_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line says where the defect is, and not the error's text, which may have a secret."""

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError(SHORT)

    monkeypatch.setattr(cli, "main", fail)
    with pytest.raises(SystemExit) as ended:
        main(["plan"])
    said = capsys.readouterr()
    assert_one_line(Result(1, said.out, said.err), 1, "ZeroDivisionError at test_main.py:")
    assert SHORT not in said.err
    assert ended.value.code == 1


def test_a_wrong_variable_is_one_line_and_status_2(run: Run) -> None:
    """Also for a command that only reads the secret, which it does not repeat."""
    result = run("poke", "bob", POKEBRIDGE_JWT_SECRET=SHORT)
    assert_one_line(result, 2, "POKEBRIDGE_JWT_SECRET: must have at least 32 bytes")
    assert SHORT not in result.err


@pytest.mark.parametrize(
    "args", [["poke", "bob"], ["send", "bob", "x"], ["bench", "--ramp-s", "0"]]
)
def test_a_refused_connection_is_one_line_and_status_1(run: Run, args: list[str]) -> None:
    """No server listens at the address."""
    url = f"http://127.0.0.1:{free_port()}"
    result = run(*args, "--url", url, POKEBRIDGE_JWT_SECRET="x" * 32)
    assert result.status == 1
    assert result.err.splitlines()[-1].startswith("pokebridge: ")
    assert "Traceback" not in result.err


def test_a_port_that_is_taken_is_one_line_and_status_2(run: Run) -> None:
    """It says which address it could not have."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", "--dev", "--port", str(port), "--mailbox", "memory://")
    assert result.status == 2
    assert f"127.0.0.1:{port}" in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "bridge.example"])
def test_dev_is_not_opened_to_the_network_by_accident(run: Run, host: str) -> None:
    """Anyone who connects would get tokens for everything, so it takes a second flag."""
    result = run("serve", "--dev", "--host", host, "--mailbox", "memory://")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "--dev-on-network" in result.err


def test_an_interrupt_is_quiet() -> None:
    """Ctrl-C while a command waits for an instance that does not answer: status 130, no words."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = subprocess.Popen(
            [POKEBRIDGE, "poke", "bob", "--url", url, "--token", "a.b.c"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        connection, _ = silent.accept()
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=10)
        connection.close()
    assert (process.returncode, out.strip()) == (130, "")


def test_a_closed_pipe_is_no_traceback() -> None:
    """`pokebridge … | head` may leave us without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [POKEBRIDGE, "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("args", "absent"),
    [
        ("['--version']", {"asyncio", "httpx", "pydantic", "pokebridge.cli.serve"}),
        ("['--help']", {"asyncio", "httpx", "pydantic", "pokebridge.cli.serve"}),
        ("['poke', '--help']", {"uvicorn", "websockets", "pokebridge.cli.serve"}),
        ("['serve', '--help']", {"uvicorn", "pokebridge.cli.bench"}),
    ],
)
def test_a_command_imports_no_more_than_it_needs(args: str, absent: set[str]) -> None:
    """A poke from a shell script should not wait for a web framework to be imported."""
    code = f"""
import atexit, sys, pokebridge.cli
atexit.register(lambda: print(*sys.modules, sep="\\n"))
pokebridge.cli.main({args})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.splitlines())
    assert "pokebridge.cli" in imported
    assert not imported & absent
