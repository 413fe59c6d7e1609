"""The example with three instances on one machine."""

import asyncio
import re
import sys
from asyncio.subprocess import PIPE, STDOUT
from pathlib import Path

from tests.support import free_port

EXAMPLE = Path(__file__).parents[2] / "examples" / "three-instances"
TIMEOUT_S = 120.0


async def test_it_tells_the_story_of_its_readme() -> None:
    """A poke crosses from one instance to clients at the two others; then everything ends."""
    run = [sys.executable, str(EXAMPLE / "run.py"), "--once", "--port", str(free_port())]
    process = await asyncio.create_subprocess_exec(*run, stdout=PIPE, stderr=STDOUT)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    said = out.decode().splitlines()
    assert process.returncode == 0, said
    readme = await asyncio.to_thread((EXAMPLE / "README.md").read_text)
    story = re.findall(r"^    (\w+ {2,}.+)$", readme, re.MULTILINE)
    assert len(story) == 10

    def without_ports(lines: list[str]) -> list[str]:
        return [re.sub(r"127\.0\.0\.1:\d+", "", line) for line in lines]

    # An instance on a busy machine may log something in between.
    assert without_ports([line for line in said if line[0] != "{"]) == without_ports(story)
