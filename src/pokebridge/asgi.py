"""The types of ASGI, the interface between an HTTP server and an application."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

Scope = MutableMapping[str, Any]
"""What is known of a request before its body."""
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

IN_TIME: Final = "pokebridge.in_time"
"""The extension of a server that itself limits how long a request may take to arrive."""
