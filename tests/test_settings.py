"""Settings: precedence, defaults, and one line for everything that is wrong."""

import base64
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pokebridge import settings as settings_module
from pokebridge.errors import ConfigError
from pokebridge.settings import Settings, load_settings

SECRET = "a-secret-of-more-than-32-bytes-for-tests"


def toml(tmp_path: Path, text: str) -> Path:
    """A TOML file with ``text``."""
    path = tmp_path / "pokebridge.toml"
    path.write_text(text)
    return path


def refusal(
    overrides: dict[str, Any] | None = None,
    environ: dict[str, str] | None = None,
    config_file: Path | None = None,
) -> str:
    """The line with which these settings are refused."""
    with pytest.raises(ConfigError) as caught:
        load_settings(config_file, {"dev": True} | (overrides or {}), environ or {})
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_flag_beats_the_environment_beats_the_file(tmp_path: Path) -> None:
    """protocol.md section 6: precedence flag, then environment, then file."""
    path = toml(tmp_path, 'port = 1\ninstance = "a"\nshard_count = 7\ndev = true\n')
    environ = {"POKEBRIDGE_PORT": "2", "POKEBRIDGE_INSTANCE": "b"}
    found = load_settings(path, {"port": "3", "host": None}, environ)
    assert (found.port, found.instance, found.shard_count, found.host) == (3, "b", 7, "127.0.0.1")


def test_the_environment_names_the_file(tmp_path: Path) -> None:
    """POKEBRIDGE_CONFIG stands for --config, which beats it."""
    path = toml(tmp_path, "shard_count = 7\ndev = true\n")
    environ = {"POKEBRIDGE_CONFIG": str(path)}
    assert load_settings(None, {}, environ).shard_count == 7
    other = tmp_path / "other.toml"
    other.write_text("shard_count = 8\ndev = true\n")
    assert load_settings(other, {}, environ).shard_count == 8


def test_dev_opens_what_is_closed_otherwise() -> None:
    """Limits, origins and the log's form depend on dev; each can still be set."""
    dev = Settings(dev=True)
    assert (dev.handshakes_per_s, dev.max_sessions_per_address) == (None, None)
    assert (dev.allowed_origins, dev.log_format) == (("*",), "console")
    prod = load_settings(None, {"jwt_secret": SECRET}, {})
    assert (prod.handshakes_per_s, prod.max_sessions_per_address) == (500, 1000)
    assert (prod.allowed_origins, prod.log_format) == ((), "json")
    own = load_settings(None, {"dev": True, "handshakes_per_s": 9, "allowed_origins": ""}, {})
    assert (own.handshakes_per_s, own.allowed_origins) == (9, ())


def test_zero_switches_a_limit_off() -> None:
    """The only way to say None in a flag or a variable."""
    environ = {"POKEBRIDGE_HANDSHAKES_PER_S": "0", "POKEBRIDGE_JWT_SECRET": SECRET}
    assert load_settings(None, {"max_sessions_per_address": 0}, environ).handshakes_per_s is None


def test_dev_makes_a_secret_unless_one_is_given() -> None:
    """A random one, different each time; a given one is kept, so that instances agree."""
    first, second = Settings(dev=True).jwt_secret, Settings(dev=True).jwt_secret
    assert first is not None
    assert len(first.get_secret_value()) >= 32
    assert first != second
    given = load_settings(None, {"dev": True}, {"POKEBRIDGE_JWT_SECRET": SECRET}).jwt_secret
    assert given is not None
    assert given.get_secret_value() == SECRET


def test_without_keys_there_is_no_start() -> None:
    """Not in dev, somebody must say how tokens are verified; either way will do."""
    assert "jwt_secret" in refusal({"dev": None})
    assert "jwks_url" in refusal({"dev": None})
    assert load_settings(None, {"jwks_url": "https://issuer/keys"}, {}).jwt_secret is None


def test_lists_come_with_commas_or_as_lists(tmp_path: Path) -> None:
    """In variables and flags, and in TOML."""
    path = toml(tmp_path, 'dev = true\nallowed_origins = ["https://a.example", "app://b"]\n')
    environ = {"POKEBRIDGE_TRUSTED_PROXIES": "10.0.0.0/8, ::1"}
    found = load_settings(path, {}, environ)
    assert found.allowed_origins == ("https://a.example", "app://b")
    assert found.trusted_proxies == (ip_network("10.0.0.0/8"), ip_network("::1"))


