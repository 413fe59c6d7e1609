"""Tokens without signatures, which would take time."""

import time
from typing import NamedTuple

from pokebridge.errors import AuthError


class Claims(NamedTuple):
    """What a token says."""

    subject: str
    expires_at: float


class SimVerifier:
    """Verifies tokens of the form ``recipient~expiry``, by the clock of its process."""

    def verify_now(self, token: str) -> Claims:
        """Whose ``token`` is, and until when."""
        subject, _, expires_at = token.partition("~")
        claims = Claims(subject, float(expires_at))
        if claims.expires_at <= time.time():
            raise AuthError("the token has expired")
        return claims

    async def verify(self, token: str) -> Claims:
        """The same."""
        return self.verify_now(token)

    async def check(self) -> None:
        """Do nothing: there is no key."""

    async def close(self) -> None:
        """Do nothing."""


def issue_token(recipient: str, expires_at: float) -> str:
    """What :class:`SimVerifier` takes."""
    return f"{recipient}~{expires_at:.3f}"
