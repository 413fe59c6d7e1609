"""The recipes of ``deploy/``, run by the real nginx and HAProxy on a loopback port."""

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from tests.support import Daemon
from tests.support.missing import require
from tests.transport.certificates import Certificates

DEPLOY = Path(__file__).parents[2] / "deploy"
SERVERS = ("10.0.0.11:8080", "10.0.0.12:8080", "10.0.0.13:8080")
"""The recipes' instances b1, b2, b3."""
IDLE_TIMEOUT = "90s"
"""The recipes' limit for a silent WebSocket."""
RELOAD_TIMEOUT = "1h"
"""How long the recipes let an old worker keep its sockets after a reload."""


class Proxy(Daemon):
    """nginx or HAProxy with a recipe."""

    def __init__(
        self, name: str, command: Sequence[str], *, port: int, directory: Path, reload: int
    ) -> None:
        super().__init__(
            name, command, port=port, url=f"https://127.0.0.1:{port}", directory=directory
        )
        self._reload = reload

    @property
    def workers(self) -> set[int]:
        """The processes that serve now; after a reload those of before, too, while they last."""
        return {child.pid for child in psutil.Process(self.pid).children()}

    def reload(self) -> None:
        """Have it read its configuration again, as ``systemctl reload`` does."""
        os.kill(self.pid, self._reload)

    def _listens(self) -> bool:
        # HAProxy's master leaves the listening to its workers.
        processes = [psutil.Process(self.pid), *psutil.Process(self.pid).children()]
        return any(
            connection.status == psutil.CONN_LISTEN and connection.laddr.port == self.port
            for process in processes
            for connection in process.net_connections("tcp")
        )


def run_proxy(  # the caller kills it
    kind: str,
    recipe: str,
    servers: Sequence[str],
    *,
    port: int,
    directory: Path,
    certificates: Certificates,
    changes: Mapping[str, str] | None = None,
) -> Proxy:
    """Start ``kind`` (nginx, haproxy) with ``deploy/<kind>/<recipe>``.

    ``servers`` stand in for the recipe's, and ``changes`` for what else the test wants otherwise.
    """
    directory.mkdir(parents=True, exist_ok=True)
    changed = {**dict(zip(SERVERS, servers, strict=True)), **(changes or {})}
    start = {"nginx": _nginx, "haproxy": _haproxy}[kind]
    proxy = start(recipe, changed, port, directory, certificates)
    proxy.start()
    return proxy


def _nginx(
    recipe: str, changes: Mapping[str, str], port: int, directory: Path, tls: Certificates
) -> Proxy:
    # Debian's nginx keeps these files where only root may write.
    bodies = "".join(
        f"{name}_temp_path {directory / name}; "
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = directory / "nginx.conf"
    config.write_text(
        adapt(
            DEPLOY / "nginx" / f"{recipe}.conf",
            {
                "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
                "/etc/nginx/bridge.crt": str(tls.cert_file),
                "/etc/nginx/bridge.key": str(tls.key_file),
                "/var/log/nginx/pokebridge.log": str(directory / "access.log"),
                "http {": f"http {{ {bodies}",
                "worker_processes auto": "worker_processes 2",
                **changes,
            },
        )
    )
    own = f"daemon off; pid {directory / 'nginx.pid'};"
    if os.geteuid() == 0:
        own += " user root;"  # else its workers could not reach the test's directory
    command = [require("nginx"), "-e", "stderr", "-c", str(config), "-g", own]
    return Proxy("nginx", command, port=port, directory=directory, reload=signal.SIGHUP)


def nginx_with(locations: str, *, port: int, directory: Path) -> Proxy:
    """Nginx without TLS on ``port``, with ``locations``. The caller starts and kills it."""
    directory.mkdir(parents=True, exist_ok=True)
    bodies = "".join(
        f"{name}_temp_path {directory / name}; "
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = directory / "nginx.conf"
    config.write_text(
        "events { worker_connections 256; }\n"
        f"http {{ {bodies} access_log off;\n"
        'map $http_upgrade $connection_upgrade { default upgrade; "" ""; }\n'
        f"server {{ listen 127.0.0.1:{port}; {locations} }} }}\n"
    )
    own = f"daemon off; pid {directory / 'nginx.pid'};"
    if os.geteuid() == 0:
        own += " user root;"
    command = [require("nginx"), "-e", "stderr", "-c", str(config), "-g", own]
    return Proxy("nginx", command, port=port, directory=directory, reload=signal.SIGHUP)


def _haproxy(
    recipe: str, changes: Mapping[str, str], port: int, directory: Path, tls: Certificates
) -> Proxy:
    pem = directory / "bridge.pem"
    pem.write_bytes(tls.cert_file.read_bytes() + tls.key_file.read_bytes())
    config = directory / "haproxy.cfg"
    config.write_text(
        adapt(
            DEPLOY / "haproxy" / f"{recipe}.cfg",
            {
                "bind :443": f"bind 127.0.0.1:{port}",
                "/etc/haproxy/bridge.pem": str(pem),
                "/dev/log": "stdout format raw",
                "maxconn 100000": "maxconn 1000",  # a machine's limit of descriptors may be lower
                **changes,
            },
        )
    )
    command = [require("haproxy"), "-W", "-db", "-f", str(config)]
    return Proxy("haproxy", command, port=port, directory=directory, reload=signal.SIGUSR2)


def adapt(recipe: Path, changes: Mapping[str, str]) -> str:
    """The text of ``recipe`` with ``changes`` made; each must be found."""
    text = recipe.read_text()
    for old, new in changes.items():
        assert old in text, f"{recipe} has no {old!r}"
        text = text.replace(old, new)
    return text