def test_kubernetes_service_links_are_no_settings() -> None:
    """A Service called pokebridge puts such variables into every container of its namespace."""
    environ = {
        "POKEBRIDGE_PORT": "tcp://10.0.0.1:8080",
        "POKEBRIDGE_SERVICE_HOST": "10.0.0.1",
        "POKEBRIDGE_SERVICE_PORT": "8080",
        "POKEBRIDGE_SERVICE_PORT_HTTP": "8080",
        "POKEBRIDGE_PORT_8080_TCP": "tcp://10.0.0.1:8080",
        "POKEBRIDGE_PORT_8080_TCP_ADDR": "10.0.0.1",
        "POKEBRIDGE_NATS_PORT": "tcp://10.0.0.2:4222",
        "POKEBRIDGE_NATS_SERVICE_HOST": "10.0.0.2",
    }
    assert load_settings(None, {"dev": True}, environ).port == 8080


def test_client_variables_and_empty_ones_are_no_settings() -> None:
    """POKEBRIDGE_URL and _TOKEN are for clients; compose files pass empty values for unset ones."""
    environ = {
        "POKEBRIDGE_URL": "x",
        "POKEBRIDGE_TOKEN": "x",
        "POKEBRIDGE_JWKS_URL": "",
        "PATH": "",
    }
    assert load_settings(None, {"dev": True}, environ).jwks_url is None


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("advertise_url", "wss://b1/", "wss://b1"),
        ("advertise_url", "wss://b1/v1/connect", "wss://b1"),
        ("advertise_url", "wss://b1:8443/i/one/v1/connect/", "wss://b1:8443/i/one"),
        ("advertise_url", "ws://[::1]:8080", "ws://[::1]:8080"),
        ("allowed_origins", "HTTPS://A.example:443", ("https://a.example",)),
        ("allowed_origins", "https://*.a.example,*", ("https://*.a.example", "*")),
        ("trusted_proxies", "::ffff:10.0.0.0/104", (ip_network("10.0.0.0/8"),)),
        ("jwks_url", "https://u:p%40@[::1]:8443/k?a=b:c", "https://u:p%40@[::1]:8443/k?a=b:c"),
    ],
)
def test_a_value_is_brought_into_its_normal_form(name: str, value: str, meant: Any) -> None:
    """What can only mean one thing is accepted as that."""
    assert getattr(load_settings(None, {"dev": True, name: value}, {}), name) == meant


