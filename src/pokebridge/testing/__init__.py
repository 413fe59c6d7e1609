"""Contract suites for adapters of your own, and a Pub/Sub server for tests.

Install the extra ``testing``, which brings pytest and pytest-asyncio, and subclass a suite:

- ``pokebridge.testing.transport.TransportContract``
- ``pokebridge.testing.mailbox.MailboxContract``, or ``DurableMailboxContract`` for a store that
  survives its process
- ``pokebridge.testing.mailbox_pushes.PushContract``, for a mailbox that can owe pushes
- ``pokebridge.testing.coordination.CoordinationContract``

``pokebridge.testing.pubsub`` needs no pytest, but the extra ``pubsub``.
"""
