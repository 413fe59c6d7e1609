"""Which shard a recipient is in (docs/protocol.md section 1, docs/roadmap.md)."""

from zlib import crc32

from pokebridge.errors import ConfigError

DEFAULT_SHARD_COUNT = 100
MAX_SHARD_COUNT = 10_000


def shard_of(recipient: str, shard_count: int = DEFAULT_SHARD_COUNT) -> int:
    """The shard of ``recipient``: unsigned CRC-32 (zlib's) of the whole string, modulo the count.

    A recipient is ASCII. Any other string has a shard as well, since a signal may contain one.

    >>> shard_of("urn:user:bob", 100)
    69
    """
    return crc32(recipient.encode("utf-8", "surrogatepass")) % shard_count


def check_shard_count(value: int) -> int:
    """Return ``value``, or raise :class:`ConfigError` outside 1 to 10,000.

    10,000 is Google Pub/Sub's cap on the subscriptions of a topic.
    """
    if not 1 <= value <= MAX_SHARD_COUNT:
        raise ConfigError(f"shard_count must be from 1 to {MAX_SHARD_COUNT}, not {value}")
    return value
