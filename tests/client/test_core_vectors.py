"""The client's core against the scenarios of ``tests/vectors/client``, step by step."""

from pathlib import Path

import msgspec
import pytest

from pokebridge.client.core import ClientCore
from pokebridge.client.events import AnyAction, AnyEvent
from pokebridge.client.policy import Policy
from pokebridge.client.transports import Transport

VECTORS = Path(__file__).parent.parent / "vectors" / "client"


class Step(msgspec.Struct, forbid_unknown_fields=True):
    """An event, and what must come of it."""

    at: float
    random: float
    event: AnyEvent
    actions: list[AnyAction]
    timer: float | None


class Scenario(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A client's life from its start."""

    name: str
    url: str
    cursor: int
    policy: Policy
    transport: Transport = "websocket"
    steps: list[Step]


class File(msgspec.Struct, forbid_unknown_fields=True):
    """Scenarios about one thing."""

    about: str
    scenarios: list[Scenario]


SCENARIOS = [
    pytest.param(scenario, id=f"{path.stem}: {scenario.name}")
    for path in sorted(VECTORS.glob("*.json"))
    for scenario in msgspec.json.decode(path.read_bytes(), type=File).scenarios
]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_core_does_what_the_scenario_says(scenario: Scenario) -> None:
    """Every event brings exactly the actions, and leaves the timer, that the scenario has."""
    core = ClientCore(
        scenario.url,
        cursor=scenario.cursor,
        policy=scenario.policy,
        transport=scenario.transport,
    )
    for number, step in enumerate(scenario.steps, 1):
        actions = core.handle(step.event, now=step.at, random=step.random)
        got = Step(step.at, step.random, step.event, actions, core.timer)
        assert got == step, f"step {number}"
