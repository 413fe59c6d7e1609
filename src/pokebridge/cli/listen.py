"""``pokebridge listen``: a smart client in the terminal."""

import asyncio
import json
import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import click
import msgspec

from pokebridge.cli.api import Access, api_options
from pokebridge.cli.options import json_option, printable
from pokebridge.client import PokeClient, ReceivedMessage
from pokebridge.client.core import CLOSE_TOKEN
from pokebridge.client.events import (
    AnyAction,
    AnyEvent,
    Closed,
    PullFailed,
    Refused,
    Text,
    TokenFailed,
)
from pokebridge.client.frames import parse_frame
from pokebridge.errors import AuthError, ForbiddenError, InputError, UnavailableError
from pokebridge.model import MAX_VERSION
from pokebridge.tokens import unverified_subject


@click.command(
    epilog="Example: pokebridge listen urn:user:bob", short_help="Show messages as they come."
)
@click.argument("recipient")
@click.option(
    "--after",
    type=click.IntRange(0, MAX_VERSION),
    default=0,
    show_default=True,
    help="Show messages that are newer than this version.",
)
@click.option(
    "--device",
    default="terminal",
    show_default=True,
    help="Name of this device. A message is kept until every known device has acked it.",
)
@api_options()
@json_option
def listen(recipient: str, after: int, device: str, *, as_json: bool, **access: Any) -> None:
    """Sleep until RECIPIENT is poked, then show its new messages, until interrupted.

    If the instance cannot be reached at the start, the command fails. If the connection is lost
    later, the command reconnects.
    """
    # The terminal shows what happens: without a handler Python would print the log beside it.
    logging.getLogger("pokebridge.client").addHandler(logging.NullHandler())
    asyncio.run(_listen(recipient, after, device, Access(**access), as_json=as_json))


async def _listen(
    recipient: str, after: int, device: str, access: Access, *, as_json: bool
) -> None:
    async with access.open() as api:

        async def new_token() -> str:
            return await api.token_for(recipient, [])

        # Once before: the client would retry, and not report the error in one line.
        subject = unverified_subject(await new_token())
        if subject not in {None, recipient}:
            raise InputError(
                f"the token is for {subject}, not for {recipient}:"
                f" listen to {subject}, or give a token for {recipient}"
            )
        terminal = _Terminal(api.url, as_json=as_json, token_is_fixed=access.token is not None)
        async with PokeClient(
            api.url,
            new_token,
            terminal.show_messages,
            device=device,
            cursor=after,
            on_event=terminal.on_event,
        ) as client:
            stopped = asyncio.create_task(client.wait_stopped())
            ends: set[asyncio.Future[Any]] = {stopped, terminal.failed}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if terminal.failed.done():
                stopped.cancel()
                terminal.failed.result()
            raise ForbiddenError(f"{api.url} ended the session: {stopped.result()}")


class _Terminal:
    """Prints messages to stdout, and the events of the connection to stderr.

    ``failed`` gets the error that ends the command.
    """

    def __init__(self, url: str, *, as_json: bool, token_is_fixed: bool) -> None:
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._url = url
        self._as_json = as_json
        self._token_is_fixed = token_is_fixed
        self._was_ready = False

    async def show_messages(self, messages: Sequence[ReceivedMessage]) -> None:
        """Print them. If stdout is closed this does not return, so that they are not acked."""
        try:
            for message in messages:
                click.echo(_json_line(message) if self._as_json else _line(message))
        except OSError as error:
            self._fail(error)
            await asyncio.Event().wait()

    def on_event(self, event: AnyEvent | AnyAction) -> None:
        """Print the event, and give up if a retry would not help."""
        match event:
            case Text(text=text):
                self._on_frame(parse_frame(text))
            case Refused(status=status, reason=reason):
                self._on_loss(status == HTTPStatus.UNAUTHORIZED, reason)
            case Closed(code=code, reason=reason):
                self._on_loss(code == CLOSE_TOKEN, f"closed with {code} {reason}".rstrip())
            case PullFailed(reason=reason):
                click.echo(printable(f"a pull failed ({reason}), trying again"), err=True)
            case TokenFailed(reason=reason):
                click.echo(printable(f"no new token ({reason}), trying again"), err=True)
            case _:
                pass

    def _on_frame(self, frame: dict[str, Any]) -> None:
        if frame.get("type") == "ready":
            self._was_ready = True
        if frame.get("type") in {"ready", "poke", "move"}:
            click.echo(printable(" ".join(f"{key}={frame[key]}" for key in frame)), err=True)

    def _on_loss(self, is_about_token: bool, reason: str) -> None:  # noqa: FBT001 - one caller
        if is_about_token and (self._token_is_fixed or not self._was_ready):
            self._fail(AuthError(f"{self._url} refused the token: {reason}"))
        elif not self._was_ready:
            self._fail(UnavailableError(f"cannot connect to {self._url}: {reason}"))
        else:
            click.echo(printable(f"connection lost ({reason}), reconnecting"), err=True)

    def _fail(self, error: Exception) -> None:
        if not self.failed.done():
            self.failed.set_exception(error)


def _json_line(message: ReceivedMessage) -> str:
    return json.dumps(msgspec.to_builtins(message))


def _line(message: ReceivedMessage) -> str:
    body = json.dumps(message.body, ensure_ascii=False)
    return printable(f"{message.version} {message.sender} {body}")
