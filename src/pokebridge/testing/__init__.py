"""What the project's tests are made of and adapters of your own can be held against.

Needs pytest: import the suites from ``pokebridge.testing.transport`` and
``pokebridge.testing.mailbox``.
"""
