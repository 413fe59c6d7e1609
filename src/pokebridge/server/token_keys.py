"""From settings to what signs and verifies tokens.

Commands sign tokens too, and need nothing else of an instance.
"""

from functools import partial

from pydantic import SecretStr

from pokebridge.settings import Settings
from pokebridge.tokens import SignToken, TokenVerifier, sign_token


def token_signer(settings: Settings) -> SignToken | None:
    """Return what signs tokens with ``jwt_secret``; ``None`` when there is no secret."""
    if settings.jwt_secret is None:
        return None
    return partial(
        sign_token,
        settings.jwt_secret.get_secret_value(),
        issuer=settings.jwt_issuer,
        audience=settings.jwt_audience,
    )


def token_verifier(settings: Settings) -> TokenVerifier:
    """Return what verifies the tokens of callers."""
    return TokenVerifier(
        secret=_reveal(settings.jwt_secret),
        previous_secret=_reveal(settings.jwt_previous_secret),
        jwks_url=settings.jwks_url,
        issuer=settings.jwt_issuer,
        audience=settings.jwt_audience,
        leeway_s=settings.jwt_leeway_s,
    )


def _reveal(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()
