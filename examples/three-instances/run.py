"""Three instances on one machine: a message sent at one wakes clients at the two others."""

import argparse
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path

BIN = Path(sys.executable).parent
POKEBRIDGE, NATS_SERVER = str(BIN / "pokebridge"), str(BIN / "nats-server")
NAMES = ("one", "two", "three")
ALICE = "urn:user:alice"
PATIENCE_S = 120.0  # for what hangs: a busy machine takes many times as long as a quiet one


def main() -> None:
    """Start everything, show a poke that crosses the broker, and run until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transport", metavar="URL", help="a broker that runs already")
    parser.add_argument("--port", type=int, default=8081, help="of the first instance")
    parser.add_argument("--once", action="store_true", help="stop after the demonstration")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        transport = given.transport or start_broker(stack)
        say("broker", transport)
        # They accept each other's tokens, since they share the secret.
        env = os.environ | {"POKEBRIDGE_JWT_SECRET": secrets.token_hex(32)}
        ports = {name: given.port + number for number, name in enumerate(NAMES)}
        for name, port in ports.items():
            start_instance(stack, name, port, transport, directory, env)
        for name, port in ports.items():
            wait_for(partial(is_ready, port), f"{name} being ready")
            say(name, url(port))
        show_a_poke_crossing(stack, ports, env)
        if not given.once:
            print("Ctrl-C stops it all", flush=True)
            signal.pause()


def start_broker(stack: ExitStack) -> str:
    """A NATS server on a free port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = [NATS_SERVER, "-a", "127.0.0.1", "-p", str(port)]
    start(stack, server, stderr=subprocess.DEVNULL)
    wait_for(lambda: listens(port), "the broker")
    return f"nats://127.0.0.1:{port}"


def start_instance(
    stack: ExitStack, name: str, port: int, transport: str, directory: Path, env: Mapping[str, str]
) -> None:
    """An instance on ``port``. All three use one mailbox, in a file."""
    flags = ["--dev", "--instance", name, "--port", str(port), "--log-level", "warning"]
    flags += ["--log-format", "json"]
    parts = ["--transport", transport, "--mailbox", f"sqlite:///{directory}/mailbox.db"]
    start(stack, [POKEBRIDGE, "serve", *flags, *parts], env)


def start(
    stack: ExitStack,
    command: Sequence[str],
    env: Mapping[str, str] | None = None,
    *,
    stderr: int | None = None,
) -> "subprocess.Popen[str]":
    """Start a process that ends with the block. Its stdout can be read."""
    process = subprocess.Popen(  # noqa: S603 - our own commands
        command, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True
    )
    stack.enter_context(process)  # waits for its end
    stack.callback(process.terminate)
    return process


def show_a_poke_crossing(
    stack: ExitStack, ports: Mapping[str, int], env: Mapping[str, str]
) -> None:
    """Listen at two and three, and send at one."""
    listening = {}
    for name in ("two", "three"):
        listen = [
            POKEBRIDGE,
            "listen",
            ALICE,
            "--json",
            "--device",
            name,
            "--url",
            url(ports[name]),
        ]
        listening[name] = start(stack, listen, env, stderr=subprocess.DEVNULL)
    for name in listening:
        wait_for(partial(metric, ports[name], "pokebridge_sessions"), f"{name}'s client")
    send = [POKEBRIDGE, "send", ALICE, "hello from one", "--url", url(ports["one"])]
    subprocess.run(  # noqa: S603 - our own command
        send, env=env, check=True, stdout=subprocess.DEVNULL
    )
    say("one", f"is sent a message for {ALICE}")
    for name, process in listening.items():
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        message = json.loads(process.stdout.readline())
        say(name, f"alice's client pulled: {message['body']}")
    for name, port in ports.items():
        heard = metric(port, "pokebridge_pokes_total")
        passed = metric(port, "pokebridge_pokes_delivered_total")
        noise = metric(port, "pokebridge_pokes_noise_total")
        pokes = "poke" if heard == 1 else "pokes"
        say(name, f"heard {heard} {pokes}, passed {passed} on; for nobody here: {noise}")


def url(port: int) -> str:
    """The address of the instance on ``port``."""
    return f"http://127.0.0.1:{port}"


def get(port: int, path: str) -> tuple[int, str]:
    """What an instance answers; status 0 when there is none."""
    try:
        with closing(HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
    except OSError:
        return 0, ""


def is_ready(port: int) -> bool:
    """Whether the instance on ``port`` is ready."""
    return get(port, "/readyz")[0] == HTTPStatus.OK


def metric(port: int, name: str) -> int:
    """The value of a metric of the instance on ``port``."""
    found = re.search(rf"^{name} (\S+)$", get(port, "/metrics")[1], re.MULTILINE)
    return int(float(found[1])) if found else 0


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Return when ``condition`` holds."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline_s:
            sys.exit(f"not within {PATIENCE_S:.0f} s: {what}")
        time.sleep(0.1)


def listens(port: int) -> bool:
    """Whether somebody listens on ``port``."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def say(who: str, what: str) -> None:
    """Print a line."""
    print(f"{who:<9} {what}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit()
