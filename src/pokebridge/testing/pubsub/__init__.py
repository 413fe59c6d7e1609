"""A small Pub/Sub server that speaks Google's v1 gRPC API and, unlike the emulator, filters.

In a test: ``async with PubSubServer() as server:`` and PUBSUB_EMULATOR_HOST or the client's
endpoint set to ``server.address``. On a laptop: ``python -m pokebridge.testing.pubsub``.

It has topics; pull subscriptions with labels, filters, ack deadlines, retention and expiry;
Publish, Pull, Acknowledge, ModifyAckDeadline and StreamingPull with flow control. It has no push,
ordering keys, exactly-once delivery, dead letters, snapshots and schemas, and refuses them.
One conformance suite (``tests/testing/test_pubsub_conformance.py``) runs over it and over Google's
emulator.
"""

from pokebridge.testing.pubsub.server import PubSubServer

__all__ = ["PubSubServer"]
