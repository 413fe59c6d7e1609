"""The call that pokes."""

from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus

from fastapi import Request, Response
from msgspec import UNSET

from pokebridge.api import schema
from pokebridge.api.exchange import Verify, authorize, body_reader, json_response
from pokebridge.api.openapi import Api
from pokebridge.errors import InputError
from pokebridge.model import Poke, check_recipient


class PokeCalls:
    """Poke recipients, whoever keeps their messages."""

    def __init__(
        self, verify: Verify, publish_pokes: Callable[[Sequence[Poke]], Awaitable[None]]
    ) -> None:
        self._verify = verify
        self._publish_pokes = publish_pokes
        self._read_pokes = body_reader(schema.PokeRequest)

    async def poke(self, request: Request) -> Response:
        """POST /v1/pokes."""
        await authorize(self._verify, request, "poke")
        wanted = await self._read_pokes(request)
        pokes = [Poke(check_recipient(recipient)) for recipient in _recipients(wanted)]
        await self._publish_pokes(pokes)
        return json_response(schema.PokesAccepted(len(pokes)), HTTPStatus.ACCEPTED)

    def add_to(self, app: Api) -> None:
        """Have ``app`` answer this call."""
        app.call(
            "POST",
            "/v1/pokes",
            self.poke,
            "Poke recipients",
            scope="poke",
            body=schema.PokeRequest,
            answers={202: schema.PokesAccepted},
        )


def _recipients(wanted: schema.PokeRequest) -> Sequence[str]:
    if wanted.recipient is UNSET and wanted.recipients is not UNSET:
        return wanted.recipients
    if wanted.recipients is UNSET and wanted.recipient is not UNSET:
        return [wanted.recipient]
    raise InputError("name either a recipient or recipients")
