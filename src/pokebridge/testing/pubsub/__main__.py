"""``python -m pokebridge.testing.pubsub --port 8085``: the test server on a laptop."""

import argparse
import asyncio
import sys
from contextlib import suppress

from pokebridge.testing.pubsub.server import PubSubServer


async def _serve(port: int) -> None:
    server = PubSubServer()
    await server.start(port)
    sys.stdout.write(f"export PUBSUB_EMULATOR_HOST={server.address}\n")
    sys.stdout.flush()
    try:
        await server.wait()
    finally:
        await server.stop()


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m pokebridge.testing.pubsub",
        description="A small Pub/Sub server for tests: forgets everything when it ends.",
    )
    parser.add_argument("--port", type=int, default=0, help="loopback port; 0 picks a free one")
    port = parser.parse_args().port
    try:
        with suppress(KeyboardInterrupt):
            asyncio.run(_serve(port))
    except OSError as error:
        sys.exit(f"can't listen: {error}")


if __name__ == "__main__":
    main()
