"""A process of the chaos test: a sender or a reader, that may be killed at any time.

    crowd.py send LOG RECIPIENTS URL TOKEN [URL TOKEN ...]
    crowd.py read LOG DEVICE URL TOKENS [URL TOKENS ...]

It writes a line for each message, ``RECIPIENT VERSION ID``, to LOG, in one write each time, so that
whatever kills it leaves whole lines only. What fails is tried again at another URL. Nothing but the
standard library, which starts fast.
"""

import http.client
import json
import os
import random
import sys
import time
import uuid
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 10.0
PAUSE_S = 0.01
RECIPIENTS = ("urn:user:ann", "urn:user:bob", "urn:user:cem")


class Api:
    """Calls whichever of several instances answers."""

    def __init__(self, urls: list[str]) -> None:
        self._urls = urls
        self._connection: http.client.HTTPConnection | None = None

    def call(self, method: str, path: str, token: str, body: object = None) -> tuple[int, Any]:
        """The status and the answer; status 0 when there is none: who knows what was done."""
        try:
            if self._connection is None:
                address = urlsplit(random.choice(self._urls)).netloc
                self._connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
            text = None if body is None else json.dumps(body)
            self._connection.request(method, path, text, headers)
            answer = self._connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException):
            self._leave()
            return 0, None
        if answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            self._leave()
            return answer.status, None
        return answer.status, json.loads(content) if content else None

    def _leave(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        time.sleep(random.uniform(0, 10 * PAUSE_S))


class Log:
    """Lines that are there once ``write`` has returned, and that a next process goes on with."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, lines: list[str]) -> None:
        """Append ``lines`` in one write."""
        os.write(self._file, "".join(f"{line}\n" for line in lines).encode())


def parse(path: Path) -> Iterator[tuple[str, int, str]]:
    """The recipient, version and id of each line of a log."""
    for line in path.read_text().splitlines() if path.exists() else []:
        recipient, version, message_id = line.split()
        yield recipient, int(version), message_id


def send(log: Log, urls: list[str], token: str) -> None:
    """Send for ever; log what was answered 202, or 200 when an earlier attempt had been heard."""
    api = Api(urls)
    for number in range(sys.maxsize):
        message: dict[str, Any] = {"recipient": random.choice(RECIPIENTS), "body": number}
        if number % 2:
            message["id"] = uuid.uuid4().hex
        status, answer = api.call("POST", "/v1/messages", token, message)
        while status not in {HTTPStatus.OK, HTTPStatus.ACCEPTED} and "id" in message:
            status, answer = api.call("POST", "/v1/messages", token, message)
        if answer is not None:
            log.write([f"{message['recipient']} {answer['version']} {answer['id']}"])
        time.sleep(PAUSE_S)


def read(path: Path, urls: list[str], device: str, tokens: dict[str, str]) -> None:
    """Read for ever by cursor, which is the last line's version; log, and only then ack."""
    cursors = dict.fromkeys(RECIPIENTS, 0)
    for recipient, version, _ in parse(path):
        cursors[recipient] = version
    log, api = Log(path), Api(urls)
    while True:
        for recipient, token in tokens.items():
            query = f"?after={cursors[recipient]}&limit=100&device={device}"
            status, page = api.call("GET", f"/v1/messages{query}", token)
            if status != HTTPStatus.OK or not page["messages"]:
                continue
            log.write([f"{recipient} {m['version']} {m['id']}" for m in page["messages"]])
            cursors[recipient] = page["version"]
            ack = {"version": page["version"], "device": device}
            api.call("POST", "/v1/messages/ack", token, ack)
        time.sleep(PAUSE_S)


if __name__ == "__main__":
    role, log_path, *rest = sys.argv[1:]
    if role == "send":
        sender_token, *sender_urls = rest
        send(Log(Path(log_path)), sender_urls, sender_token)
    else:
        reader_device, reader_tokens, *reader_urls = rest
        read(Path(log_path), reader_urls, reader_device, json.loads(reader_tokens))
