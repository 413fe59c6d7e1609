"""What ``import pokebridge`` gives, and what it costs."""

import subprocess
import sys
from importlib.metadata import version

import pytest

import pokebridge
from pokebridge import (
    HttpPublisher,
    PokeClient,
    Publisher,
    Settings,
    client,
    publisher,
    serve,
    server,
    settings,
)


def test_the_package_has_the_names_that_most_programs_need() -> None:
    """Each is the one that its own module has, and no other name is there."""
    assert PokeClient is client.PokeClient
    assert HttpPublisher is publisher.HttpPublisher
    assert Publisher is publisher.Publisher
    assert Settings is settings.Settings
    assert serve is server.serve
    assert pokebridge.__version__ == version("pokebridge")
    for name in pokebridge.__all__:
        assert getattr(pokebridge, name)
    with pytest.raises(AttributeError, match="no attribute 'Bridge'"):
        _ = pokebridge.Bridge


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import pokebridge", {"asyncio", "httpx", "importlib.metadata", "pydantic"}),
        ("from pokebridge import Publisher", {"pydantic", "websockets"}),
        ("from pokebridge import PokeClient", {"pydantic", "uvicorn"}),
        ("from pokebridge import Settings", {"httpx", "uvicorn", "websockets"}),
        ("import pokebridge.server.assemble", {"fastapi", "starlette"}),
    ],
)
def test_an_import_brings_no_more_than_it_needs(statement: str, absent: set[str]) -> None:
    """A program that only pokes imports no server, and a server imports no unused part."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & absent
