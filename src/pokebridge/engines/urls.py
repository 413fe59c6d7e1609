"""The common parts of engine URLs: options and TLS files.

``part`` is the setting that holds the URL, for errors: "transport", "coordination".
"""

import ssl
from collections.abc import Set as AbstractSet
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, urlsplit

from pokebridge.errors import ConfigError
from pokebridge.urls import check_url

TLS_OPTIONS = frozenset({"ca_file", "cert_file", "key_file"})


def without_secrets(url: str) -> str:
    """Return the scheme and hosts of ``url``, without credentials and options."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def check_engine_url(part: str, url: str) -> None:
    """Check the form of ``url``. Raises ConfigError, which shows nothing of it."""
    scheme, separator, _ = url.partition("://")
    if not separator:
        raise ConfigError(f"the {part} URL must begin with a scheme and ://, like nats://")
    try:
        check_url(url, (scheme,))
    except ValueError as error:
        raise ConfigError(f"{part}: {error}") from None


def unsplit(parts: SplitResult) -> str:
    """Return the URL of ``parts``. The standard function loses the ``//`` if there is no host."""
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{parts.netloc}{parts.path}{query}"


def url_options(part: str, url: str, allowed: AbstractSet[str]) -> dict[str, str]:
    """Return the options in ``url``'s query.

    Raises:
        ConfigError: an option is not ``allowed``, or the URL is invalid.
    """
    check_engine_url(part, url)
    options = dict(parse_qsl(urlsplit(url).query, keep_blank_values=True))
    if unknown := sorted(options.keys() - allowed):
        raise ConfigError(
            f"the {part} URL has no option {unknown[0]!r}: it has {', '.join(sorted(allowed))}"
        )
    return options


def tls_context(part: str, given: dict[str, str]) -> ssl.SSLContext:
    """Create a context from :data:`TLS_OPTIONS`. Raises ConfigError when a file is unusable."""
    try:
        context = ssl.create_default_context(cafile=given.get("ca_file"))
        if cert_file := given.get("cert_file"):
            context.load_cert_chain(cert_file, given.get("key_file"))
    except OSError as error:
        files = ", ".join(
            f"{option}={given[option]}" for option in sorted(TLS_OPTIONS & given.keys())
        )
        raise ConfigError(f"the {part} URL's {files} is unusable: {error}") from None
    return context


def read_secret(part: str, option: str, path: str) -> str:
    """Return the text of the file that ``option`` names, without white space around it.

    Raises:
        ConfigError: the file is unreadable.
    """
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"the {part} URL's {option} is unreadable: {error}") from None
