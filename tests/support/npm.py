"""Directories with a ``package.json``, built as their users build them."""

import fcntl
import os
import subprocess
import uuid
from pathlib import Path

import pytest

from tests.support.missing import missing, require

ROOT = Path(__file__).parents[2]
CLIENT = ROOT / "clients" / "js"
# The same value in all processes of a run.
RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID") or uuid.uuid4().hex


def build(directory: Path) -> None:
    """``npm run build``, once in a run of the tests: others may use already what it made."""
    npm = require("npm")
    modules = directory / "node_modules"
    if not modules.is_dir():
        name = directory.relative_to(ROOT)
        missing(f"what {name} is built with (npm ci in {name})")
    with (modules / ".built-by").open("a+") as built_by:
        fcntl.flock(built_by, fcntl.LOCK_EX)
        built_by.seek(0)
        if built_by.read() == RUN:
            return
        subprocess.run([npm, "run", "--silent", "build"], cwd=directory, check=True)
        built_by.truncate(0)
        built_by.write(RUN)


@pytest.fixture(scope="session")
def client_package() -> Path:
    """``clients/js``, freshly built."""
    build(CLIENT)
    return CLIENT