@pytest.mark.parametrize(
    ("name", "value", "meaning"),
    [
        ("host", "", "address or a name"),
        ("host", "two words", "address or a name"),
        ("host", "0.0.0.0:8080", "without a port"),
        ("host", "http://b1", "address or a name"),
        ("port", "http", "integer"),
        ("port", -1, "0"),
        ("port", 80.5, "integer"),
        ("port", 70000, "65535"),
        ("shard_count", 0, "greater than or equal to 1"),
        ("shard_count", 10_001, "10000"),
        ("mode", "sideways", "'fanout', 'partitioned' or 'auto'"),
        ("roles", "gateway,cook", "'gateway'"),
        ("coordination", "redis", "must be a URL"),
        ("lease_s", 0.1, "greater than or equal to 0.5"),
        ("lease_s", "nan", "finite"),
        ("lease_s", "inf", "finite"),
        ("weight", 0, "greater than 0"),
        ("weight", "nan", "finite"),
        ("carrier", "pigeon", "'filter' or 'topic'"),
        ("cluster", "My Cluster", "lower-case"),
        ("instance", "", "lower-case"),
        ("instance", "x" * 64, "1 to 63"),
        ("advertise_url", "https://x", "ws:// or wss://"),
        ("advertise_url", "wss://b1:abc", "ws:// or wss://"),
        ("advertise_url", "wss://b1:70000", "ws:// or wss://"),
        ("advertise_url", "wss://", "ws:// or wss://"),
        ("advertise_url", "wss://:8080", "ws:// or wss://"),
        ("advertise_url", "wss://[::1", "ws:// or wss://"),
        ("advertise_url", "wss://b1?x", "without user, query or fragment"),
        ("advertise_url", "wss://b1?", "without user, query or fragment"),
        ("advertise_url", "wss://b1#f", "without user, query or fragment"),
        ("advertise_url", "wss://me:secret@b1", "without user, query or fragment"),
        ("advertise_url", "wss://b1/../x", "ws:// or wss://"),
        ("advertise_url", "wss://*", "ws:// or wss://"),
        ("advertise_url", "wss://b1,b2", "ws:// or wss://"),
        ("advertise_url", "wss://0.0.0.0:8080", "no address to connect to"),
        ("advertise_url", "wss://[::]:8080", "no address to connect to"),
        ("advertise_url", "wss://[0:0::0]", "no address to connect to"),
        ("advertise_url", "wss://[1::2::3]", "IP address"),
        ("advertise_url", "wss://10.0.0.256", "IP address"),
        ("coordination", "redis://[:::]:6379", "IP address"),
        ("ingress", "nats://10.0.0.1,10.0.0.256/S/x", "IP address"),
        ("transport", "nats://a..b:4222", "valid name"),
        ("transport", f"redis://{'a' * 64}.example", "valid name"),
        ("ingress", "nats://nats.example,.example/S/x", "valid name"),
        ("jwks_url", "https://issuer..example/jwks", "valid name"),
        ("transport", "nats", "URL"),
        ("mailbox", "pokebridge.db", "URL"),
        ("jwt_secret", "hunter2", "32 bytes"),
        ("jwt_previous_secret", "hunter2", "32 bytes"),
        ("jwt_secret", " " * 40, "32 bytes"),
        ("jwt_issuer", "", "not empty"),
        ("jwt_audience", " ", "not empty"),
        ("jwt_audience", "bridge ", "white space"),
        ("jwt_issuer", "https://issuer.example/\t", "white space"),
        ("jwt_leeway_s", -1, "0"),
        ("jwt_leeway_s", "nan", "finite"),
        ("jwks_url", "file:///etc/passwd", "http"),
        ("jwks_url", "https://", "http"),
        ("jwks_url", "https:///jwks", "http"),
        ("jwks_url", "https://:443/jwks", "http"),
        ("jwks_url", "https://user@/jwks", "http"),
        ("jwks_url", "https://a.example,b.example/jwks", "http"),
        ("jwks_url", "https://a.example /jwks", "http"),
        ("jwks_url", "https://issuer.example:jwks", "port"),
        ("jwks_url", "https://[:::]/jwks", "IP address"),
        ("jwks_url", "https://10.0.0.256/jwks", "IP address"),
        ("push_webhook_url", "https://push.example:0/", "port"),
        ("allowed_origins", "https://a.example/path", "origins like"),
        ("allowed_origins", "https://a.example/", "without a path"),
        ("allowed_origins", "https://a.*.example", "origins like"),
        ("allowed_origins", "wss://a.example", "not wss://"),
        ("allowed_origins", "https://straße.example", "in ASCII"),
        ("trusted_proxies", "10.0.0.1/8", "networks like"),
        ("workers", "all", "integer, unable to parse string as an integer, or must be 'auto'"),
        ("handshakes_per_s", -1, "0"),
        ("max_sessions", 0, "1"),
        ("max_sessions", 10**400, "less than"),
        ("handshakes_per_s", 10**400, "less than"),
        ("max_session_s", 10**400, "less than"),
        ("path_prefix", "/bridge/..", "path like"),
        ("path_prefix", "/v1", "own paths"),
        ("path_prefix", "/docs/bridge/", "own paths"),
        ("max_sessions_per_recipient", 0, "1"),
        ("ping_interval_s", 0, "greater than 0"),
        ("ping_interval_s", "nan", "finite"),
        ("ping_interval_s", 1e300, "less than"),
        ("pong_timeout_s", -5, "greater than 0"),
        ("verify_every_s", "nan", "finite"),
        ("revoke_for_s", "inf", "finite"),
        ("grace_s", -1, "greater than 0"),
        ("max_session_s", -1, "0"),
        ("max_messages_per_recipient", 10**30, "less than"),
        ("drain_s", "inf", "finite"),
        ("drain_s", "nan", "finite"),
        ("drain_s", -0.1, "0"),
        ("log_format", "xml", "'json' or 'console'"),
        ("log_level", "loud", "'debug'"),
    ],
)
def test_a_wrong_value_is_named_with_its_source(
    tmp_path: Path, name: str, value: Any, meaning: str
) -> None:
    """One line: where it came from and what it may be, never the value."""
    flag = refusal({name: value})
    assert flag.startswith(f"--{name.replace('_', '-')}: ")
    assert meaning in flag
    assert "hunter2" not in flag
    quoted = f'"{value}"' if isinstance(value, str) else value
    path = toml(tmp_path, f"{name} = {quoted}\n")
    assert refusal(config_file=path).startswith(f"{name} in {path}: ")
    if str(value).strip():
        variable = f"POKEBRIDGE_{name.upper()}"
        assert refusal(environ={variable: str(value)}).startswith(f"{variable}: ")


