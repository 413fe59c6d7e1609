"""The apps of the examples, run as their READMEs say."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support import Daemon, Instance, free_port

EXAMPLES = Path(__file__).parents[2] / "examples"


@contextmanager
def run_app(example: str, bridge: Instance, directory: Path) -> Iterator[Daemon]:
    """The ``app.py`` of an example, beside ``bridge``; its log says which requests it answered."""
    port = free_port()
    app_dir = str(EXAMPLES / example)
    command = [sys.executable, "-m", "uvicorn", "--app-dir", app_dir, "app:app"]
    databases = {f"{name}_DB": str(directory / f"{name}.db") for name in ("NOTES", "DOCUMENTS")}
    env = os.environ | databases | {"BRIDGE_URL": bridge.url}
    app = Daemon(
        f"{example}-app",
        [*command, "--port", str(port)],
        port=port,
        url=f"http://127.0.0.1:{port}",
        directory=directory,
        env=env,
    )
    app.start()
    try:
        yield app
    finally:
        app.kill()
