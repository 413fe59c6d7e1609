"""``pokebridge poke`` and ``pokebridge send``."""

import asyncio
import json
import re
import sys
from typing import Any, NoReturn

import click

from pokebridge.api_client import encode_json
from pokebridge.cli.api import SUBJECT, Access, api_options
from pokebridge.cli.options import Number, json_option
from pokebridge.http_publisher import MAX_RECIPIENTS_PER_REQUEST, chunks

_STRING_OR_SPACE = re.compile(r'("(?:[^"\\]|\\.)*")|\s+')


@click.command(
    epilog="Example: pokebridge poke urn:user:bob urn:user:eve", short_help="Poke recipients."
)
@click.argument("recipients", metavar="RECIPIENT...", nargs=-1, required=True)
@api_options()
@json_option
def poke(recipients: tuple[str, ...], *, as_json: bool, **access: Any) -> None:
    """Poke each RECIPIENT: all of its clients wake up and pull."""
    accepted = asyncio.run(_poke(recipients, Access(**access)))
    click.echo(json.dumps({"accepted": accepted}) if as_json else f"{accepted} poked")


async def _poke(recipients: tuple[str, ...], access: Access) -> int:
    accepted = 0
    async with access.open() as api:
        token = await api.token_for(SUBJECT, ["poke"])
        for some in chunks(recipients, MAX_RECIPIENTS_PER_REQUEST):
            accepted += (await api.post("/v1/pokes", token, {"recipients": some}))["accepted"]
    return accepted


@click.command(
    epilog="""\b
    Examples:
      pokebridge send urn:user:bob '{"text": "hello"}'
      date | pokebridge send urn:user:bob -""",
    short_help="Send a message.",
)
@click.argument("recipient")
@click.argument("body")
@click.option(
    "--id", "message_id", help="Id of the message. A second message with the same id is not sent."
)
@click.option(
    "--ttl-s", type=Number(min=0.001), help="Seconds after which the message may be deleted unread."
)
@api_options()
@json_option
def send(
    recipient: str,
    body: str,
    message_id: str | None,
    ttl_s: float | None,
    *,
    as_json: bool,
    **access: Any,
) -> None:
    """Put BODY into RECIPIENT's mailbox and poke its clients.

    BODY is JSON. If it is not valid JSON, it is sent as a string. With -, BODY is read from stdin.
    """
    message: dict[str, Any] = {"recipient": recipient}
    if message_id is not None:
        message["id"] = message_id
    if ttl_s is not None:
        message["ttl_s"] = ttl_s
    # The body last, as it was written: read and written anew, 1e5 would become 100000.0.
    content = b'%b,"body":%b}' % (encode_json(message)[:-1], _body(body))
    receipt = asyncio.run(_send(content, Access(**access)))
    click.echo(
        json.dumps(receipt) if as_json else f"version {receipt['version']}, id {receipt['id']}"
    )


async def _send(message: bytes, access: Access) -> dict[str, Any]:
    async with access.open() as api:
        return await api.post("/v1/messages", await api.token_for(SUBJECT, ["send"]), message)


def _body(text: str) -> bytes:
    """The JSON of the body, without white space and escapes that only make it longer."""
    if text == "-":
        text = sys.stdin.buffer.read().decode("utf-8", "replace").removesuffix("\n")
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        if text[:1] in {"{", "[", '"'}:
            click.echo("BODY is not valid JSON, so it is sent as a string", err=True)
        return encode_json(text)
    return _STRING_OR_SPACE.sub(_shorter, text).encode("utf-8", "backslashreplace")


def _shorter(found: re.Match[str]) -> str:
    string = found[1]
    return json.dumps(json.loads(string), ensure_ascii=False) if string else ""


def _refuse(name: str) -> NoReturn:
    """NaN and Infinity are Python's, not JSON's (RFC 8259, section 6)."""
    raise ValueError(name)
