"""What a client's socket carries, against the scenarios of ``tests/vectors/listening``."""

from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest

from pokebridge.client.events import AnyEvent
from pokebridge.client.listens import Given, Listens

VECTORS = Path(__file__).parent.parent / "vectors" / "listening" / "listening.json"


class Happening(msgspec.Struct, forbid_unknown_fields=True):
    """Something that happened to the socket, or that a recipient's core wants."""

    type: Literal["ready", "lost", "refused", "text", "carry", "drop"]
    text: str = ""
    recipient: str = ""


class Step(msgspec.Struct, forbid_unknown_fields=True):
    """What happened, and what must come of it."""

    event: Happening
    does: str
    gives: list[tuple[str, AnyEvent]]


class Scenario(msgspec.Struct, forbid_unknown_fields=True):
    """The life of a client."""

    name: str
    steps: list[Step]


class File(msgspec.Struct, forbid_unknown_fields=True):
    """Scenarios about one thing."""

    about: str
    scenarios: list[Scenario]


SCENARIOS = msgspec.json.decode(VECTORS.read_bytes(), type=File).scenarios


def carry_out(listens: Listens, event: Happening) -> tuple[str, list[Given]]:
    """Tell what happened. Returns what is to be done, and the events for others."""
    does, gives = "nothing", list[Given]()
    match event.type:
        case "ready":
            gives += listens.ready(event.text)
        case "lost":
            gives += listens.lose()
        case "refused":
            gives += listens.refuse()
        case "carry":
            does = "wait" if listens.at_most is None else "own_socket"
            if listens.carry(event.recipient):
                does = "listen"
        case "drop" if listens.drop(event.recipient):
            does = "unlisten"
        case "text":
            given = listens.hear(event.text)
            does = "own" if given is None else "nothing"
            gives += [] if given is None else [given]
    return does, gives


def plain(given: Any) -> Any:
    """An event with the frame in it as JSON, whose keys have no order."""
    recipient, event = given
    fields = msgspec.to_builtins(event)
    if "text" in fields:
        fields["text"] = msgspec.json.decode(fields["text"])
    return recipient, fields


@pytest.mark.parametrize("scenario", [pytest.param(s, id=s.name) for s in SCENARIOS])
def test_the_socket_carries_what_the_scenario_says(scenario: Scenario) -> None:
    """Every event has exactly the actions of the scenario."""
    listens = Listens()
    for number, step in enumerate(scenario.steps, 1):
        does, gives = carry_out(listens, step.event)
        assert does == step.does, f"step {number}"
        assert [plain(each) for each in gives] == [plain(each) for each in step.gives], (
            f"step {number}"
        )
