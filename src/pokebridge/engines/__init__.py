"""How to reach an engine, for every port that rides on it: its URL, TLS, credentials, client."""


def text_of(error: Exception | None) -> str:
    """What ``error`` says, in one line."""
    return " ".join(str(error or "").split()) or "no answer"
