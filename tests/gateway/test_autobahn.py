"""RFC 6455 as Autobahn's test suite has it: a third party's cases, which kosoku runs."""

import kosoku
import pytest

from pokebridge.framing import Opcode, encode_frame
from pokebridge.gateway.connection import Connection
from tests.gateway.harness import running, token

# Text, pings, reserved bits and opcodes, fragments, UTF-8 and the closing handshake. The others are
# about binary messages, compression and megabytes, all of which are refused here.
CASES = ("1.1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*")
TOO_LARGE = {"1.1.6", "1.1.7", "1.1.8"}
"""Their messages have 65,535 bytes and more."""
# Some cases take two seconds, in which they do nothing.
AT_ONCE = 16


class Echo(Connection):
    """Repeats each text, as the suite expects of a server, and says nothing of its own."""

    __slots__ = ()

    def open(self, first_ping_s: float, response: bytes = b"") -> None:
        """Accept the handshake without ``ready``."""
        self.session.open(
            instance="echo", now=self._host.now(), first_ping_s=first_ping_s, takes_acks=False
        )
        self._transport.write(response)

    def _on_text(self, text: bytes) -> None:
        self._transport.write(encode_frame(Opcode.TEXT, text))


async def test_every_case_ends_as_the_rfc_has_it() -> None:
    """All pass but those that are too large, which are refused with 1009."""
    async with running() as server:
        server.gateway.entrance.connection_type = Echo
        url = f"ws://127.0.0.1:{server.port}/v1/connect?access_token={token()}"
        with pytest.raises(kosoku.FailureError) as error:
            await kosoku.run_fuzzingclient(url, CASES, concurrency=AT_ONCE)
    results = error.value.results
    assert len(results) == 238
    failed = {each.case_id: each.remote_close_code for each in results if not each.passed}
    assert failed == dict.fromkeys(TOO_LARGE, 1009)
