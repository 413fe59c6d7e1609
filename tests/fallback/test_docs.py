"""docs/push-fallback.md: its few lines check what we send, and refuse what we do not."""

import re
import time
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from pokebridge.fallback.webhook import signature
from pokebridge.settings import Settings

DOCS = Path(__file__).parents[2] / "docs" / "push-fallback.md"
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def is_genuine() -> Any:
    """The function in the docs."""
    [snippet] = re.findall(r"```python\n(.+?)```", DOCS.read_text(), re.DOTALL)
    assert "pokebridge" not in snippet
    names: dict[str, Any] = {}
    exec(snippet, names)  # what readers are told to run
    return names["is_genuine"]


def test_the_docs_check_a_signature() -> None:
    """A signed request is genuine. With another body, id, time or key, or when old, it is not."""
    check = is_genuine()
    settings = Settings(
        dev=True, push_webhook_url="https://example.com", push_webhook_secret=SecretStr(SECRET)
    )
    now = int(time.time())
    body = b'{"recipient":"urn:user:bob","version":17}'

    def signed(at: int) -> dict[str, str]:
        return {
            "webhook-id": "push_1",
            "webhook-timestamp": str(at),
            "webhook-signature": signature(settings.push_webhook_key, "push_1", at, body),
        }

    assert check(SECRET, signed(now), body)
    two = signed(now)
    two["webhook-signature"] = "v1,bm9uZQ== " + two["webhook-signature"]
    assert check(SECRET, two, body)
    assert not check(SECRET, signed(now), body.replace(b"17", b"18"))
    assert not check(SECRET, signed(now) | {"webhook-id": "push_2"}, body)
    assert not check(SECRET, signed(now) | {"webhook-timestamp": str(now + 1)}, body)
    assert not check("whsec_" + "A" * 32, signed(now), body)
    assert not check(SECRET, signed(now - 600), body)
