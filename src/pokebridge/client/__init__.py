"""The smart client: hears pokes over one WebSocket and pulls."""
