"""What an engine's URL says beside the host: options, TLS files, and no secrets in a message.

``part`` names, in errors, the setting that holds the URL: "transport", "coordination".
"""

import ssl
from collections.abc import Set as AbstractSet
from urllib.parse import parse_qsl, urlsplit

from pokebridge.errors import ConfigError

TLS_OPTIONS = frozenset({"ca_file", "cert_file", "key_file"})


def without_secrets(url: str) -> str:
    """How messages name the engine: scheme and hosts, without credentials and options."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def url_options(part: str, url: str, allowed: AbstractSet[str]) -> dict[str, str]:
    """The options in ``url``'s query; raises ConfigError for one that is not ``allowed``."""
    options = dict(parse_qsl(urlsplit(url).query, keep_blank_values=True))
    if unknown := sorted(options.keys() - allowed):
        raise ConfigError(
            f"the {part}'s URL has no option {unknown[0]!r}; it has {', '.join(sorted(allowed))}"
        )
    return options


def tls_context(part: str, given: dict[str, str]) -> ssl.SSLContext:
    """The context of :data:`TLS_OPTIONS`. Reads files; raises ConfigError when it can't."""
    try:
        context = ssl.create_default_context(cafile=given.get("ca_file"))
        if cert_file := given.get("cert_file"):
            context.load_cert_chain(cert_file, given.get("key_file"))
    except OSError as error:
        files = ", ".join(
            f"{option}={given[option]}" for option in sorted(TLS_OPTIONS & given.keys())
        )
        raise ConfigError(f"the {part}'s {files} can't be used: {error}") from None
    return context
