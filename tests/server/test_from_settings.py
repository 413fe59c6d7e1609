"""From settings to single parts."""

import pytest
from structlog.testing import capture_logs

from pokebridge.errors import ConfigError
from pokebridge.server.from_settings import check, log_warnings
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
    """A coordinator in its own process must share the store with the instances."""
    with pytest.raises(ConfigError, match=r"coordination must be a store .* for a coordinator"):
        check_given(roles="coordinator")
    check_given(roles="coordinator", coordination="nats://h:1")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"roles": "api,processor"}, "roles api,processor"),
        ({"roles": "api"}, "roles api"),
        ({"roles": "processor"}, "roles processor"),
        ({"roles": "gateway"}, "roles gateway"),
        ({"roles": "gateway,processor"}, "roles gateway,processor"),
        ({"roles": "gateway", "no_mailbox": True}, "roles gateway"),
        ({"mailbox": "postgresql://h/d"}, "a mailbox that other instances share"),
        ({"mailbox": "postgres://h/d", "roles": "gateway,api"}, "a mailbox that other instances"),
        ({"coordination": "redis://h:1"}, "a coordination store that other instances share"),
        ({"coordination": "static://?ordinal=0&replicas=3"}, "a coordination store that other"),
    ],
)
def test_a_transport_of_this_process_only_is_refused_where_pokes_would_be_lost(
    given: dict[str, object], reason: str
) -> None:
    """Each of these implies another process that publishes pokes, or should receive them."""
    with pytest.raises(ConfigError, match=f"transport must be an engine .* for .*{reason}") as said:
        check_given(**given)
    assert "\n" not in str(said.value)
    check_given(**given, transport="nats://h:1")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"roles": "gateway,api"},
        {"no_mailbox": True},
        {"no_mailbox": True, "mailbox": "postgresql://h/d"},
        {"mailbox": "memory://"},
    ],
)
def test_one_process_needs_no_engine(given: dict[str, object]) -> None:
    """The default transport reaches every gateway there is."""
    check_given(**given)


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"mailbox": "memory://", "roles": "gateway,api"}, "processor"),
        ({"mailbox": "memory://", "roles": "gateway,processor"}, "api"),
        ({"mode": "auto", "roles": "gateway,api,processor"}, "coordinator"),
        ({"no_mailbox": True, "roles": "processor"}, "mailbox"),
    ],
)
def test_a_role_that_nobody_can_fill_is_refused(given: dict[str, object], missing: str) -> None:
    """A part that exists only in this process needs its roles in this process."""
    if "coordinator" not in missing:
        given = {"transport": "nats://h:1", **given}
    with pytest.raises(ConfigError, match=f"^roles: .*{missing}") as said:
        check_given(**given)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("given", "event"),
    [
        ({"trusted_proxies": "0.0.0.0/0"}, "trusted_proxies_too_wide"),
        ({"trusted_proxies": "10.0.0.0/8,::/0"}, "trusted_proxies_too_wide"),
        ({"jwks_url": "http://issuer.example/jwks"}, "jwks_url_unencrypted"),
        ({"jwt_secret": "s" * 40 + "\n"}, "secret_has_white_space"),
        ({"jwt_previous_secret": "\r" + "s" * 40}, "secret_has_white_space"),
        ({"trusted_proxies": "10.0.0.0/8,fd00::/16"}, None),
        ({"jwks_url": "http://127.0.0.1/jwks"}, None),
        ({"jwks_url": "https://issuer.example/jwks"}, None),
    ],
)
def test_what_is_hardly_ever_meant_is_logged(given: dict[str, object], event: str | None) -> None:
    """It works, and is said at the start."""
    with capture_logs() as logged:
        log_warnings(load_settings(None, {"dev": True} | given, {}))
    assert [entry["event"] for entry in logged] == ([event] if event else [])
