"""What a test needs and the machine may lack: a skip on a desk, a failure in CI."""

import os
import shutil
from typing import NoReturn

import pytest

from tests.support.environment import in_ci


def missing(what: str) -> NoReturn:
    """Skip the test because ``what`` is missing; in CI, where it must not be, fail."""
    if in_ci():
        pytest.fail(f"missing in CI: {what}", pytrace=False)
    pytest.skip(f"MISSING: {what}")


def require(program: str) -> str:
    """The path of ``program``, or its absence as :func:`missing` has it.

    A server may be in ``/usr/sbin``, which is not on everybody's path.
    """
    path = os.environ.get("PATH", os.defpath)
    return shutil.which(program, path=f"{path}:/usr/sbin") or missing(program)
