"""``pokebridge cluster``: show a running cluster, migrate it, drain an instance."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from itertools import islice
from types import TracebackType
from typing import Any, Self, get_args

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pokebridge.cli.api import SUBJECT, Access, api_options
from pokebridge.cli.options import Number, age, counted, json_option
from pokebridge.errors import NotFoundError, UnavailableError
from pokebridge.model import Mode

LOOK_EVERY_S = 0.5
# Counting reads the whole mailbox.
COUNT_EVERY_S = 60.0
# Used when the output is not a terminal.
WIDTH = 160

View = Mapping[str, Any]
"""What GET /v1/cluster answers; ``status`` adds ``mailbox``, what GET /v1/mailbox answers."""


def _sessions(each: View) -> str:
    """All sessions of an instance, and those of each worker."""
    workers = "+".join(f"{worker['sessions']:,}" for worker in each.get("workers", ()))
    return f"{each['sessions']:,} ({workers})" if workers else f"{each['sessions']:,}"


# The columns of the table of instances, the most important first.
COLUMNS: Mapping[str, Callable[[View], str]] = {
    "instance": lambda each: str(each["id"]),
    "state": lambda each: each["state"] if each["settled"] else f"{each['state']}, settling",
    "sessions": _sessions,
    "shards": lambda each: str(len(each["shards"])),
    "msg/s": lambda each: f"{each['messages_per_s']:,.1f}",
    "noise": lambda each: f"{each['noise_ratio']:.1%}",
    "held": lambda each: str(each["subscriptions"]),
    "pokes/s": lambda each: f"{each['pokes_per_s']:,.1f}",
    "CPU": lambda each: f"{each['cpu_share']:.0%}",
    "MiB": lambda each: f"{each['memory_bytes'] / 2**20:,.0f}",
    "age": lambda each: age(time.time() - each["joined_at_ms"] / 1000),
    "version": lambda each: each.get("version", ""),
    "URL": lambda each: each["url"],
}
# How many columns there are room for, by the width of the terminal.
WIDTHS = {90: 12, 140: len(COLUMNS)}
NARROW_COLUMNS = 6
TEXT_COLUMNS = {"instance", "state", "version", "URL"}

_timeout_option = click.option(
    "--timeout",
    "timeout_s",
    type=Number(min=0),
    default=60.0,
    show_default=True,
    help="Seconds to wait until it is done. 0 does not wait.",
)


@click.group(short_help="Show a cluster and change it.")
def cluster() -> None:
    """Show a running cluster, migrate it, or drain one of its instances."""


@cluster.command(epilog="Example: pokebridge cluster status --watch", short_help="Show a cluster.")
@click.option("--watch", is_flag=True, help="Refresh until interrupted.")
@api_options()
@json_option
def status(*, watch: bool, as_json: bool, **access: Any) -> None:
    """Show the instances, their shards and sessions, the load and the red line, and the mailbox.

    What the mailbox holds is counted, which reads all of it: with --watch, once a minute.
    """
    asyncio.run(_status(Access(**access), watch=watch, as_json=as_json))


async def _status(access: Access, *, watch: bool, as_json: bool) -> None:
    async with _Looker(access) as looker:
        view = await looker.with_mailbox(await looker.look())
        if not watch:
            _print(view, as_json=as_json)
            return
        if as_json:  # one line for each refresh, for a program that reads it
            async for view in looker.views():
                click.echo(json.dumps(await looker.with_mailbox(view)))
            return
        console = _console()
        drawn = _drawn(view, console.width)
        with Live(drawn, console=console, auto_refresh=False, screen=False) as live:
            async for view in looker.views():
                seen = await looker.with_mailbox(view)
                live.update(_drawn(seen, console.width), refresh=True)


@cluster.command(
    epilog="Example: pokebridge cluster mode partitioned", short_help="Migrate a cluster."
)
@click.argument("mode", type=click.Choice(get_args(Mode)))
@click.option(
    "--force",
    is_flag=True,
    help="Migrate even if many signals carry no shard, which every instance still receives.",
)
@_timeout_option
@api_options()
@json_option
def mode(mode: str, *, force: bool, timeout_s: float, as_json: bool, **access: Any) -> None:
    """Migrate a running cluster to MODE, without a restart and without losing a poke.

    Every instance opens its new subscriptions, proves that they deliver, and closes the old ones.
    The same command migrates back, at any time. Exit status 1: not every instance finished in time.
    """
    asyncio.run(_migrate(Access(**access), mode, timeout_s, force=force, as_json=as_json))


async def _migrate(
    access: Access, mode: str, timeout_s: float, *, force: bool, as_json: bool
) -> None:
    async with _Looker(access) as looker:
        await looker.migrate(mode, force=force)
        done: set[str] = set()

        def is_done(view: View) -> bool:
            _tell_progress(view, mode, done)
            return view["mode"] == mode and len(done) == len(view["instances"])

        await looker.wait(is_done, timeout_s, lambda: f"not every instance is in mode {mode} yet")
        _print(await looker.look(), as_json=as_json)


def _tell_progress(view: View, mode: str, done: set[str]) -> None:
    """Report on stderr which instances have applied the current shard map."""
    if view["mode"] != mode:
        return
    instances = view["instances"]
    for each in instances:
        if each["settled"] and each["epoch"] >= view["epoch"] and each["id"] not in done:
            done.add(each["id"])
            click.echo(f"{each['id']} is {mode} ({len(done)} of {len(instances)})", err=True)
    done &= {each["id"] for each in instances}


@cluster.command(
    epilog="Example: pokebridge cluster drain 4f2a9c01", short_help="Drain an instance."
)
@click.argument("instance")
@_timeout_option
@api_options()
@json_option
def drain(instance: str, *, timeout_s: float, as_json: bool, **access: Any) -> None:
    """Make INSTANCE give up its shards and then its sessions, which move to the new owners.

    The instance keeps running, without sessions and not ready, until it is stopped. Exit status 1:
    it still has sessions or shards.
    """
    asyncio.run(_drain(Access(**access), instance, timeout_s, as_json=as_json))


async def _drain(access: Access, instance: str, timeout_s: float, *, as_json: bool) -> None:
    async with _Looker(access) as looker:
        await looker.drain(instance)
        left = ""

        def is_done(view: View) -> bool:
            nonlocal left
            seen = [each for each in view["instances"] if each["id"] == instance]
            sessions = sum(each["sessions"] for each in seen)
            shards = sum(len(each["shards"]) for each in seen)
            if (now := f"{sessions} sessions and {shards} shards") != left:
                left = now
                click.echo(f"{instance} has {left}", err=True)
            return not sessions + shards and all(each["state"] == "draining" for each in seen)

        await looker.wait(is_done, timeout_s, lambda: f"{instance} still has {left}")
        if timeout_s:
            click.echo(f"{instance} is drained, and safe to stop", err=True)
        _print(await looker.look(), as_json=as_json)


class _Looker:
    """Sees the cluster through one of its instances. Close it (``async with``)."""

    def __init__(self, access: Access) -> None:
        self._api = access.open()
        self._token = ""
        self._mailbox: View | None = None
        self._counted_at_s = -COUNT_EVERY_S

    async def __aenter__(self) -> Self:
        await self._api.__aenter__()
        self._token = await self._api.token_for(SUBJECT, ["admin"])
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._api.__aexit__(kind, error, traceback)

    async def migrate(self, mode: str, *, force: bool) -> None:
        await self._api.put("/v1/cluster/mode", self._token, {"mode": mode, "force": force})

    async def drain(self, instance: str) -> None:
        await self._api.post("/v1/cluster/drain", self._token, {"instance": instance})

    async def look(self) -> View:
        return await self._api.get("/v1/cluster", self._token)

    async def with_mailbox(self, view: View) -> View:
        """``view`` and what the mailbox holds: ``None`` if there is none, or it can't answer."""
        now_s = time.monotonic()
        if now_s >= self._counted_at_s + COUNT_EVERY_S:
            self._counted_at_s = now_s
            try:
                self._mailbox = await self._api.get("/v1/mailbox", self._token)
            except (NotFoundError, UnavailableError) as error:
                self._mailbox = None
                if isinstance(error, UnavailableError):
                    click.echo(f"the mailbox is not counted: {error}", err=True)
        return {**view, "mailbox": self._mailbox}

    async def views(self) -> AsyncIterator[View]:
        """The cluster, again and again. If the instance restarts, wait for it."""
        while True:
            try:
                yield await self.look()
            except UnavailableError as error:
                click.echo(str(error), err=True)
            await asyncio.sleep(LOOK_EVERY_S)

    async def wait(
        self, is_done: Callable[[View], bool], timeout_s: float, undone: Callable[[], str]
    ) -> None:
        """Look until ``is_done``. A ``timeout_s`` of 0 does not wait.

        Raises:
            UnavailableError: it was not done within ``timeout_s`` seconds. ``undone`` says what.
        """
        if not timeout_s:
            return
        try:
            async with asyncio.timeout(timeout_s):
                async for view in self.views():
                    if is_done(view):
                        return
        except TimeoutError:
            raise UnavailableError(f"{undone()}, after {timeout_s:g} s") from None


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def _print(view: View, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(view))
    else:
        console = _console()
        console.print(_drawn(view, console.width))


