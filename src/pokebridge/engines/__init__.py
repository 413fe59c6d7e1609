"""What the adapters of one engine share: its URL, TLS, credentials and client."""


def text_of(error: Exception | None) -> str:
    """Return the text of ``error`` as one line."""
    return " ".join(str(error or "").split()) or "no answer"
