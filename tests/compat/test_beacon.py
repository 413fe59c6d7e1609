"""What release 0.1.0 makes of the beacons that this one publishes."""

import os
import subprocess
import sys
from pathlib import Path

from pokebridge.wire import Beacon, encode_beacon

WHEEL = Path(__file__).parent / "pokebridge-0.1.0-py3-none-any.whl"
BEACON = Beacon(
    sender="new",
    incarnation="1f",
    number=7,
    up_s=12.5,
    every_s=2.0,
    cluster="default",
    shard_count=100,
    carrier="filter",
    assignment="coordinator",
    group_prefixes="urn:room:",
)
READ_IT = """
import sys
from pokebridge.wire import decode_signal, is_probe
body = sys.stdin.buffer.read()
print(decode_signal(body), is_probe(body))
"""


def test_it_takes_a_beacon_for_another_instances_probe() -> None:
    """It drops the beacon and counts it neither as malformed nor as untagged, so no alert fires."""
    read = subprocess.run(
        [sys.executable, "-c", READ_IT],
        input=encode_beacon(BEACON),
        env=os.environ | {"PYTHONPATH": str(WHEEL)},
        capture_output=True,
        check=True,
    )
    assert read.stdout.decode().split() == ["Probe(id='new:1f:7')", "True"]
