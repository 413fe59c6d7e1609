"""The smart client: it sleeps on one WebSocket, wakes on a poke, and pulls.

:class:`PokeClient` is the client for asyncio. Its rules are in ``core``, without any input or
output, so that they can be tested, simulated, and compared with clients in other languages.
"""

from pokebridge.client.core import ClientCore
from pokebridge.client.listening import Listening
from pokebridge.client.poke_client import PokeClient
from pokebridge.client.policy import Policy
from pokebridge.client.pulling import OnMessages, OnPoke, ReceivedMessage
from pokebridge.client.shell import OnEvent, TokenProvider

__all__ = [
    "ClientCore",
    "Listening",
    "OnEvent",
    "OnMessages",
    "OnPoke",
    "PokeClient",
    "Policy",
    "ReceivedMessage",
    "TokenProvider",
]
