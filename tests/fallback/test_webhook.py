"""The webhook: signed as the specification says, going nowhere else, and never hanging."""

import base64

import pytest

from pokebridge.fallback.webhook import Webhook, WebhookError, signature
from tests.fallback.receiver import receiving

KEY = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")


def test_the_signature_is_the_specifications() -> None:
    """The example that the Standard Webhooks specification gives comes out."""
    body = b'{"test": 2432232314}'
    signed = signature(KEY, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body)
    assert signed == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


async def test_a_post_is_signed() -> None:
    """The signature covers id, time and body. The body is JSON."""
    async with receiving() as receiver:
        webhook = Webhook(receiver.url, KEY, clock=lambda: 1614265330.9)
        await webhook.post("push_1", b'{"recipient":"bob","version":3}')
        await webhook.close()
    [request] = receiver.requests
    assert request.json == {"recipient": "bob", "version": 3}
    headers = request.headers
    assert headers["content-type"] == "application/json"
    assert (headers["webhook-id"], headers["webhook-timestamp"]) == ("push_1", "1614265330")
    expected = signature(KEY, "push_1", 1614265330, request.body)
    assert headers["webhook-signature"] == expected


@pytest.mark.parametrize("status", ["500 Internal Server Error", "410 Gone", "101 Hm"])
async def test_whatever_is_no_success_failed(status: str) -> None:
    """Only 2xx says that the notification was taken."""
    async with receiving() as receiver:
        receiver.status = status
        webhook = Webhook(receiver.url, KEY, timeout_s=1)
        with pytest.raises(WebhookError):
            await webhook.post("push_1", b"{}")
        await webhook.close()


async def test_no_redirect_is_followed() -> None:
    """A receiver cannot redirect the notification to an address that no setting names."""
    async with receiving() as elsewhere, receiving() as receiver:
        receiver.status = "307 Temporary Redirect"
        receiver.extra = f"location: {elsewhere.url}\r\n".encode()
        webhook = Webhook(receiver.url, KEY)
        with pytest.raises(WebhookError, match="307"):
            await webhook.post("push_1", b"{}")
        await webhook.close()
        assert not elsewhere.requests


async def test_an_endless_answer_is_cut_off() -> None:
    """At most a fixed size of the answer is read. Only its status counts."""
    async with receiving() as receiver:
        receiver.status = "200 OK"
        receiver.extra = b"content-length: 1000000000000\r\n\r\n" + b"x" * 1_000_000
        webhook = Webhook(receiver.url, KEY)
        await webhook.post("push_1", b"{}")
        await webhook.close()


async def test_no_answer_is_a_failure() -> None:
    """A receiver that hangs, and one that is not there, cost a bounded time."""
    async with receiving() as receiver:
        receiver.gate.clear()
        webhook = Webhook(receiver.url, KEY, timeout_s=0.1)
        with pytest.raises(WebhookError, match=r"within 0\.1 s"):
            await webhook.post("push_1", b"{}")
        await receiver.stop()
        with pytest.raises(WebhookError):
            await webhook.post("push_1", b"{}")
        await webhook.close()
