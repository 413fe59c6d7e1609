"""The commands poke and send against a running instance."""

import asyncio
import json
import zlib

import pytest
from websockets.asyncio.client import connect

from pokebridge.api_client import MAX_ANSWER_BYTES
from tests.cli.conftest import Run
from tests.client.between import STRANGERS, Between
from tests.support.serving import JWT_SECRET, Instance, Serve


@pytest.fixture
def bob(request: pytest.FixtureRequest) -> str:
    """A recipient of the test's own: the instance is shared."""
    return f"urn:user:{zlib.crc32(request.node.nodeid.encode())}"


def bodies(instance: Instance, bob: str) -> list[object]:
    """What is in the mailbox."""
    with instance.http(bob) as http:
        return [message["body"] for message in http.get("/v1/messages").json()["messages"]]


async def test_a_poke_is_heard(instance: Instance, ask: Run, bob: str) -> None:
    """The whole way: the command, the API, the transport, the socket."""
    headers = instance.headers(bob)
    async with asyncio.timeout(10), connect(instance.ws_url, additional_headers=headers) as socket:
        assert json.loads(await socket.recv())["type"] == "ready"
        assert await asyncio.to_thread(ask, "poke", bob) == (0, "1 poked\n", "")
        assert json.loads(await socket.recv())["type"] == "poke"


def test_pokes_are_sent_in_requests_of_a_thousand(ask: Run) -> None:
    """More recipients than one request may have."""
    recipients = [f"urn:user:{n}" for n in range(1001)]
    assert json.loads(ask("poke", *recipients, "--json").out) == {"accepted": 1001}


@pytest.mark.parametrize(
    ("text", "body"),
    [
        ('{"a": [1, null]}', {"a": [1, None]}),
        ("17", 17),
        ('"quoted"', "quoted"),
        ("hello world", "hello world"),
        ("gr\u00fcezi", "gr\u00fcezi"),
        ("NaN", "NaN"),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_a_body_is_json_or_else_a_string(
    instance: Instance, ask: Run, bob: str, text: str, body: object
) -> None:
    """What can't be parsed is text, also where Python's parser would take more than JSON."""
    result = ask("send", bob, text)
    if len(text) > 65536:
        assert (result.status, result.out) == (1, "")
        assert " 413: " in result.err
    else:
        assert result.status == 0
        assert bodies(instance, bob) == [body]


@pytest.mark.parametrize(
    ("text", "warnings"), [('{"text": hello}', 1), ("[1,", 1), ("hello", 0), ("1", 0)]
)
def test_what_looks_like_json_and_is_not_is_said(
    ask: Run, bob: str, text: str, warnings: int
) -> None:
    """A forgotten quote sends a string, where an object was meant."""
    result = ask("send", bob, text)
    assert result.status == 0
    assert result.err.count("not valid JSON, so it is sent as a string") == warnings


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("\u00e9" * 32_000, '"' + "\u00e9" * 32_000 + '"'),
        ('["' + "\u00e9" * 32_000 + '"]', '["' + "\u00e9" * 32_000 + '"]'),
        ('"' + "\\u00e9" * 16_000 + '"', '"' + "\u00e9" * 16_000 + '"'),
        ('"' + "\\ud83d\\ude00" * 10_000 + '"', '"' + "\U0001f600" * 10_000 + '"'),
        ('{"\u20ac":"\U0001f600"}', '{"\u20ac":"\U0001f600"}'),
        ("[" + "1e5," * 16_000 + "1]", "[" + "1e5," * 16_000 + "1]"),
        ("[" + "1, " * 30_000 + "1]", "[" + "1," * 30_000 + "1]"),
        ("[1.10, 12345678901234567890123]", "[1.10,12345678901234567890123]"),
        ('["a, b : c", "\\"", "\\\\", "\\n", 1]', '["a, b : c","\\"","\\\\","\\n",1]'),
    ],
    ids=range(9),
)
def test_a_body_grows_no_longer_on_its_way(
    instance: Instance, ask: Run, bob: str, text: str, sent: str
) -> None:
    """It is sent as UTF-8, numbers as they were written, without what makes it longer only."""
    assert ask("send", bob, text).status == 0
    with instance.http(bob) as http:
        assert f'"body":{sent}' in http.get("/v1/messages").text


def test_a_message_has_id_and_ttl(ask: Run, bob: str) -> None:
    """The same id again is the same message; both answers are shown."""
    first = json.loads(ask("send", bob, "1", "--id", "a", "--ttl-s", "60", "--json").out)
    again = ask("send", bob, "1", "--id", "a")
    assert first == {"id": "a", "version": 1}
    assert again.out == "version 1, id a\n"


