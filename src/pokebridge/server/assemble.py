"""From settings to a running instance."""

from pokebridge.errors import ConfigError
from pokebridge.server.adapters import coordination_class, transport_class
from pokebridge.settings import Settings


def check(settings: Settings) -> None:
    """Check that the chosen parts can do together what the settings ask of them.

    Raises:
        ConfigError: they can't.
        MissingExtraError: the driver of one is not installed.
    """
    if coordination_class(settings.coordination).is_shared:
        return
    need = "coordination must be a store that the instances share, like nats://HOST:PORT, for"
    if settings.roles == {"coordinator"}:
        raise ConfigError(f"{need} a coordinator: memory:// is this process only")
    if settings.mode != "fanout" and transport_class(settings.transport).is_shared:
        raise ConfigError(f"{need} mode {settings.mode}: memory:// is this process only")
