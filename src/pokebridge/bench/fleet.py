"""The instances of a storm: local processes, and a stand-in for the load balancer."""

import asyncio
import os
import random
import secrets
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from pokebridge.bench.http_pool import HOST, HttpPool
from pokebridge.errors import ConfigError, UnavailableError
from pokebridge.settings import ENV_PREFIX

START_TIMEOUT_S = 60.0
_POLL_S = 0.1
# Few, so that a storm of pulls queues here, as behind a load balancer, and not in the kernel.
_HTTP_CONNECTIONS = 32


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """How many instances to start, and the settings that all of them get."""

    instances: int
    workers: int
    transport: str
    mailbox: str | None
    coordination: str | None
    mode: str
    handshakes_per_s: int


class Endpoint:
    """The address of an instance, and a pool of connections to it."""

    def __init__(self, name: str, port: int) -> None:
        self.name = name
        self.port = port
        self.http = HttpPool(port, _HTTP_CONNECTIONS)


class Balancer:
    """Stands in for a load balancer: picks the instances that are ``up`` in turn."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.up = list(endpoints)
        self._turn = 0

    def pick(self) -> Endpoint:
        """The instance for the next client or request."""
        self._turn += 1
        return self.up[self._turn % len(self.up)]

    def at(self, url: str) -> Endpoint:
        """The instance at the URL of a ``move`` frame, whether it is up or not."""
        port = urlsplit(url).port or 0
        return next((each for each in self.up if each.port == port), Endpoint("gone", port))


class StormInstance(Endpoint):
    """An instance that can be started and killed."""

    def __init__(self, name: str, port: int, command: Sequence[str], log: Path) -> None:
        super().__init__(name, port)
        self._command = command
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, secret: str) -> None:
        """Start the process; returns when the instance is ready.

        Raises:
            UnavailableError: it ended, or was not ready in time; with the last line of its log.
        """
        # Only the plan configures it, not this process's environment.
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
        """Send SIGKILL, and wait until the process has ended."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()

    def cpu_s(self) -> float | None:
        """CPU seconds of its processes so far, user and system; ``None`` when they are unknown.

        This reads files of /proc: call it in a thread.
        """
        process = self._process
        if process is None:
            return None
        try:
            return sum(_cpu_s(pid) for pid in _tree(process.pid))
        except OSError:
            return None

    async def _last_words(self) -> str:
        text = await asyncio.to_thread(self._log.read_text, errors="replace")
        lines = text.split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        return f": {last}" if last else ""


def _tree(pid: int) -> Iterator[int]:
    """The process and its descendants, which are its workers."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text(encoding="ascii").split():
            yield from _tree(int(child))


def _cpu_s(pid: int) -> float:
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    # Fields 14 and 15 of proc(5), counted from after the command's name, which may hold blanks.
    user, system = stat.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


class Fleet:
    """All instances, and the balancer in front of them."""

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
        """Start all instances at once."""
        try:
            async with asyncio.TaskGroup() as group:
                for instance in self.instances:
                    group.create_task(self.start_one(instance))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def start_one(self, instance: StormInstance) -> None:
        """Start ``instance`` and put it behind the balancer."""
        await instance.start(self.secret)
        self.balancer.up.append(instance)

    async def kill(self, instance: StormInstance) -> None:
        """Take ``instance`` from the balancer and kill it."""
        self.balancer.up.remove(instance)
        await instance.kill()

    async def check(self) -> None:
        """Raise UnavailableError when an instance has ended that was not killed."""
        for instance in self.instances:
            await instance.check()

    async def close(self) -> None:
        """Kill the instances that still run."""
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
        "workers": plan.workers,
        "handshakes_per_s": plan.handshakes_per_s,
        "max_sessions_per_address": 0,  # all clients share one address
        "log_level": "warning",
        "log_format": "console",
    }
    if plan.coordination is not None:
        settings["coordination"] = plan.coordination
        settings["advertise_url"] = f"ws://{HOST}:{port}"
    flags = [f"--{setting.replace('_', '-')}={value}" for setting, value in settings.items()]
    return [sys.executable, "-m", "pokebridge", "serve", *flags]


def _free_ports(count: int) -> Sequence[int]:
    """Free ports below the range from which the kernel serves the many clients."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 2_000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((HOST, port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise ConfigError("no free ports on the loopback interface")
