"""A process of its own that opens the mailbox of each line of stdin, and answers with a line."""

import sys
import time
from pathlib import Path

from pokebridge.errors import PokebridgeError
from pokebridge.mailbox.sqlite_file import open_file

for line in sys.stdin:
    try:
        connections, _ = open_file(Path(line.strip()), time.time())
    except PokebridgeError as error:
        print(error, flush=True)  # noqa: T201 - the answer
    else:
        for connection in connections:
            connection.close()
        print("opened", flush=True)  # noqa: T201
