"""The README does what it says: typed from top to bottom, it works; its tables are the code's."""

import re
import subprocess
import sys
from pathlib import Path

import click

from pokebridge.cli import cli
from tests.docs.blocks import ROOT, blocks
from tests.support import Serve
from tests.support.missing import require

PAGE = ROOT / "README.md"
README = PAGE.read_text()
DOCUMENTED_URL = "http://127.0.0.1:8080"
TIMEOUT_S = 120.0
# Blocks that the script leaves out: the server that runs already, and those that need a cluster.
NOT_TYPED = ("make run", "broker:4222", "cluster mode")
# The reader's other actions: open a terminal for each program that listens, and look at it.
BEGIN = """
set -eu
until_shown() {{ until "${{@:2}}" | grep -qF "$1"; do sleep 0.1; done; }}
trap 'kill $(jobs -p)' EXIT
export POKEBRIDGE_URL={url}
"""
LISTENING = """
({block}) > {name} 2>&1 &
until_shown 'pokebridge_sessions {sessions}.0' curl -sS $POKEBRIDGE_URL/metrics
"""


def _typed(url: str) -> str:
    """One script of all that the README says to type after ``make run``, in order."""
    script = [BEGIN.format(url=url)]
    files = iter(re.findall(r"^`(\w+\.py)`:$", README, re.MULTILINE))
    for block in blocks(PAGE):
        text = block.text.replace(DOCUMENTED_URL, url)
        if block.language == "python":
            script.append(f"cat > {next(files)} <<'END'\n{text}END\n")
        elif "pokebridge listen" in text:
            script.append(LISTENING.format(block=text, name="listen.txt", sessions=1))
        elif "listen.py" in text:
            script.append(LISTENING.format(block=text, name="client.txt", sessions=2))
        elif not any(each in text for each in NOT_TYPED):
            script.append(text)
    script.append("""until_shown '{"text": "hello"}' cat listen.txt\n""")
    script.append("""until_shown "urn:service:shop {'text': 'hello'}" cat client.txt\n""")
    return "".join(script)


def test_the_readme_typed_from_top_to_bottom(serve: Serve, tmp_path: Path) -> None:
    """In one shell on a fresh database, every block does what the README says.

    The terminal shows what it is sent, and Carol pulls her message. The client in Python shows the
    backend's.
    """
    require("curl")
    url = serve(mailbox="sqlite:///pokebridge.db").url  # what `make run` starts, on another port
    (tmp_path / ".venv").symlink_to(sys.prefix)
    typed = _typed(url)
    done = subprocess.run(
        ["bash", "-c", typed],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert '"body":{"text": "hello from curl"}' in told
    assert '{"accepted":1}' in told


def test_the_readme_is_short() -> None:
    """A newcomer reads it in two minutes: under 150 lines, and the settings are elsewhere."""
    assert len(README.splitlines()) < 150
    assert "| setting |" not in README


def test_the_commands_are_the_codes() -> None:
    """The table names every command, with the arguments that it takes, and no other."""
    rows = re.findall(r"^\| (`pokebridge .*?) \|", README, re.MULTILINE)
    documented = re.findall(r"`pokebridge (\w+)", " ".join(rows))
    assert sorted(set(documented)) == sorted(cli.list_commands(click.Context(cli)))


def test_the_contracts_commands_are_the_codes() -> None:
    """The commands are exactly those of the contract."""
    contract = (ROOT / "docs" / "protocol.md").read_text()
    _, commands = contract.split("## 6. Command line", 1)
    commands, _ = commands.split("## 7. From a checkout", 1)
    promised = {
        name
        for row in re.findall(r"^\| (`.*?) \|", commands, re.MULTILINE)
        for name in re.findall(r"`([a-z]+)[^`]*`", row)
    }
    assert promised == set(cli.list_commands(click.Context(cli)))