def test_a_body_is_read_from_stdin(instance: Instance, run_process: Run, bob: str) -> None:
    """`date | pokebridge send bob -`; the newline at the end is the shell's."""
    environ = {"POKEBRIDGE_URL": instance.url, "POKEBRIDGE_JWT_SECRET": JWT_SECRET}
    for text in ("two words\n", '{"n": 1}\n'):
        assert run_process("send", bob, "-", stdin=text, **environ).status == 0
    assert bodies(instance, bob) == ["two words", {"n": 1}]


def test_a_given_token_is_used(instance: Instance, ask: Run, bob: str) -> None:
    """Flag or variable; what it does not allow, or does not mean, is one line and status 1."""
    assert (
        ask("poke", bob, "--token", instance.token("me", "poke"), POKEBRIDGE_JWT_SECRET="")[0] == 0
    )
    assert ask("poke", bob, POKEBRIDGE_TOKEN=instance.token("me", "poke")).status == 0
    for token, text in ((instance.token("me", "send"), "(403)"), ("a.b.c", "(401)")):
        result = ask("poke", bob, "--token", token)
        assert result.status == 1
        assert f"the token was refused {text}" in result.err
        assert token not in result.err


def test_without_any_way_to_a_token_that_is_said(instance: Instance, run: Run, bob: str) -> None:
    """No token, no secret, and an instance without --dev."""
    result = run("poke", bob, "--url", instance.url)
    assert result.status == 2
    assert "POKEBRIDGE_JWT_SECRET" in result.err


def test_a_dev_instance_hands_out_the_token(serve: Serve, run: Run, bob: str) -> None:
    """Nothing need be configured to try things out."""
    instance = serve(mailbox="memory://")
    assert run("poke", bob, "--url", instance.url).out == "1 poked\n"
    assert run("send", bob, "x", "--url", instance.url).out.startswith("version 1, id ")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["poke", "two words"], "422: a recipient is"),
        (["send", "two words", "x"], "422: a recipient is"),
        (["poke", "bob", "--url", "{url}/elsewhere"], "404"),
    ],
)
def test_what_the_instance_refuses_is_one_line(
    instance: Instance, ask: Run, args: list[str], text: str
) -> None:
    """Its own words, without a traceback."""
    result = ask(*(arg.replace("{url}", instance.url) for arg in args))
    assert (result.status, result.out) == (1, "")
    assert text in result.err
    assert result.err.count("\n") == 1


STRANGE_PROXIES = ["socks5://hunter2@proxy:1", "socks://proxy", "http://u:hunter2#@proxy:1"]


@pytest.mark.parametrize("proxy", STRANGE_PROXIES)
@pytest.mark.parametrize(
    "args", [["poke", "bob"], ["listen", "bob"], ["cluster", "status"], ["send", "bob", "1"]]
)
def test_a_proxy_that_can_not_be_used_is_one_line(run: Run, args: list[str], proxy: str) -> None:
    """It names the variable and shows nothing of a password."""
    environ = {"POKEBRIDGE_JWT_SECRET": JWT_SECRET, "ALL_PROXY": proxy}
    result = run(*args, "--url", "http://bridge.example", **environ)
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("pokebridge: ALL_PROXY: ")
    assert result.err.count("\n") == 1
    assert "hunter2" not in result.err


@pytest.mark.parametrize("proxy", STRANGE_PROXIES)
def test_this_machine_needs_no_proxy(instance: Instance, ask: Run, bob: str, proxy: str) -> None:
    """An instance on this machine is reached directly, whatever the variables say."""
    assert instance.url.startswith("http://127.0.0.1:")
    assert ask("poke", bob, ALL_PROXY=proxy, HTTP_PROXY=proxy).out == "1 poked\n"


@pytest.mark.parametrize("stranger", STRANGERS)
async def test_what_is_not_the_bridge_is_one_line(
    instance: Instance, ask: Run, bob: str, stranger: str
) -> None:
    """The answer of a login page or a proxy counts neither as an instance's nor as a refusal."""
    async with Between(instance.port).run() as between:
        between.answers["/v1/messages"] = [STRANGERS[stranger]]
        result = await asyncio.to_thread(ask, "send", bob, "1", POKEBRIDGE_URL=between.url)
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith(f"pokebridge: {between.url} ")
    assert result.err.count("\n") == 1
    assert "token" not in result.err


async def test_an_answer_without_end_is_one_line(instance: Instance, ask: Run, bob: str) -> None:
    """A command stops reading an answer that is longer than any answer of an instance."""
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    async with Between(instance.port).run() as between:
        between.answers["/v1/messages"] = [[head, *[b" " * 1_000_000] * 100]]
        result = await asyncio.to_thread(ask, "send", bob, "1", POKEBRIDGE_URL=between.url)
    assert (result.status, result.out) == (1, "")
    url = f"{between.url}/v1/messages"
    assert result.err == f"pokebridge: {url} answered more than {MAX_ANSWER_BYTES} bytes\n"
