"""The environment of the tests and of all that they start: the same on every desk and in CI."""

import os

_IN_CI = "TESTED_IN_CI"


def clean() -> None:
    """Forget what the caller's shell says to others. Whether this is CI is remembered.

    ``POKEBRIDGE_…`` configures an instance. The rest makes programs write colours into a file.
    """
    if os.environ.get("CI") == "true":
        os.environ[_IN_CI] = "true"
    for name in list(os.environ):
        if name.startswith("POKEBRIDGE_") or name in {"CI", "FORCE_COLOR", "CLICOLOR_FORCE"}:
            del os.environ[name]


def in_ci() -> bool:
    """Whether the caller's shell has said ``CI=true``."""
    return _IN_CI in os.environ