PASSWORDS = [f"hunter{each}2secret" for each in "#?/[]@%"]
PASSWORDS += ["hunter%zz2secret", "12/34secret", "12?34secret", "12#34secret", "12@34secret"]
URLS = [
    ("transport", "redis://:{}@h:6379/0"),
    ("transport", "rediss://u:{}@h"),
    ("transport", "nats://u:{}@h:4222,h2:4222"),
    ("transport", "tls://{}@h"),
    ("coordination", "redis://u:{}@h:6379/0"),
    ("coordination", "nats://u:{}@h"),
    ("coordination", "postgresql://u:{}@h/d"),
    ("mailbox", "postgresql://u:{}@h:1,h2:2/d?sslmode=require"),
    ("mailbox", "postgres://u:{}@h/d"),
    ("ingress", "nats://u:{}@h/s/t"),
    ("jwks_url", "https://u:{}@h/jwks"),
    ("push_webhook_url", "https://u:{}@h/push?a=b"),
]


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize(("name", "url"), URLS)
def test_a_password_must_be_percent_encoded(
    tmp_path: Path, name: str, url: str, password: str
) -> None:
    """Wherever the URL comes from, the line says so, and shows no part of it."""
    url = url.format(password)
    path = toml(tmp_path, f"{name} = '{url}'\n")
    variable = f"POKEBRIDGE_{name.upper()}"
    lines = {
        f"--{name.replace('_', '-')}: ": refusal({name: url}),
        f"{variable}: ": refusal(environ={variable: url}),
        f"{name} in {path}: ": refusal(config_file=path),
    }
    for source, line in lines.items():
        assert line.startswith(source)
        assert "percent-encode" in line
        for part in ("hunter", "secret", "12", "34"):
            assert part not in line.removeprefix(source)


@pytest.mark.parametrize(("name", "url"), URLS)
def test_a_password_that_is_percent_encoded_is_fine(name: str, url: str) -> None:
    """With all that had to be encoded, and all that need not be."""
    password = "%23%3F%2F%5B%5D%40%25%3a!$&'()*+,;=-._~\u00e9"
    secret = {"push_webhook_secret": f"whsec_{base64.b64encode(b'x' * 24).decode()}"}
    load_settings(None, {"dev": True, name: url.format(password)} | secret, {})


def test_an_unknown_name_is_refused_with_a_guess(tmp_path: Path) -> None:
    """A typo must not silently leave a default in place."""
    variable = refusal(environ={"POKEBRIDGE_JWT_SECRETS": "hunter2"})
    assert variable == "POKEBRIDGE_JWT_SECRETS: unknown setting; did you mean jwt_secret?"
    path = toml(tmp_path, "[serve]\nport = 1\n")
    assert refusal(config_file=path) == f"serve in {path}: unknown setting"
    path = toml(tmp_path, '"a\\nb" = 1\n')
    assert "\n" not in refusal(config_file=path)


