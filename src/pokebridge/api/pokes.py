"""The call that pokes."""

from collections.abc import Iterable, Sequence
from http import HTTPStatus

from msgspec import UNSET

from pokebridge.api import schema
from pokebridge.api.exchange import Request, Response, Route, body_reader, json_response
from pokebridge.api.openapi import Call
from pokebridge.errors import InputError
from pokebridge.model import Poke, PublishPokes, check_recipient

POKES_CAP_BYTES = 384 * 1024
"""A whole request body: a thousand recipients."""


class PokeCalls:
    """Poke recipients, wherever their messages are kept."""

    def __init__(self, publish: PublishPokes) -> None:
        self._publish = publish
        self._read_pokes = body_reader(schema.PokeRequest)

    async def poke(self, request: Request) -> Response:
        """POST /v1/pokes."""
        wanted = await self._read_pokes(request)
        pokes = [Poke(check_recipient(recipient)) for recipient in _recipients(wanted)]
        await self._publish(pokes)
        return json_response(schema.PokesAccepted(len(pokes)), HTTPStatus.ACCEPTED)

    def routes(self) -> Iterable[Route]:
        """This call."""
        yield Call(
            "POST",
            "/v1/pokes",
            self.poke,
            "Poke recipients",
            scope="poke",
            limit_bytes=POKES_CAP_BYTES,
            body=schema.PokeRequest,
            answers={202: schema.PokesAccepted},
        )


def _recipients(wanted: schema.PokeRequest) -> Sequence[str]:
    if wanted.recipient is UNSET and wanted.recipients is not UNSET:
        return wanted.recipients
    if wanted.recipients is UNSET and wanted.recipient is not UNSET:
        return [wanted.recipient]
    raise InputError("name either a recipient or recipients")
