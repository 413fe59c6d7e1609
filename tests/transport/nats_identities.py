"""Users of a NATS server as NATS itself makes them: an nkey, and an operator's credentials file.

Needs the package ``nkeys``, which nats-py signs with.
"""

import base64
import importlib
import json
import os
import time
from typing import Any

nkeys: Any = importlib.import_module("nkeys")  # it has no annotations


class Identity:
    """A new key pair; ``public_key`` is what a server's configuration names it by."""

    def __init__(self, prefix: int) -> None:
        self.seed = nkeys.encode_seed(os.urandom(32), prefix=prefix)
        self._pair = nkeys.from_seed(bytearray(self.seed))
        self.public_key = self._pair.public_key.decode()

    def claim(self, subject: "Identity", kind: str, ttl_s: float | None = None) -> str:
        """A JWT (version 2 of NATS's) by which this identity vouches for ``subject``.

        ``None``: it never expires.
        """
        claims = {
            "jti": os.urandom(8).hex(),
            "iat": int(time.time()),
            "iss": self.public_key,
            "sub": subject.public_key,
            "nats": {"type": kind, "version": 2, **_LIMITS.get(kind, {})},
        }
        if ttl_s is not None:
            claims["exp"] = int(time.time() + ttl_s)
        signed = f"{_encode({'typ': 'JWT', 'alg': 'ed25519-nkey'})}.{_encode(claims)}"
        signature = base64.urlsafe_b64encode(self._pair.sign(signed.encode())).rstrip(b"=")
        return f"{signed}.{signature.decode()}"


_UNLIMITED = {"subs": -1, "data": -1, "payload": -1, "conn": -1, "leaf": -1, "imports": -1}
_LIMITS: dict[str, dict[str, Any]] = {
    "account": {"limits": {**_UNLIMITED, "exports": -1, "wildcards": True}},
    "user": {"subs": -1, "data": -1, "payload": -1},
}


def _encode(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def nkey_user() -> tuple[str, str]:
    """A server's configuration with one user, and that user's seed."""
    user = Identity(nkeys.PREFIX_BYTE_USER)
    return f"authorization {{ users: [ {{ nkey: {user.public_key} }} ] }}", user.seed.decode()


class Operator:
    """An operator with one account, and a server's ``config`` that trusts it."""

    def __init__(self) -> None:
        operator = Identity(nkeys.PREFIX_BYTE_OPERATOR)
        account = self._account = Identity(nkeys.PREFIX_BYTE_ACCOUNT)
        self.config = f"""
            operator: "{operator.claim(operator, "operator")}"
            resolver: MEMORY
            resolver_preload: {{ {account.public_key}: "{operator.claim(account, "account")}" }}"""

    def credentials(self, ttl_s: float | None = None) -> str:
        """The credentials file of a new user; ``None``: they never expire."""
        user = Identity(nkeys.PREFIX_BYTE_USER)
        return f"""-----BEGIN NATS USER JWT-----
{self._account.claim(user, "user", ttl_s)}
------END NATS USER JWT------

-----BEGIN USER NKEY SEED-----
{user.seed.decode()}
------END USER NKEY SEED------
"""


def operators_user() -> tuple[str, str]:
    """A server's configuration with an operator, and a user's credentials file."""
    operator = Operator()
    return operator.config, operator.credentials()
