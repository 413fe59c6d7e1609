"""A checkout in which a reader types the commands of a README, as they stand."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tests.docs.blocks import ROOT, blocks
from tests.support import block_until, free_port

# The text that shows that a server is ready. Every other command ends by itself.
SERVES = {
    "make run": "Ctrl-C stops it",
    "pokebridge serve": "Ctrl-C stops it",
    "uvicorn": "Uvicorn running on",
    "http.server": "Serving HTTP on",
    "watch.py": "",
    "npm start": "connected",
    "npm run dev": "Local:",
    "run.py": "Ctrl-C stops it",
}
WITH_PORTS = {".html", ".js", ".jsx", ".md", ".mjs", ".py", ""}
FOREIGN = ("MAKE", "MFLAGS", "PUBSUB_", "PYTEST_")
LIMIT_S = 400.0  # for what hangs: npm fetches what is not in its cache


class Terminal:
    """A server that runs until Ctrl-C, in a process group of its own, as a terminal's jobs do."""

    def __init__(
        self,
        command: str,
        shell: list[str],
        *,
        directory: Path,
        env: Mapping[str, str],
        log: Path,
    ) -> None:
        self.command = command
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                shell,
                cwd=directory,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def shown(self) -> str:
        """All that it shows."""
        return self._log.read_text(errors="replace")

    def wait_for(self, text: str) -> None:
        """Wait until it shows ``text``; fail when the server ends before."""

        def is_shown() -> bool:
            assert self._process.poll() is None, f"{self.command} ended:\n{self.shown()}"
            return text in self.shown()

        try:
            block_until(is_shown, LIMIT_S)
        except TimeoutError:
            raise AssertionError(f"{self.command} never showed {text!r}:\n{self.shown()}") from None

    def interrupt(self) -> None:
        """Press Ctrl-C, and wait until everything has ended that was started here."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGINT)
        try:
            block_until(self._has_ended, LIMIT_S, f"the end of {self.command}")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _has_ended(self) -> bool:
        self._process.poll()  # a zombie is a member of its group
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return True
        return False


class Checkout:
    """A copy of what git tracks, and the terminals of somebody who tries an example in it.

    Attributes:
        path: its root.
        bridge: the URL that the READMEs call ``http://127.0.0.1:8080``.
        app: the URL that they call ``http://127.0.0.1:8000``.

    Other ports than the READMEs' are in all files of the copy, since others may listen on those.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        ports = {"8080": free_port(), "8000": free_port(), "8081": _three_free_ports()}
        self._ports = {name: str(port) for name, port in ports.items()}
        self.bridge = f"http://127.0.0.1:{ports['8080']}"
        self.app = f"http://127.0.0.1:{ports['8000']}"
        self._terminals: list[Terminal] = []
        self._env = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
        self._env |= {"POKEBRIDGE_URL": self.bridge, "POKEBRIDGE_PORT": self._ports["8080"]}
        self._env["PYTHONUNBUFFERED"] = "1"  # as in a terminal
        self._exported = path.with_name("exported.sh")
        self._exported.touch()
        self._copy()

    def commands(self, example: str) -> list[str]:
        """The lines that the README says to type, in order."""
        page = self.path / "examples" / example / "README.md"
        scripts = [block.text for block in blocks(page) if block.language == "sh"]
        return [line for script in scripts for line in script.splitlines()]

    def type_all(self, example: str) -> None:
        """Type all of them, each server in a terminal of its own."""
        for command in self.commands(example):
            self.type(command)

    def type(self, command: str) -> str:
        """Type a command in the root of the checkout; returns what it prints, or a server at first.

        The variables that it exports are there for the next.
        """
        for server, text in SERVES.items():
            if server in command:
                log = self.path.with_name(f"terminal-{len(self._terminals)}.txt")
                shell = self._shell(command)
                terminal = Terminal(command, shell, directory=self.path, env=self._env, log=log)
                self._terminals.append(terminal)
                terminal.wait_for(text)
                return terminal.shown()
        done = subprocess.run(
            self._shell(command),
            cwd=self.path,
            env=self._env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def terminal(self, server: str) -> Terminal:
        """The terminal in which ``server`` was typed."""
        (terminal,) = [each for each in self._terminals if server in each.command]
        return terminal

    def close(self) -> None:
        """Press Ctrl-C in every terminal."""
        while self._terminals:
            self._terminals.pop().interrupt()

    def _shell(self, command: str) -> list[str]:
        file = self._exported
        return ["bash", "-c", f"set -e\n. {file}\n{command}\nexport -p > {file}"]

    def _copy(self) -> None:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for name in listed.stdout.split("\0")[:-1]:
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
            is_run = name.startswith("examples/") or name == "Makefile"
            if is_run and target.suffix in WITH_PORTS:
                target.write_text(self._on_other_ports(target.read_text()))
        (self.path / ".venv").symlink_to(sys.prefix)
        for name in ("pyproject.toml", "requirements.lock", "requirements-run.lock"):
            os.utime(self.path / name, (0, 0))  # older than what is installed

    def _on_other_ports(self, text: str) -> str:
        return re.sub(r"\b(8080|8000|8081)\b", lambda port: self._ports[port[0]], text)


def _three_free_ports() -> int:
    """The first of three consecutive ports."""
    while True:
        first = free_port()
        if all(_is_free(first + number) for number in (1, 2)):
            return first


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
