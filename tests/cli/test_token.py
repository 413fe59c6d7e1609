"""The command token."""

import json
from pathlib import Path

import pytest

from pokebridge.errors import AuthError
from pokebridge.tokens import TokenVerifier
from tests.cli.conftest import Run
from tests.support.daemon import free_port
from tests.support.serving import JWT_SECRET, Serve

BOB = "urn:user:bob"


def test_a_signed_token_is_accepted(run: Run) -> None:
    """It says who, what and for how long."""
    args = ("token", BOB, "--scope", "send poke", "--ttl-s", "5")
    result = run(*args, POKEBRIDGE_JWT_SECRET=JWT_SECRET)
    claims = TokenVerifier(secret=JWT_SECRET).verify_now(result.out.strip())
    assert (result.status, result.err) == (0, "")
    assert claims.subject == BOB
    assert claims.scopes == {"send", "poke"}


def test_json_has_the_token_alone(run: Run) -> None:
    """For scripts."""
    result = run("token", BOB, "--json", POKEBRIDGE_JWT_SECRET=JWT_SECRET)
    token = json.loads(result.out)["token"]
    assert TokenVerifier(secret=JWT_SECRET).verify_now(token).scopes == frozenset()


def test_issuer_and_audience_are_those_of_the_configuration(run: Run, tmp_path: Path) -> None:
    """So that an instance with the same configuration accepts it."""
    config = tmp_path / "pokebridge.toml"
    config.write_text(f'jwt_secret = "{JWT_SECRET}"\njwt_issuer = "us"\njwt_audience = "pokes"\n')
    token = run("token", BOB, "--config", str(config)).out.strip()
    same = TokenVerifier(secret=JWT_SECRET, issuer="us", audience="pokes")
    assert same.verify_now(token).subject == BOB
    with pytest.raises(AuthError):
        TokenVerifier(secret=JWT_SECRET, issuer="them").verify_now(token)


@pytest.mark.parametrize(
    ("args", "secret", "text"),
    [
        (["two words"], JWT_SECRET, "a recipient is"),
        ([BOB, "--ttl-s", "0"], JWT_SECRET, "--ttl-s"),
        ([BOB, "--config", "/no/such/file"], "", "/no/such/file"),
    ],
)
def test_what_can_not_be_signed_is_status_2(
    run: Run, args: list[str], secret: str, text: str
) -> None:
    """In one line, and nothing on stdout."""
    result = run("token", *args, POKEBRIDGE_JWT_SECRET=secret)
    assert (result.status, result.out) == (2, "")
    assert text in result.err
    assert result.err.count("\n") == 1


def test_a_dev_instance_signs_where_no_secret_is_configured(serve: Serve, run: Run) -> None:
    """As `send` and `listen` do it: the page's sign-in advises this command."""
    instance = serve(mailbox="memory://")
    result = run("token", BOB, "--scope", "admin", "--url", instance.url)
    claims = TokenVerifier(secret=JWT_SECRET).verify_now(result.out.strip())
    assert claims.subject == BOB
    assert claims.scopes == {"admin"}


def test_neither_a_secret_nor_an_instance_is_one_line(run: Run) -> None:
    """It names both ways to a token."""
    result = run("token", BOB, "--url", f"http://127.0.0.1:{free_port()}")
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert "jwt_secret is not configured" in result.err
    assert "--dev" in result.err
