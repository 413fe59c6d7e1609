"""pokebridge: clients stop polling; they sleep on a WebSocket, hear a poke, and pull."""
