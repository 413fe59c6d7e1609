"""Which shard a recipient is in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pokebridge.errors import ConfigError
from pokebridge.sharding import check_shard_count, shard_of


@pytest.mark.parametrize(
    ("recipient", "crc"),
    [
        ("123456789", 0xCBF43926),  # the check value of CRC-32/ISO-HDLC in the CRC catalogue
        ("bob", 0xF5CBB140),
        ("urn:user:bob", 0x6244ADA5),
    ],
)
@pytest.mark.parametrize("shard_count", [1, 2, 100, 10_000])
def test_a_shard_is_the_crc_modulo_the_count(recipient: str, crc: int, shard_count: int) -> None:
    """Known CRC-32 values give the shards that any other publisher computes."""
    assert shard_of(recipient, shard_count) == crc % shard_count


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=256))
def test_a_shard_is_always_in_range(recipient: str) -> None:
    """Every recipient has a shard from 0 up to the count, never a negative one."""
    assert 0 <= shard_of(recipient) < 100


@given(st.text(st.characters(exclude_categories=[])))
def test_any_string_has_a_shard(text: str) -> None:
    """The hash accepts any string, also lone surrogates, because a signal may contain them."""
    assert 0 <= shard_of(text) < 100


@pytest.mark.parametrize("value", [0, -1, 10_001])
def test_impossible_shard_counts_are_refused(value: int) -> None:
    """A count that no cluster can have is a ConfigError that says so."""
    with pytest.raises(ConfigError, match="shard_count"):
        check_shard_count(value)
