"""A client of the app. It sleeps until a poke, pulls from the app, and prints new notes."""

import asyncio
import os
import sys

import httpx

from pokebridge.client import PokeClient

BRIDGE = os.environ.get("BRIDGE_URL", "http://127.0.0.1:8080")
APP = os.environ.get("APP_URL", "http://127.0.0.1:8000")


async def main(owner: str) -> None:
    """Watch the notes of ``owner`` until interrupted."""
    async with httpx.AsyncClient() as http:

        async def token() -> str:
            answer = await http.post(f"{BRIDGE}/v1/dev/token", json={"sub": owner})
            return str(answer.raise_for_status().json()["token"])

        async def pull(after: int) -> int:
            answer = await http.get(f"{APP}/notes", params={"owner": owner, "after": after})
            for note in answer.raise_for_status().json():
                print(note["id"], note["text"], flush=True)
                after = note["id"]
            return after

        async with PokeClient(BRIDGE, token, on_poke=pull) as client:
            await client.wait_stopped()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
