"""A small Pub/Sub server with Google's v1 gRPC API. Unlike the emulator it applies filters.

In a test, use ``async with PubSubServer() as server:`` and set PUBSUB_EMULATOR_HOST, or the
client's endpoint, to ``server.address``. On a laptop run ``python -m pokebridge.testing.pubsub``.

The server has topics, and pull subscriptions with labels, filters, ack deadlines, retention and
expiry. It answers Publish, Pull, Acknowledge, ModifyAckDeadline and StreamingPull with flow
control. It refuses what it lacks: push, ordering keys, exactly-once delivery, dead letters,
snapshots and schemas. One conformance suite (``tests/testing/test_pubsub_conformance.py``) runs
over it and over Google's emulator.
"""

from pokebridge.testing.pubsub.server import PubSubServer

__all__ = ["PubSubServer"]
