"""Tokens without signatures, which would take time."""

import time
from collections.abc import Callable
from typing import NamedTuple

from pokebridge.errors import AuthError


class Claims(NamedTuple):
    """What a token says."""

    subject: str
    expires_at: float


class SimVerifier:
    """Verifies tokens of the form ``recipient~issued~expiry``, by the clock of its process."""

    refuses: Callable[[str, float | None], bool]
    """Whether a token of that recipient, issued then, is revoked."""

    def verify_now(self, token: str) -> Claims:
        """Whose ``token`` is, and until when."""
        subject, issued_at, expires_at = token.split("~")
        claims = Claims(subject, float(expires_at))
        if claims.expires_at <= time.time():
            raise AuthError("the token has expired")
        if self.refuses(subject, float(issued_at)):
            raise AuthError("the token is revoked")
        return claims

    async def verify(self, token: str) -> Claims:
        """The same."""
        return self.verify_now(token)

    async def check(self) -> None:
        """Do nothing: there is no key."""

    async def close(self) -> None:
        """Do nothing."""


def issue_token(recipient: str, issued_at: float, life_s: float) -> str:
    """What :class:`SimVerifier` takes. Times are Unix times in seconds."""
    return f"{recipient}~{issued_at:.3f}~{issued_at + life_s:.3f}"
