"""``pokebridge sessions`` and ``pokebridge disconnect``: one recipient, for an operator."""

import asyncio
import json
import time
from typing import Any
from urllib.parse import quote

import click

from pokebridge.cli.api import SUBJECT, Access, api_options
from pokebridge.cli.options import age, counted, json_option, printable
from pokebridge.model import check_recipient


@click.command(
    epilog="Example: pokebridge sessions urn:user:bob", short_help="Show where a recipient is."
)
@click.argument("recipient")
@api_options()
@json_option
def sessions(recipient: str, *, as_json: bool, **access: Any) -> None:
    """Show where RECIPIENT is connected, and what is owed to it.

    Each session has its instance, device and address, its age, and the newest version that it was
    poked for. Each device that the mailbox knows has the version up to which it has acked.
    """
    state = asyncio.run(_look_up(Access(**access), check_recipient(recipient)))
    click.echo(json.dumps(state) if as_json else "\n".join(map(printable, _lines(state))))


async def _look_up(access: Access, recipient: str) -> dict[str, Any]:
    async with access.open() as api:
        token = await api.token_for(SUBJECT, ["admin"])
        return await api.get(_path(recipient), token)


def _lines(state: dict[str, Any]) -> list[str]:
    lines = [_session(each) for each in state["sessions"]] or ["not connected"]
    if state["unanswered"]:
        lines.append(f"no answer from {', '.join(state['unanswered'])}: sessions may be missing")
    if (mailbox := state["mailbox"]) is not None:
        messages, size = counted(mailbox["messages"], "message"), counted(mailbox["bytes"], "byte")
        kept = f"{messages} kept ({size})"
        lines.append(f"mailbox: version {mailbox['head']}, {kept}")
        if mailbox["poke_owed_since_ms"] is not None:
            lines.append(f"a poke has been owed for {_since(mailbox['poke_owed_since_ms'])}")
        lines += [
            f"device {each['device']}: acked {each['acked']}, {each['behind']} behind"
            for each in mailbox["devices"]
        ]
    return lines


def _session(each: dict[str, Any]) -> str:
    told = "no version named yet" if each["told"] is None else f"poked for version {each['told']}"
    address = f" from {each['address']}" if each["address"] else ""
    where = f"connected to {each['instance']}{address}, device {each['device']}"
    return f"{where}, for {_since(each['since_ms'])}, {told}"


def _since(at_ms: int) -> str:
    return age(time.time() - at_ms / 1000)


@click.command(
    epilog="Example: pokebridge disconnect urn:user:bob --revoke",
    short_help="Close a recipient's sessions.",
)
@click.argument("recipient")
@click.option("--revoke", is_flag=True, help="Also refuse the tokens issued before now.")
@api_options()
@json_option
def disconnect(recipient: str, *, revoke: bool, as_json: bool, **access: Any) -> None:
    """Close every session of RECIPIENT, on every instance, with code 4401.

    Its clients get a new token and come back. With --revoke the tokens that it had are refused, so
    it stays away unless your service gives it a new one.
    """
    asyncio.run(_disconnect(Access(**access), check_recipient(recipient), revoke=revoke))
    if as_json:
        click.echo(json.dumps({"recipient": recipient, "revoked": revoke}))
    else:
        click.echo(f"disconnected{', and its tokens are refused' if revoke else ''}: {recipient}")


async def _disconnect(access: Access, recipient: str, *, revoke: bool) -> None:
    async with access.open() as api:
        token = await api.token_for(SUBJECT, ["admin"])
        await api.delete(_path(recipient) + ("?revoke=true" if revoke else ""), token)


def _path(recipient: str) -> str:
    encoded = quote(recipient, safe="")
    if recipient in {".", ".."}:  # which an HTTP client takes for a directory
        encoded = encoded.replace(".", "%2E")
    return f"/v1/sessions/{encoded}"
