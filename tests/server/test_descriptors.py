"""What fits into the limit of open files."""

import os
import subprocess
from pathlib import Path

from tests.support.serving import JWT_SECRET, POKEBRIDGE


def test_more_workers_than_fit_are_refused_at_start(tmp_path: Path) -> None:
    """In one line, which says what to change."""
    serve = f"ulimit -n 150 && exec {POKEBRIDGE} serve --port 0 --workers 64 --mailbox sqlite:///m"
    process = subprocess.run(
        ["/bin/sh", "-c", serve],
        cwd=tmp_path,
        env=os.environ | {"POKEBRIDGE_JWT_SECRET": JWT_SECRET},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode
    (said,) = (line for line in process.stderr.splitlines() if line.startswith("pokebridge: "))
    assert "the hub of 64 workers needs" in said
    assert "only 150 may be open: set fewer workers" in said
    assert "Traceback" not in process.stderr
