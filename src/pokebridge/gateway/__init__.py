"""The WebSocket half of an instance: sockets, their map, and the bridge that feeds it."""
