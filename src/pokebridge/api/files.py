"""Files of a directory, as browsers get them."""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from http import HTTPStatus
from pathlib import Path, PurePath

from pokebridge.api.exchange import Header, Request, Response
from pokebridge.errors import NotFoundError

_TYPES = {
    ".css": b"text/css; charset=utf-8",
    ".html": b"text/html; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".json": b"application/json",
    ".map": b"application/json",
    ".png": b"image/png",
    ".svg": b"image/svg+xml",
}
_OTHER_TYPE = b"text/plain; charset=utf-8"


class Files:
    """Answers with the files below ``directory``, and ``headers``.

    Only names that were found there are served, so no path leads out of the directory. The disk is
    read in threads.
    """

    def __init__(self, directory: Path, headers: Sequence[Header] = ()) -> None:
        self._directory = directory
        self._headers = headers

    async def answer(self, request: Request) -> Response:
        """Answer a request whose path ends in the name of the file."""
        return await self.file(request, request.rest, self._headers)

    async def file(self, request: Request, name: str, headers: Sequence[Header]) -> Response:
        """Return the file ``name`` with ``headers``, or that the browser's copy is current.

        Raises :class:`~pokebridge.errors.NotFoundError` if there is no such file.
        """
        body, tag = await asyncio.to_thread(self._read, name)
        added = [(b"etag", tag), *headers]
        known = [each.strip() for each in request.headers.get(b"if-none-match", b"").split(b",")]
        if tag in [each.removeprefix(b"W/") for each in known] or known == [b"*"]:
            return Response(HTTPStatus.NOT_MODIFIED, added)
        kind = _TYPES.get(PurePath(name).suffix, _OTHER_TYPE)
        return Response(HTTPStatus.OK, [(b"content-type", kind), *added], body)

    def _read(self, name: str) -> tuple[bytes, bytes]:
        path = self._paths.get(name)
        if path is None:
            raise NotFoundError("there is nothing at this path")
        body = path.read_bytes()
        return body, b'"%s"' % hashlib.blake2s(body, digest_size=16).hexdigest().encode()

    @cached_property
    def _paths(self) -> Mapping[str, Path]:
        found = self._directory.rglob("*")
        return {str(path.relative_to(self._directory)): path for path in found if path.is_file()}
