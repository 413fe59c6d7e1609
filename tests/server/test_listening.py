"""The addresses that an instance listens on."""

import socket

import pytest

from pokebridge.server.uvicorn_server import listen


@pytest.mark.parametrize(
    ("host", "reached"),
    [
        ("::", ["127.0.0.1", "::1"]),
        ("0.0.0.0", ["127.0.0.1"]),
        ("127.0.0.1", ["127.0.0.1"]),
        ("::1", ["::1"]),
    ],
)
def test_every_address_of_the_host_is_reached(host: str, reached: list[str]) -> None:
    """With :: as the host that is every interface, for IPv4 as for IPv6."""
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with listen(host, 0) as listener:
        port = listener.getsockname()[1]
        for address in reached:
            with socket.create_connection((address, port), timeout=10):
                pass