def _drawn(view: View, width: int) -> Group:
    """The cluster for people: a table of its instances, and its load below."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    # A narrow terminal shows the first columns only: a table that wraps is unreadable.
    fitting = [count for at_least, count in WIDTHS.items() if width >= at_least]
    columns = dict(islice(COLUMNS.items(), max(fitting, default=NARROW_COLUMNS)))
    for name in columns:
        is_text = name in TEXT_COLUMNS
        table.add_column(name, justify="left" if is_text else "right", no_wrap=not is_text)
    for each in view["instances"]:
        table.add_row(*(form(each) for form in columns.values()))
    mailbox = view.get("mailbox")
    return Group(table, _load(view), *([] if mailbox is None else [_mailbox(mailbox)]))


def _load(view: View) -> Text:
    traffic = view["traffic"]
    ops, line = traffic["global_ops_per_s"], traffic["red_line"]
    style = "bold red" if traffic["over_red_line"] else "green"
    name = view.get("name")  # release 0.1.0 does not say
    return Text.assemble(
        f"cluster {name}: " if name else "",
        f"{view['mode']}, epoch {view['epoch']}, {view['shard_count']} shards: ",
        f"{traffic['messages_per_s']:,.1f} messages/s, ",
        (f"{ops:,.0f} of {line:,.0f} ops/s", style),
        f", noise {traffic['noise_ratio']:.1%}",
    )


def _mailbox(totals: View) -> Text:
    owed = f"{counted(totals['pokes_owed'], 'poke')} owed"
    if (since_ms := totals["poke_owed_since_ms"]) is not None:
        owed += f" for {age(time.time() - since_ms / 1000)}"
    size = totals["bytes"]
    stored = f"{size / 2**20:,.1f} MiB" if size >= 2**20 else counted(size, "byte")
    kept = f"{counted(totals['messages'], 'message')} ({stored})"
    pushes = f", {totals['pushes_owed']:,} pushes owed" if totals["pushes_owed"] else ""
    recipients = counted(totals["recipients"], "recipient")
    return Text(f"mailbox: {kept} of {recipients}, {owed}{pushes}")
