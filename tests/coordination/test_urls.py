"""What the stores' URLs may be, and that no message shows their secrets."""

import pytest

from pokebridge.coordination.nats import NatsCoordination
from pokebridge.coordination.postgres import PostgresCoordination
from pokebridge.coordination.redis import RedisCoordination
from pokebridge.errors import ConfigError, CoordinationError
from tests.coordination.stores import Adapter
from tests.support import free_port


@pytest.mark.parametrize(
    ("adapter", "url"),
    [
        (PostgresCoordination, "postgresql://user:hunter2@127.0.0.1:{port}/database"),
        (PostgresCoordination, "postgres://user:hunter2@127.0.0.1:{port}"),
        (NatsCoordination, "nats://user:hunter2@127.0.0.1:{port}?replicas=3"),
        (NatsCoordination, "tls://hunter2@127.0.0.1:{port},127.0.0.1:{port}"),
        (RedisCoordination, "redis://user:hunter2@127.0.0.1:{port}/3"),
        (RedisCoordination, "rediss://:hunter2@127.0.0.1:{port}"),
    ],
)
async def test_nobody_there_is_one_line_without_secrets(adapter: type[Adapter], url: str) -> None:
    """An unreachable store is named by its address, without the password."""
    port = free_port()
    with pytest.raises(CoordinationError, match=f"127.0.0.1:{port}") as error:
        await adapter.connect(url.format(port=port), cluster="default")
    assert "hunter2" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("adapter", "url", "said"),
    [
        (PostgresCoordination, "mysql://user:hunter2@host/database", "must be postgresql://"),
        (PostgresCoordination, "postgresql://user:hunter2@host?sslmode=maybe", "sslmode"),
        (PostgresCoordination, "postgresql://user:hunter2@host:port/database", "a port must be"),
        (PostgresCoordination, "postgresql://user:hunter2/@host/database", "percent-encode"),
        (NatsCoordination, "nats://user:hunter2#@host", "percent-encode"),
        (RedisCoordination, "redis://user:[hunter2@host", "percent-encode"),
        (RedisCoordination, "redis://user:1?hunter2@host", "percent-encode"),
        (NatsCoordination, "http://user:hunter2@host", "must be nats://"),
        (NatsCoordination, "nats://user:hunter2@host?replicas=6", "replicas must be 1 to 5"),
        (NatsCoordination, "nats://user:hunter2@host?colour=red", "no option 'colour'"),
        (NatsCoordination, "nats://user:hunter2@host?creds_file=nowhere", "creds_file"),
        (RedisCoordination, "http://user:hunter2@host", "must be redis://"),
        (RedisCoordination, "redis://user:hunter2@host/zero", "HOST:PORT/DB"),
        (RedisCoordination, "redis://user:hunter2@host?colour=red", "no option 'colour'"),
        (RedisCoordination, "rediss://user:hunter2@host?ca_file=nowhere", "ca_file=nowhere"),
    ],
)
async def test_a_url_that_makes_no_sense_is_refused(
    adapter: type[Adapter], url: str, said: str
) -> None:
    """One line says what is wrong, without the password."""
    with pytest.raises(ConfigError, match=said) as error:
        await adapter.connect(url, cluster="default")
    assert "coordination" in str(error.value)
    assert "hunter2" not in str(error.value)
