"""The addresses that an instance listens on."""

import socket

import pytest

from pokebridge.errors import ConfigError
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


def test_a_port_in_use_is_told_with_a_remedy() -> None:
    """The address stands there once, in the project's words, and what to change."""
    with listen("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError) as raised:
            listen("127.0.0.1", port)
    assert str(raised.value).startswith(
        f"host, port: cannot listen on 127.0.0.1:{port}: Address already in use; stop"
    )
    assert str(raised.value).count("127.0.0.1") == 1
