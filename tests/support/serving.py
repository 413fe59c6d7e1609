"""Real ``pokebridge serve`` processes."""

import itertools
import os
import ssl
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import httpx
import jwt
import psutil
import pytest

from tests.support.daemon import Daemon, Process, free_port
from tests.support.forking import ForkedCommand

POKEBRIDGE = Path(sys.executable).with_name("pokebridge")
# One secret for all instances of a run, so they accept each other's tokens after restarts, too.
JWT_SECRET = "0123456789abcdef-of-the-tests-and-of-nobody-else"
HTTP_TIMEOUT_S = 60.0
# `TESTED_WORKERS=2 make test` runs every instance of the tests with worker processes.
_TESTED_WITH = {"workers": os.environ["TESTED_WORKERS"]} if "TESTED_WORKERS" in os.environ else {}
# Created once, because every httpx client needs one and creating it takes longer than a request.
TLS = ssl.create_default_context()


class Instance(Daemon):
    """A running instance of pokebridge.

    It is forked unless ``env`` has a ``PYTHONPATH``, which may lead to another pokebridge.
    """

    def __init__(
        self,
        name: str,
        flags: list[str],
        env: dict[str, str],
        directory: Path,
        port: int | None = None,
        *,
        started_at: str = "/readyz",
        program: Sequence[str] = (str(POKEBRIDGE),),
    ) -> None:
        """It counts as started when ``started_at`` answers 200. ``program`` takes the command."""
        port = port or free_port()
        self._started_at = started_at
        self._args = ["serve", "--host", "127.0.0.1", "--port", str(port), *flags]
        super().__init__(
            name,
            [*program, *self._args],
            port=port,
            url=f"http://127.0.0.1:{port}",
            directory=directory,
            is_ready=self._is_ready_to_serve,
            env=env,
        )
        self._environ = env

    @property
    def ws_url(self) -> str:
        """Where a client connects to."""
        return f"ws://127.0.0.1:{self.port}/v1/connect"

    def token(self, sub: str, scope: str = "", ttl_s: float = 3600.0) -> str:
        """A token for ``sub``, signed as the instance's operator would sign it."""
        claims = {"sub": sub, "scope": scope, "exp": int(time.time() + ttl_s)}
        return jwt.encode(claims, JWT_SECRET, algorithm="HS256")

    def headers(self, sub: str, scope: str = "") -> dict[str, str]:
        """The HTTP headers that carry ``token(sub, scope)``."""
        return {"Authorization": f"Bearer {self.token(sub, scope)}"}

    def http(self, sub: str | None = None, scope: str = "") -> httpx.Client:
        """An HTTP client of the API, with ``sub``'s token if given. Close it (``with``)."""
        headers = self.headers(sub, scope) if sub else None
        return httpx.Client(
            base_url=self.url,
            headers=headers,
            timeout=HTTP_TIMEOUT_S,
            trust_env=False,
            verify=TLS,
        )

    def async_http(self, sub: str | None = None, scope: str = "") -> httpx.AsyncClient:
        """The same for a test with an event loop. Close it (``async with``)."""
        headers = self.headers(sub, scope) if sub else None
        return httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=HTTP_TIMEOUT_S,
            trust_env=False,
            verify=TLS,
        )

    def worker_pids(self) -> list[int]:
        """Its worker processes: what the fork server, the only child of the hub, has forked."""
        (fork_server,) = psutil.Process(self.pid).children()
        return sorted(worker.pid for worker in fork_server.children())

    def _is_ready_to_serve(self) -> bool:
        with self.http() as http:
            return http.get(self._started_at).status_code == httpx.codes.OK

    def _spawn(self) -> Process:
        if "PYTHONPATH" in self._environ:
            return super()._spawn()
        return ForkedCommand(self._args, env=self._environ, cwd=self._directory, stdout=self._log)


class Serve(Protocol):
    """Starts an instance; the test's end stops it."""

    def __call__(
        self, *flags: str, dev: bool = True, started_at: str = "/readyz", **settings: object
    ) -> Instance:
        """Run ``pokebridge serve`` with ``flags`` and ``settings`` until ``started_at`` is 200.

        A setting is passed as its environment variable: ``lease_s=1`` is ``POKEBRIDGE_LEASE_S=1``.
        """


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start instances: ``serve(transport=nats_server.url, mailbox="sqlite:///a.db")``."""
    instances: list[Instance] = []
    numbers = itertools.count(1)  # its own: a test may start several at once, in threads

    def start(
        *flags: str, dev: bool = True, started_at: str = "/readyz", **settings: object
    ) -> Instance:
        given = {"jwt_secret": JWT_SECRET, **_TESTED_WITH, **settings}
        env = os.environ | {f"POKEBRIDGE_{k.upper()}": str(v) for k, v in given.items()}
        dev_flags = ["--dev"] if dev else []
        name = f"instance-{next(numbers)}"
        instance = Instance(name, [*dev_flags, *flags], env, tmp_path, started_at=started_at)
        instances.append(instance)
        instance.start()
        return instance

    yield start
    for instance in instances:
        instance.kill()


def owners_in(view: Any) -> dict[int, str]:
    """Shard → the instance that owns it, of an answer of ``GET /v1/cluster``."""
    return {shard: each["id"] for each in view["instances"] for shard in each["shards"]}
