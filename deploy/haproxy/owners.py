#!/usr/bin/env python3
"""Tell a running HAProxy which instance owns which shard: see partitioned.cfg.

    export POKEBRIDGE_TOKEN=…    # with the scope "admin"
    socket=/run/haproxy/admin.sock map=/etc/haproxy/owners.map
    while sleep 2; do owners.py http://10.0.0.11:8080 $socket $map; done

The file is written too, because HAProxy reads it when it is reloaded. Nothing breaks while the map
is out of date or missing: a session that arrives at another instance is served there.
"""

import json
import os
import re
import socket
import sys
import urllib.request
from pathlib import Path

TIMEOUT_S = 10


def read_owners(bridge: str, token: str) -> dict[int, str]:
    """The owner of each shard, from GET /v1/cluster of any instance."""
    request = urllib.request.Request(  # noqa: S310 - the operator's own URL
        f"{bridge}/v1/cluster", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
        cluster = json.load(answer)
    if cluster["mode"] != "partitioned":  # every instance has every shard
        return {}
    return {shard: each["id"] for each in cluster["instances"] for shard in each["shards"]}


def tell(admin_socket: str, command: str) -> str:
    """HAProxy's answer to one command of its runtime API."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(TIMEOUT_S)
        connection.connect(admin_socket)
        connection.sendall(f"{command}\n".encode())
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    return answer.decode().strip()


def replace_map(admin_socket: str, map_file: str, lines: list[str]) -> None:
    """Put ``lines`` in the place of the whole map, at once."""
    version = re.search(r"\d+$", tell(admin_socket, f"prepare map {map_file}"))
    if version is None:
        sys.exit(f"owners: HAProxy knows no map {map_file}")
    at = f"@{version[0]} {map_file}"
    if lines and (refused := tell(admin_socket, "\n".join([f"add map {at} <<", *lines, ""]))):
        sys.exit(f"owners: {refused}")
    tell(admin_socket, f"commit map {at}")


def main() -> None:
    """Read, and tell when it is news."""
    bridge, admin_socket, map_file = sys.argv[1:]
    owners = read_owners(bridge, os.environ["POKEBRIDGE_TOKEN"])
    lines = [f"{shard} {owner}" for shard, owner in sorted(owners.items())]
    text = "".join(f"{line}\n" for line in lines)
    path = Path(map_file)
    if path.read_text() != text:
        replace_map(admin_socket, map_file, lines)
        path.write_text(text)


if __name__ == "__main__":
    main()
