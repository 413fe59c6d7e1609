"""The smart client: it sleeps on one WebSocket, wakes on a poke, and pulls.

:class:`PokeClient` is the client for asyncio. Its rules are in ``core``, without any input or
output, so that they can be tested, simulated, and compared with clients in other languages.
"""

from pokebridge.client.core import ClientCore
from pokebridge.client.poke_client import OnEvent, PokeClient, TokenProvider
from pokebridge.client.policy import Policy
from pokebridge.client.pulling import OnMessages, OnPoke, ReceivedMessage

__all__ = [
    "ClientCore",
    "OnEvent",
    "OnMessages",
    "OnPoke",
    "PokeClient",
    "Policy",
    "ReceivedMessage",
    "TokenProvider",
]