def test_true_is_no_number(tmp_path: Path) -> None:
    """What pydantic would take for 1. A file may begin with the mark that Windows writes."""
    for name in ("port", "max_sessions", "lease_s", "workers"):
        path = toml(tmp_path, f"{name} = true\n")
        assert refusal(config_file=path) == f"{name} in {path}: must not be true or false"
    path = toml(tmp_path, "trusted_proxies = [5]\n")
    assert refusal(config_file=path).endswith(
        ": must be networks like 10.0.0.0/8, separated by commas"
    )
    path.write_text("\ufeffport = 80\ndev = true\n", encoding="utf-8")
    assert load_settings(path, {}, {}).port == 80


def test_a_config_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Missing, a directory, not TOML, not UTF-8."""
    for path in (tmp_path / "missing.toml", tmp_path, toml(tmp_path, "port ?")):
        assert str(path) in refusal(config_file=path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff")
    assert "not TOML" in refusal(config_file=binary)
    binary.write_text("a = " + "[" * 5_000)
    assert "nested too deeply" in refusal(config_file=binary)


def test_an_unforeseen_error_is_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect of a check says where it is. It shows nothing of the value."""

    def fail(value: str) -> None:
        raise ZeroDivisionError(value)

    monkeypatch.setattr(settings_module, "_is_service_link", lambda _, value: fail(value))
    with pytest.raises(ConfigError, match=r"settings: .* ZeroDivisionError at \S+:\d+") as raised:
        load_settings(None, {}, {"POKEBRIDGE_JWT_SECRET": SECRET})
    assert SECRET not in str(raised.value)


def test_settings_do_not_change_and_hide_their_secrets() -> None:
    """They are passed around and may end in a log."""
    settings = load_settings(None, {"jwt_secret": SECRET}, {})
    assert SECRET not in repr(settings)
    assert SECRET not in str(settings.model_dump(mode="json"))
    with pytest.raises(ValidationError):
        settings.port = 1
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate({"jwt_secret": "hunter2"})
    assert "hunter2" not in str(caught.value)


def test_every_setting_is_documented() -> None:
    """--help prints the attribute docstrings."""
    assert all(field.description for field in Settings.model_fields.values())


PUSH = {"push_webhook_url": "https://example.com/hook"}
PUSH_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@pytest.mark.parametrize(
    "secret", ["whsec_", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_dG9vIHNob3J0", "whsec_!"]
)
def test_a_webhook_secret_is_long_and_random(secret: str) -> None:
    """One without its prefix, too short, or not base64 is refused, and not repeated."""
    line = refusal(PUSH | {"push_webhook_secret": secret})
    assert line.startswith("--push-webhook-secret: must be whsec_ and then 24 to 64 random bytes")


def test_the_webhook_is_signed_and_encrypted() -> None:
    """It needs a secret where it is called, and https: but for a developer's own machine."""
    signed = PUSH | {"push_webhook_secret": PUSH_SECRET}
    key = load_settings(None, {"dev": True, **signed}).push_webhook_key
    assert key == base64.b64decode(PUSH_SECRET.removeprefix("whsec_"))
    assert refusal(PUSH).startswith("push_webhook_secret (POKEBRIDGE_PUSH_WEBHOOK_SECRET) must be")
    load_settings(None, {"dev": True, "roles": "api", **PUSH})
    for url, dev, is_right in [
        ("http://localhost:1/", True, True),
        ("http://127.0.0.1:1/", True, True),
        ("http://[::1]:1/", True, True),
        ("http://localhost:1/", False, False),
        ("http://10.0.0.1/", True, False),
        ("http://localhost.example.com/", True, False),
        ("https://10.0.0.1/", False, True),
    ]:
        given = signed | {"push_webhook_url": url, "dev": dev, "jwt_secret": SECRET}
        if is_right:
            load_settings(None, given, {})
        else:
            assert "https://" in refusal(given), url


@pytest.mark.parametrize(
    "given", [{"ingress": "nats://h:4222/S"}, PUSH | {"push_webhook_secret": PUSH_SECRET}]
)
def test_what_needs_a_mailbox_says_so(given: dict[str, Any]) -> None:
    """Without a mailbox there is nothing to notify of, and nowhere to commit to."""
    assert "needs a mailbox" in refusal(given | {"no_mailbox": True})
