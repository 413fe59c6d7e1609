"""The tests, laid out as ``src`` is; what they share is in ``tests.support``."""
