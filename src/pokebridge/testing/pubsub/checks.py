"""What Pub/Sub accepts: names, labels, durations, messages. Errors are worded as the emulator's.

Sources: the comments of Google's ``pubsub.proto``, its "Quotas and limits" page, and what Google's
emulator answers.
"""

import re
from typing import Any

from grpc import StatusCode

MINUTE_S = 60
DAY_S = 24 * 60 * MINUTE_S
MIN_RETENTION_S, DEFAULT_RETENTION_S, MAX_RETENTION_S = 10 * MINUTE_S, 7 * DAY_S, 31 * DAY_S
MIN_EXPIRY_S, DEFAULT_EXPIRY_S = DAY_S, 31 * DAY_S
MIN_ACK_DEADLINE_S, DEFAULT_ACK_DEADLINE_S, MAX_ACK_DEADLINE_S = 10, 10, 600
MAX_MESSAGES_A_PUBLISH = 1000
MAX_PUBLISH_SIZE_BYTES = 10_000_000
MAX_ATTRIBUTES, MAX_ATTRIBUTE_KEY_BYTES, MAX_ATTRIBUTE_VALUE_BYTES = 100, 256, 1024
MAX_LABELS = 64

_NAME = re.compile(
    r"projects/[^/]+/(topics|subscriptions)/(?!goog)[A-Za-z][A-Za-z0-9._~+%-]{2,254}"
)
_LABEL_KEY = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_LABEL_VALUE = re.compile(r"[a-z0-9_-]{0,63}")
_ACK_ID = re.compile(r"projects/.+:[0-9]+")


class ApiError(Exception):
    """A call fails with this status."""

    def __init__(self, code: StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code
        self.details = details


def invalid(details: str) -> ApiError:
    """INVALID_ARGUMENT."""
    return ApiError(StatusCode.INVALID_ARGUMENT, details)


def not_found(details: str) -> ApiError:
    """NOT_FOUND."""
    return ApiError(StatusCode.NOT_FOUND, details)


def check_name(kind: str, name: str) -> None:
    """``name`` is a full resource name of ``kind`` (``topics`` or ``subscriptions``)."""
    found = _NAME.fullmatch(name)
    if found is None or found.group(1) != kind:
        raise invalid(f"Invalid [{kind}] name: (name={name})")


def check_labels(labels: Any) -> None:
    """At most 64 labels of lower-case letters, digits, ``_`` and ``-``, up to 63 characters."""
    if len(labels) > MAX_LABELS:
        raise invalid(f"More than {MAX_LABELS} labels")
    for key, value in labels.items():
        if not (_LABEL_KEY.fullmatch(key) and _LABEL_VALUE.fullmatch(value)):
            raise invalid(f"Invalid label: (key={key}, value={value})")


def check_subscription(config: Any) -> None:
    """The bounds of a subscription's durations, and that it asks for nothing this server lacks."""
    check_labels(config.labels)
    if not MIN_ACK_DEADLINE_S <= config.ack_deadline_seconds <= MAX_ACK_DEADLINE_S:
        raise invalid("ack_deadline_secs out of bounds")
    retention_s = config.message_retention_duration.seconds
    if not MIN_RETENTION_S <= retention_s <= MAX_RETENTION_S:
        raise invalid("message_retention_duration out of bounds")
    expires = config.expiration_policy.HasField("ttl")
    expiry_s = config.expiration_policy.ttl.seconds
    if expires and not max(MIN_EXPIRY_S, retention_s) <= expiry_s:
        raise invalid("expiration_policy.ttl is below 1 day or below the retention")
    if (
        config.push_config.push_endpoint
        or config.enable_message_ordering
        or config.enable_exactly_once_delivery
        or config.retain_acked_messages
        or config.HasField("dead_letter_policy")
    ):
        raise ApiError(
            StatusCode.UNIMPLEMENTED,
            "this server has no push, ordering, exactly-once, replay or dead letters",
        )


def check_stream_deadline(deadline_s: int) -> None:
    """A stream's ack deadline is 10 to 600 seconds."""
    if not MIN_ACK_DEADLINE_S <= deadline_s <= MAX_ACK_DEADLINE_S:
        raise invalid("stream_ack_deadline_seconds must be between 10 and 600 seconds")


def check_ack_ids(ack_ids: Any) -> None:
    """Well-formed ack ids: one that has expired is no error."""
    for ack_id in ack_ids:
        if not _ACK_ID.fullmatch(ack_id):
            raise invalid(f"Invalid ack id (ack_id={ack_id})")


def check_messages(messages: Any) -> None:
    """1 to 1,000 messages of together at most 10 MB, each with data or attributes."""
    if not messages:
        raise invalid("No messages to publish")
    if len(messages) > MAX_MESSAGES_A_PUBLISH:
        raise invalid("Too many messages to publish")
    if sum(message.ByteSize() for message in messages) > MAX_PUBLISH_SIZE_BYTES:
        raise invalid("The publish request is too large")
    for message in messages:
        if not (message.data or message.attributes):
            raise invalid("Some messages are empty")
        if len(message.attributes) > MAX_ATTRIBUTES:
            raise invalid(f"More than {MAX_ATTRIBUTES} attributes")
        for key, value in message.attributes.items():
            if not 0 < len(key.encode()) <= MAX_ATTRIBUTE_KEY_BYTES or key.startswith("goog"):
                raise invalid(f"Invalid attribute key: {key[:32]!r}")
            if len(value.encode()) > MAX_ATTRIBUTE_VALUE_BYTES:
                raise invalid(f"The value of attribute {key!r} is too long")
