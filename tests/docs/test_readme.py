"""The README does what it says: its snippets run as they stand, its tables are the code's."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryFile
from typing import IO

import click
import pytest

from pokebridge.cli import cli
from tests.support import Instance, Serve, block_until
from tests.support.missing import require

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTED_URL = "http://127.0.0.1:8080"
SNIPPET_TIMEOUT_S = 60.0


@pytest.fixture
def instance(serve: Serve) -> Instance:
    """What ``make run`` starts, on another port."""
    return serve(mailbox="sqlite:///pokebridge.db")


def _snippet(language: str, containing: str) -> str:
    """The one fenced block of ``language`` that has ``containing`` in it."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if containing in block]
    assert isinstance(block, str)
    return block


def _shell(script: str) -> list[str]:
    """Run as a reader would type it, whichever environment the tests run in."""
    return ["bash", "-euc", script.replace(".venv/bin/", f"{Path(sys.executable).parent}/")]


def _start(
    command: list[str], instance: Instance, output: IO[str], **variables: str
) -> subprocess.Popen[str]:
    """Start a snippet in the checkout's root, against ``instance``."""
    return subprocess.Popen(
        [part.replace(DOCUMENTED_URL, instance.url) for part in command],
        cwd=ROOT,
        env=os.environ | {"POKEBRIDGE_URL": instance.url, **variables},
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _run(command: list[str], instance: Instance, **variables: str) -> str:
    """Run a snippet to its end and return its output."""
    with TemporaryFile("w+") as output:
        status = _start(command, instance, output, **variables).wait(SNIPPET_TIMEOUT_S)
        output.seek(0)
        text = output.read()
    assert status == 0, text
    return text


@contextmanager
def _running(
    command: list[str], instance: Instance, **variables: str
) -> Iterator[Callable[[], str]]:
    """Run a snippet that has no end; yields what returns its output so far."""
    with NamedTemporaryFile("w+") as output:
        process = _start(command, instance, output, **variables)
        try:
            yield Path(output.name).read_text
        finally:
            process.kill()
            process.wait()


def test_the_curl_calls_work(instance: Instance) -> None:
    """Alice sends, Carol pulls and acknowledges, and a poke is accepted."""
    require("curl")
    output = _run(_shell(_snippet("sh", "curl")), instance)
    decoder, answers = json.JSONDecoder(), []
    while output := output.strip():
        answer, end = decoder.raw_decode(output)
        answers.append(answer)
        output = output[end:]
    sent, pulled, poked = answers
    assert sent["version"] == 1
    assert [message["body"] for message in pulled["messages"]] == [{"text": "hello from curl"}]
    assert poked == {"accepted": 1}
    with instance.http("urn:user:carol") as http:
        assert http.get("/v1/messages").json()["messages"] == []


def test_listening_in_the_terminal_shows_what_is_sent(instance: Instance) -> None:
    """What one terminal sends, the other shows."""
    with _running(_shell(_snippet("sh", "pokebridge listen")), instance) as output:
        block_until(lambda: "ready" in output(), what="the listener's ready")
        _run(_shell(_snippet("sh", "pokebridge send")), instance)
        block_until(lambda: '{"text": "hello"}' in output(), what="the message")


def test_the_client_listens(instance: Instance) -> None:
    """The client's example shows a message that was there before it, and one sent after."""
    send = _shell(_snippet("sh", "pokebridge send"))
    _run(send, instance)
    script = [sys.executable, "-c", _snippet("python", "PokeClient")]
    with _running(script, instance, POKEBRIDGE_TOKEN=instance.token("urn:user:bob")) as output:
        block_until(lambda: "1 urn:pokebridge:cli {'text': 'hello'}" in output())
        _run(send, instance)
        block_until(lambda: "2 urn:pokebridge:cli {'text': 'hello'}" in output())


def test_the_backend_sends(instance: Instance) -> None:
    """The publisher's example commits its message, and gets both pokes onto the transport."""
    token = instance.token("urn:service:shop", "send poke")
    _run(
        [sys.executable, "-c", _snippet("python", "HttpPublisher")],
        instance,
        POKEBRIDGE_TOKEN=token,
    )
    with instance.http() as http:
        block_until(lambda: "\npokebridge_pokes_total 2.0\n" in http.get("/metrics").text)


def test_the_readme_is_short() -> None:
    """A newcomer reads it in two minutes: under 150 lines, and the settings are elsewhere."""
    assert len(README.splitlines()) < 150
    assert "| setting |" not in README


def test_the_commands_are_the_codes() -> None:
    """The table names every command, with the arguments that it takes, and no other."""
    documented = re.findall(r"^\| `pokebridge (\w+)[^`]*` \|", README, re.MULTILINE)
    assert sorted(set(documented)) == sorted(cli.list_commands(click.Context(cli)))


def test_the_contracts_commands_are_the_codes() -> None:
    """Every command of the contract exists, and there is no other."""
    contract = (ROOT / "docs" / "protocol.md").read_text()
    _, commands = contract.split("## 6. Command line", 1)
    commands, _ = commands.split("## 7. From a checkout", 1)
    promised = {
        name
        for row in re.findall(r"^\| (`.*?) \|", commands, re.MULTILINE)
        for name in re.findall(r"`([a-z]+)[^`]*`", row)
    }
    assert promised == set(cli.list_commands(click.Context(cli)))
