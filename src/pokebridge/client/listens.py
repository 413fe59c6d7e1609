"""The recipients that a client's socket carries beside the client's own. Pure, as the core is.

Each of them has its own core, which shares the client's socket. So frames for one are given to its
core as a separate socket would have brought them: ``listening`` as ``ready``, a poke as a poke, and
``unlistened`` as a close.
"""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from pokebridge.client.events import Closed, Text
from pokebridge.client.frames import number, parse_frame

SOCKET_LOST = 1001
"""The close code for a core when the shared socket is lost: it listens again."""
_ABNORMAL = 1006


class Given(NamedTuple):
    """An event for the core of a recipient."""

    recipient: str
    event: Text | Closed


class Listens:
    """What the socket carries.

    - ``at_most``: how many recipients it may carry, as its ``ready`` said; ``None`` while there is
      no socket
    - ``_carried``: those recipients, in the order of their beginning
    """

    def __init__(self) -> None:
        self.at_most: int | None = None
        self._carried: dict[str, None] = {}

    def ready(self, text: str) -> Sequence[Given]:
        """A new socket is ready: ``text`` is its first frame. It carries nothing yet."""
        lost = self.lose()
        self.at_most = int(number(parse_frame(text).get("listens")))
        return lost

    def lose(self) -> Sequence[Given]:
        """The socket is gone."""
        lost = [Given(each, Closed(SOCKET_LOST, "the socket is gone")) for each in self._carried]
        self._carried = {}
        self.at_most = None
        return lost

    def refuse(self) -> Sequence[Given]:
        """The socket does not accept ``listen``. From now on each recipient has its own socket."""
        lost = self.lose()
        self.at_most = 0
        return lost

    def carry(self, recipient: str) -> bool:
        """Whether the socket takes ``recipient``. Then ``listen`` is to be sent."""
        if len(self._carried) >= (self.at_most or 0) and recipient not in self._carried:
            return False
        self._carried[recipient] = None
        return True

    def drop(self, recipient: str) -> bool:
        """Stop carrying ``recipient``. Returns whether ``unlisten`` is to be sent."""
        return self._carried.pop(recipient, "") is None

    def hear(self, text: str) -> Given | None:
        """The event in a frame about a recipient that is or was carried.

        ``None``: the frame is for the client's own core.
        """
        frame = parse_frame(text)
        kind, recipient = frame.pop("type", None), frame.pop("recipient", None)
        if not isinstance(recipient, str) or kind not in {"poke", "listening", "unlistened"}:
            return None
        if kind == "unlistened":
            self._carried.pop(recipient, None)
            code = int(number(frame.get("code"))) or _ABNORMAL
            return Given(recipient, Closed(code, str(frame.get("reason", ""))))
        kind = "ready" if kind == "listening" else "poke"
        return Given(recipient, Text(msgspec.json.encode({"type": kind, **frame}).decode()))
