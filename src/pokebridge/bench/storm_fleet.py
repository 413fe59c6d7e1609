"""The instances of a storm: processes of this machine, started, killed, and asked for their CPU."""

import asyncio
import os
import random
import secrets
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from pokebridge.bench.storm_http import HOST, HttpPool
from pokebridge.errors import ConfigError, UnavailableError
from pokebridge.settings import ENV_PREFIX

START_TIMEOUT_S = 60.0
_POLL_S = 0.1
_STOP_TIMEOUT_S = 10.0
# So that a storm of pulls waits in the clients' line, as behind a load balancer, not in a kernel's.
_HTTP_CONNECTIONS = 32


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """What to start: the settings of ``pokebridge serve``, the same for all instances."""

    instances: int
    transport: str
    mailbox: str | None
    coordination: str | None
    mode: str
    handshakes_per_s: int


class Endpoint:
    """Where an instance is reached."""

    def __init__(self, name: str, port: int) -> None:
        self.name = name
        self.port = port
        self.http = HttpPool(port, _HTTP_CONNECTIONS)


class Balancer:
    """What stands for a load balancer: it knows who is ``up``, and sends to each in its turn."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.up = list(endpoints)
        self._turn = 0

    def pick(self) -> Endpoint:
        """Where the next client or request goes."""
        self._turn += 1
        return self.up[self._turn % len(self.up)]

    def at(self, url: str) -> Endpoint:
        """The instance that a ``move`` frame names; one that is down can't be reached there."""
        port = urlsplit(url).port or 0
        return next((each for each in self.up if each.port == port), Endpoint("gone", port))


class StormInstance(Endpoint):
    """One instance, running or killed."""

    def __init__(self, name: str, port: int, command: Sequence[str], log: Path) -> None:
        super().__init__(name, port)
        self._command = command
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, secret: str) -> None:
        """Start it; returns when it is ready.

        Raises:
            UnavailableError: it ended, or did not become ready in time; with the end of its log.
        """
        # Nothing but the plan decides how it is set.
        env = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
        env[f"{ENV_PREFIX}JWT_SECRET"] = secret
        with await asyncio.to_thread(self._log.open, "ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env=env
            )
        try:
            async with asyncio.timeout(START_TIMEOUT_S), httpx.AsyncClient(trust_env=False) as http:
                while not await self._is_ready(http):  # noqa: ASYNC110 - it can only be asked
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise UnavailableError(
                f"{self.name} is not ready after {START_TIMEOUT_S:g} s{await self._last_words()}"
            ) from None

    async def _is_ready(self, http: httpx.AsyncClient) -> bool:
        await self.check()
        with suppress(httpx.HTTPError):
            return (await http.get(f"http://{HOST}:{self.port}/readyz")).is_success
        return False

    async def check(self) -> None:
        """Raise UnavailableError when the process has ended by itself."""
        if self._process is not None and self._process.returncode is not None:
            raise UnavailableError(f"{self.name} has ended by itself{await self._last_words()}")

    async def kill(self) -> None:
        """SIGKILL, as a machine that dies would."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()

    def cpu_s(self) -> float | None:
        """CPU time of the process so far, user and system; ``None`` where that is not told.

        It reads a file, so call it in a thread.
        """
        process = self._process
        if process is None:
            return None
        try:
            stat = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii")
        except OSError:
            return None
        # After the command's name, which may hold blanks: fields 14 and 15 of proc(5).
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    async def _last_words(self) -> str:
        text = await asyncio.to_thread(self._log.read_text, errors="replace")
        lines = text.split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        return f": {last}" if last else ""


class Fleet:
    """All instances, and the balancer before them."""

    def __init__(self, plan: FleetPlan, directory: Path) -> None:
        self.secret = secrets.token_hex(32)
        cluster = f"storm-{secrets.token_hex(4)}"
        mailbox = plan.mailbox or f"sqlite:///{directory / 'mailbox.db'}"
        self.instances: list[StormInstance] = []
        for number, port in enumerate(_free_ports(plan.instances), 1):
            name = f"instance-{number}"
            command = _serve_command(plan, name, port, cluster, mailbox)
            log = directory / f"{name}.log"
            self.instances.append(StormInstance(name, port, command, log))
        self.balancer = Balancer([])

    async def start(self) -> None:
        """Start them all."""
        try:
            async with asyncio.TaskGroup() as group:
                for instance in self.instances:
                    group.create_task(self.start_one(instance))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def start_one(self, instance: StormInstance) -> None:
        """Start ``instance``, or start it again, and let clients connect to it."""
        await instance.start(self.secret)
        self.balancer.up.append(instance)

    async def kill(self, instance: StormInstance) -> None:
        """Kill it; from now on nobody is sent there."""
        self.balancer.up.remove(instance)
        await instance.kill()

    async def check(self) -> None:
        """Raise UnavailableError when one has ended that was not killed."""
        for instance in self.instances:
            await instance.check()

    async def close(self) -> None:
        """End whatever still runs."""
        for instance in self.instances:
            instance.http.close()
        await asyncio.gather(*(instance.kill() for instance in self.instances))


def _serve_command(
    plan: FleetPlan, name: str, port: int, cluster: str, mailbox: str
) -> Sequence[str]:
    settings: dict[str, object] = {
        "instance": name,
        "cluster": cluster,
        "host": HOST,
        "port": port,
        "transport": plan.transport,
        "mailbox": mailbox,
        "mode": plan.mode,
        "handshakes_per_s": plan.handshakes_per_s,
        "max_sessions_per_address": 0,  # here all clients have one
        "log_level": "warning",
        "log_format": "console",
    }
    if plan.coordination is not None:
        settings["coordination"] = plan.coordination
        settings["advertise_url"] = f"ws://{HOST}:{port}"
    flags = [f"--{setting.replace('_', '-')}={value}" for setting, value in settings.items()]
    return [sys.executable, "-m", "pokebridge", "serve", *flags]


def _free_ports(count: int) -> Sequence[int]:
    """Ports below those that the kernel gives to clients, of whom there will be many."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 2_000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((HOST, port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise ConfigError("no free ports on the loopback interface")
