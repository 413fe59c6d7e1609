"""pokebridge: clients stop polling; they sleep on a WebSocket, receive a poke, and pull.

The names that most programs need are here. Each is imported when it is first used, so that a
backend that pokes does not wait for a web framework::

    from pokebridge import HttpPublisher, PokeClient, Publisher, Settings, serve
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pokebridge.client import PokeClient
    from pokebridge.publisher import HttpPublisher, Publisher
    from pokebridge.server import serve
    from pokebridge.settings import Settings

    __version__: str

__all__ = ["HttpPublisher", "PokeClient", "Publisher", "Settings", "__version__", "serve"]

_HOMES = {
    "HttpPublisher": "pokebridge.http_publisher",
    "PokeClient": "pokebridge.client",
    "Publisher": "pokebridge.publisher",
    "Settings": "pokebridge.settings",
    "serve": "pokebridge.server",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("pokebridge")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
