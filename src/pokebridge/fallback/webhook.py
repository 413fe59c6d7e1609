"""A signed POST by the Standard Webhooks specification (version 1.0.0).

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import asyncio
import base64
import hashlib
import hmac
import time
from collections.abc import Callable
from typing import Final

import httpx

from pokebridge.errors import UnavailableError
from pokebridge.outgoing import http_client

TIMEOUT_S: Final = 10.0
# The most that is read of a response, so that its connection can be reused. A larger one closes it.
ANSWER_BYTES: Final = 16 * 1024


class WebhookError(UnavailableError):
    """The receiver did not answer with a 2xx status."""


def signature(key: bytes, webhook_id: str, timestamp: int, body: bytes) -> str:
    """The value of ``webhook-signature``: HMAC-SHA256 of id, time (Unix, seconds) and body."""
    signed = b"%b.%d.%b" % (webhook_id.encode(), timestamp, body)
    digest = hmac.new(key, signed, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


class Webhook:
    """One receiver, at the operator's ``url``: https, or http for development.

    Redirects are not followed: only the operator decides where a notification goes.

    - ``timeout_s``: the time for a whole attempt
    - ``_url``: the receiver
    - ``_key``: signs the notifications
    - ``_clock``: Unix time in seconds
    - ``_http``: the connections
    """

    def __init__(
        self,
        url: str,
        key: bytes,
        *,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.timeout_s = timeout_s
        self._url = url
        self._key = key
        self._clock = clock
        self._http = http_client(
            url,
            timeout=timeout_s,
            headers={"user-agent": "pokebridge", "content-type": "application/json"},
        )

    async def post(self, webhook_id: str, body: bytes) -> None:
        """Return when the receiver has answered with a 2xx status, within ``timeout_s``.

        Raises:
            WebhookError: it has not. It may have accepted the notification nevertheless.
        """
        timestamp = int(self._clock())
        headers = {
            "webhook-id": webhook_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signature(self._key, webhook_id, timestamp, body),
        }
        try:
            async with (
                asyncio.timeout(self.timeout_s),
                self._http.stream("POST", self._url, content=body, headers=headers) as answer,
            ):
                await _read_some(answer)
        except TimeoutError:
            raise WebhookError(f"no answer within {self.timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise WebhookError(f"{type(error).__name__}: {error}") from error
        if not answer.is_success:
            raise WebhookError(f"it answered {answer.status_code} {answer.reason_phrase}")

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()


async def _read_some(answer: httpx.Response) -> None:
    size_bytes = 0
    async for chunk in answer.aiter_raw():
        size_bytes += len(chunk)
        if size_bytes > ANSWER_BYTES:
            return
