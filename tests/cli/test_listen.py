"""The command listen: a smart client in a process of its own."""

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.cli.conftest import Run
from tests.support import block_until, free_port
from tests.support.serving import JWT_SECRET, POKEBRIDGE, Instance, Serve

TIMEOUT_S = 30.0


class Listener:
    """A running listen, and what it has written so far."""

    def __init__(self, url: str, *args: str) -> None:
        environ = {"POKEBRIDGE_URL": url, "POKEBRIDGE_JWT_SECRET": JWT_SECRET}
        self.process = subprocess.Popen(
            [POKEBRIDGE, "listen", *args],
            env=os.environ | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.out: list[str] = []
        self.err: list[str] = []
        streams = ((self.process.stdout, self.out), (self.process.stderr, self.err))
        self._readers = [
            threading.Thread(target=lines.extend, args=(stream,)) for stream, lines in streams
        ]
        for reader in self._readers:
            reader.start()

    def wait_for(self, text: str) -> None:
        """Wait until a line on stderr has ``text``."""
        block_until(lambda: any(text in line for line in self.err), TIMEOUT_S, text)

    def wait_for_messages(self, count: int) -> None:
        """Wait until ``count`` lines are on stdout."""
        block_until(lambda: len(self.out) >= count, TIMEOUT_S, f"{count} messages")

    def ended(self) -> int:
        """Wait for the end, until all is read; returns the exit status."""
        self.process.wait(TIMEOUT_S)
        for reader in self._readers:
            reader.join()
        return self.process.returncode

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.ended()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


@pytest.fixture
def listeners() -> Iterator[list[Listener]]:
    """Those that the test starts; its end ends them."""
    started: list[Listener] = []
    yield started
    for listener in started:
        listener.close()


def send(instance: Instance, recipient: str, body: Any) -> None:
    """A message from somebody else."""
    with instance.http("urn:user:eve", "send") as http:
        message = {"recipient": recipient, "body": body}
        assert http.post("/v1/messages", json=message).status_code == httpx.codes.ACCEPTED


def test_messages_are_shown_as_they_come(instance: Instance, listeners: list[Listener]) -> None:
    """Waiting messages come first, then each new one. An interrupt ends the command quietly."""
    send(instance, "urn:listen:1", "before")
    listener = Listener(instance.url, "urn:listen:1")
    listeners.append(listener)
    listener.wait_for("type=ready")
    listener.wait_for_messages(1)
    send(instance, "urn:listen:1", {"text": "gr\u00fcezi\x1b[2J\u009b\u202e"})
    listener.wait_for_messages(2)
    listener.process.send_signal(signal.SIGINT)
    assert listener.ended() == 130
    assert listener.out == [
        '1 urn:user:eve "before"\n',
        # Nothing that a terminal would obey.
        '2 urn:user:eve {"text": "gr\u00fcezi\\u001b[2J\\x9b\\u202e"}\n',
    ]
    assert "Traceback" not in "".join(listener.err)


def test_json_is_an_object_a_line(instance: Instance, listeners: list[Listener]) -> None:
    """For scripts; --after leaves out what they have."""
    send(instance, "urn:listen:2", "old")
    send(instance, "urn:listen:2", ["new"])
    listener = Listener(instance.url, "urn:listen:2", "--json", "--after", "1")
    listeners.append(listener)
    listener.wait_for_messages(1)
    message = json.loads(listener.out[0])
    assert set(message) == {"version", "id", "sender", "body", "sent_at"}
    assert (message["version"], message["body"]) == (2, ["new"])


def test_a_reader_that_goes_ends_it(instance: Instance, listeners: list[Listener]) -> None:
    """`pokebridge listen bob | head -1`: no traceback, no message acked for nobody."""
    reader, writer = os.pipe()
    environ = {"POKEBRIDGE_JWT_SECRET": JWT_SECRET}
    process = subprocess.Popen(
        [POKEBRIDGE, "listen", "urn:listen:3", "--url", instance.url],
        env=os.environ | environ,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    os.close(reader)
    send(instance, "urn:listen:3", "unread")
    try:
        _, err = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "Traceback" not in err
    with instance.http("urn:listen:3") as http:
        assert len(http.get("/v1/messages?device=terminal").json()["messages"]) == 1


@pytest.mark.parametrize(
    ("args", "status", "text"),
    [
        (["two words"], 2, "a recipient is"),
        (["bob", "--device", "two words"], 2, "a device is"),
        (["bob", "--after", "-1"], 2, "--after"),
        (
            ["bob", "--url", "http://127.0.0.1:{free_port}"],
            1,
            "cannot connect to http://127.0.0.1:",
        ),
        (["bob", "--url", "{url}/elsewhere"], 1, "answered 404: "),
        (["bob", "--token", "a.b.c"], 1, "refused the token: "),
    ],
)
def test_what_is_wrong_at_the_start_is_one_line(
    instance: Instance, ask: Run, args: list[str], status: int, text: str
) -> None:
    """The client would retry for ever, but a person wants to know."""
    filled = [
        arg.replace("{url}", instance.url).replace("{free_port}", str(free_port())) for arg in args
    ]
    result = ask("listen", *filled)
    assert (result.status, result.out) == (status, "")
    assert text in result.err
    assert result.err.count("\n") == 1


def test_a_refusal_is_not_logged_beside_the_error(
    instance: Instance, listeners: list[Listener]
) -> None:
    """The client's log would repeat it. The reason says what a token is."""
    listeners.append(Listener(instance.url, "bob", "--token", "abc"))
    assert listeners[0].ended() == 1
    assert len(listeners[0].err) == 1
    assert "401: the token is not valid: it is not a JWT" in listeners[0].err[0]


def test_somebody_elses_token_is_refused(instance: Instance, ask: Run) -> None:
    """It would show, and acknowledge, another mailbox than the one that was named."""
    token = instance.token("urn:user:bob")
    result = ask("listen", "urn:user:eve", "--token", token)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert "the token is for urn:user:bob, not for urn:user:eve" in result.err


def test_a_given_token_that_is_revoked_ends_it(
    instance: Instance, listeners: list[Listener]
) -> None:
    """The command has no other token to continue with."""
    listener = Listener(
        instance.url, "urn:listen:4", "--token", instance.token("urn:listen:4", ttl_s=60)
    )
    listeners.append(listener)
    listener.wait_for("type=ready")
    with instance.http("urn:admin", "admin") as http:
        assert http.delete("/v1/sessions/urn:listen:4").status_code == httpx.codes.NO_CONTENT
    assert listener.ended() == 1
    listener.wait_for("refused the token: closed with 4401")


def test_a_lost_connection_is_made_anew_and_a_replaced_one_is_not(
    serve: Serve, listeners: list[Listener]
) -> None:
    """A close that is final ends the command. The instance's death does not."""
    own = serve(mailbox="memory://", max_sessions_per_recipient=1)
    for _ in range(2):
        listeners.append(Listener(own.url, "bob"))
        listeners[-1].wait_for("type=ready")
    replaced, last = listeners
    assert replaced.ended() == 1
    replaced.wait_for("ended the session: 4409")
    own.kill()
    last.wait_for("connection lost")
    own.start()
    block_until(lambda: sum("type=ready" in line for line in last.err) == 2, TIMEOUT_S)
