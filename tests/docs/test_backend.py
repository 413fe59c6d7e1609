"""docs/backend.md: the program in each language sends, pokes and disconnects, as it stands."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, all_blocks
from tests.support import Serve
from tests.support.serving import JWT_SECRET

PAGE = ROOT / "docs" / "backend.md"
PROGRAMS = {
    "python": (sys.executable, "program.py"),
    "js": ("node", "program.mjs"),
    "go": ("go", "run", "program.go"),
    "php": ("php", "program.php"),
}


@pytest.mark.parametrize(
    "language", ["python", "js", pytest.param("go", marks=pytest.mark.long), "php"]
)
def test_a_backend(serve: Serve, client_package: Path, tmp_path: Path, language: str) -> None:
    """Twice the same program is one message, since its id is the same."""
    command = PROGRAMS[language]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    instance = serve()
    (block,) = [each for each in all_blocks(language) if each.page == PAGE]
    source = tmp_path / command[-1]
    source.write_text(block.text.replace("http://127.0.0.1:8080", instance.url))
    modules = tmp_path / "node_modules" / "@pokebridge"
    modules.mkdir(parents=True)
    (modules / "client").symlink_to(client_package)
    env = os.environ | {"POKEBRIDGE_JWT_SECRET": JWT_SECRET}
    for _ in range(2):
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    with instance.http("urn:user:bob") as http:
        messages = http.get("/v1/messages").json()["messages"]
    assert [(each["id"], each["body"]) for each in messages] == [("order-4711", {"text": "hello"})]
