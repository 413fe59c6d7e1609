"""From settings to single parts."""

import pytest

from pokebridge.errors import ConfigError
from pokebridge.server.from_settings import check
from pokebridge.settings import load_settings


def check_given(**given: object) -> None:
    """Check the settings that have these values."""
    check(load_settings(None, {"dev": True, **given}, {}))


@pytest.mark.parametrize("mode", ["partitioned", "auto"])
def test_a_mode_that_needs_agreement_needs_a_store(mode: str) -> None:
    """With an engine as the transport, instances without a shared store can't change the mode."""
    with pytest.raises(ConfigError, match=f"coordination must be a store .* for mode {mode}"):
        check_given(mode=mode, transport="nats://h:1")
    check_given(mode=mode, transport="nats://h:1", coordination="redis://h:1")
    check_given(mode=mode)


def test_a_coordinator_alone_needs_a_store() -> None:
    """A Coordinator in a process of its own must share the store with the instances."""
    with pytest.raises(ConfigError, match=r"coordination must be a store .* for a coordinator"):
        check_given(roles="coordinator")
    check_given(roles="coordinator", coordination="nats://h:1")
