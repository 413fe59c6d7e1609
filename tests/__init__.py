"""The tests, laid out as ``src`` is; what they share is in ``tests.support``."""

import pytest

# The contract suites that are shipped are tests too: a failed assertion shows its values.
pytest.register_assert_rewrite("pokebridge.testing")
