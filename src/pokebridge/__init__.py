"""pokebridge: clients stop polling; they sleep on a WebSocket, hear a poke, and pull."""

from importlib.metadata import version

__version__ = version("pokebridge")
