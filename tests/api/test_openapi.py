"""The OpenAPI description is true: what it allows is accepted, what it does not is refused."""

from typing import Any

import schemathesis
from hypothesis import assume, settings

from pokebridge.api.app import create_api
from tests.api.api_world import World, bearer

API = schemathesis.openapi.from_asgi("/openapi.json", create_api(World().dev_parts()))


@API.auth()
class Root:
    """The caller of all generated requests; without it they must be refused."""

    def get(self, _case: schemathesis.Case[Any], _context: object) -> str:
        """The value of its header."""
        return bearer("urn:user:root", "poke send admin")["Authorization"]

    def set(self, case: schemathesis.Case[Any], authorization: str, _context: object) -> None:
        """Put the header into a request."""
        case.headers["Authorization"] = authorization


@API.parametrize()
@settings(max_examples=25, deadline=None, derandomize=True)
def test_description(case: schemathesis.Case[Any]) -> None:
    """Generated requests, good and bad, are answered as described, whatever they hold."""
    assume("x-schemathesis-unknown-property" not in (case.query or {}))  # ignored
    case.call_and_validate()
