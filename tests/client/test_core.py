"""The client's core under any sequence of events: what never happens, and what always does."""

import json
from collections.abc import Callable, Iterator, Sequence
from math import inf

from hypothesis import given
from hypothesis import strategies as st

from pokebridge.client.core import ClientCore
from pokebridge.client.events import (
    AnyAction,
    AnyEvent,
    Authenticate,
    Closed,
    Connect,
    Disconnect,
    FetchToken,
    Opened,
    Ping,
    Pull,
    Pulled,
    PullFailed,
    Refused,
    Start,
    Stop,
    Text,
    Tick,
    Token,
    TokenFailed,
    Wake,
)
from pokebridge.client.frames import MAX_ASKED_DELAY_S
from pokebridge.client.policy import Policy

URL = "wss://bridge.example/v1/connect"
# The longest that anything can be put off once everything works: what the server asked for last,
# and the longest jittered delay.
RECOVERY_S = MAX_ASKED_DELAY_S + Policy().overload_cap_s


class World:
    """A server and a shell around a core; it checks every action against what is under way."""

    def __init__(self, cursor: int = 0) -> None:
        self.core = ClientCore(URL, cursor=cursor)
        self.now = 0.0
        self.random = 0.0
        self.head = cursor
        self.heard = 0
        self.socket = ""
        self.fetching = False
        self.pulling: int | None = None  # the head that the running pull has read
        self.feed(Start())

    def feed(self, event: AnyEvent) -> None:
        """Hand ``event`` to the core and do what it says."""
        for action in self.core.handle(event, now=self.now, random=self.random):
            self.act(action)
        timer = self.core.timer
        assert timer is None or timer > self.now, "something is due and was not done"
        assert timer or self.fetching, "nothing would ever happen again"

    def act(self, action: AnyAction) -> None:
        """Nothing may be started twice, or be done with a socket that is not there."""
        match action:
            case FetchToken():
                assert not self.fetching
                self.fetching = True
            case Connect():
                assert not self.socket
                self.socket = "connecting"
            case Disconnect():
                assert self.socket
                self.socket = ""
            case Ping() | Authenticate():
                assert self.socket == "ready"
            case Pull(after=after):
                assert self.pulling is None
                assert after == self.core.cursor
                self.pulling = self.head
            case Stop():
                raise AssertionError("nothing here is a reason to stop")

    def frame(self, **message: object) -> None:
        """The server sends a message, if it is connected at all."""
        if self.socket:
            if message["type"] == "ready":
                self.socket = "ready"
            version = message.get("version")
            if isinstance(version, int):
                self.heard = max(self.heard, version)
            self.feed(Text(json.dumps(message)))

    def opened(self) -> None:
        """The handshake is done, if one was under way."""
        if self.socket == "connecting":
            self.feed(Opened())

    def lose(self, event: Closed | Refused) -> None:
        """The socket goes, if there is one."""
        if self.socket:
            self.socket = ""
            self.feed(event)

    def fetched(self, event: Token | TokenFailed) -> None:
        """The token provider answers, if it was asked."""
        if self.fetching:
            self.fetching = False
            self.feed(event)

    def pulled(self, *, limit: int = 1_000_000) -> None:
        """The pull brings what was there when it started."""
        if self.pulling is not None:
            after, head, self.pulling = self.core.cursor, self.pulling, None
            cursor = min(head, after + limit)
            self.feed(Pulled(cursor, more=cursor < head))

    def pull_failed(self, event: PullFailed) -> None:
        """The pull fails, if there is one."""
        if self.pulling is not None:
            self.pulling = None
            self.feed(event)

    def wait(self, until: float) -> None:
        """Time passes."""
        self.now = max(self.now, until)
        self.feed(Tick())

    def commit_and_poke(self, **fields: object) -> None:
        """A new message is there, and the client is told of it if it is connected."""
        self.head += 1
        self.frame(type="poke", **fields)

    def commit_and_lose(self) -> None:
        """A new message is there, and its poke is lost with the connection."""
        self.head += 1
        self.lose(Closed(1006))

    def recover(self) -> None:
        """From now on everything works, until nothing is left to do but to listen."""
        self.random = 0.99
        end = self.now + RECOVERY_S
        while self.now <= end:
            self.fetched(Token())
            self.opened()
            if self.socket == "connecting":
                self.frame(type="ready")
            self.pulled(limit=10)
            timer = self.core.timer
            if self.pulling is None and not self.fetching and timer and timer > self.now:
                self.now = timer
                self.feed(Tick())
                if self.socket == "ready":
                    self.frame(type="pong")


Operation = Callable[[World, float], None]

OPERATIONS: dict[str, Operation] = {
    "tick": lambda world, _: world.wait(world.core.timer or 0),
    "wait": lambda world, number: world.wait(world.now + number),
    "wake": lambda world, _: world.feed(Wake()),
    "commit and poke": lambda world, _: world.commit_and_poke(),
    "commit and say": lambda world, _: world.commit_and_poke(version=world.head + 1),
    "commit and pace": lambda world, number: world.commit_and_poke(
        version=world.head + 1, within_ms=number * 1000
    ),
    "commit and lose": lambda world, _: world.commit_and_lose(),
    "opened": lambda world, _: world.opened(),
    "ready": lambda world, number: world.frame(type="ready", expires_in=number),
    "auth": lambda world, number: world.frame(type="auth", expires_in=number),
    "move": lambda world, _: world.frame(type="move", url="wss://two.example/v1/connect"),
    "noise": lambda world, number: world.frame(type="noise", version=number),
    "1006": lambda world, _: world.lose(Closed(1006)),
    "1013": lambda world, _: world.lose(Closed(1013)),
    "4307": lambda world, _: world.lose(Closed(4307)),
    "4401": lambda world, _: world.lose(Closed(4401)),
    "401": lambda world, _: world.lose(Refused(401)),
    "503": lambda world, number: world.lose(Refused(503, retry_after_s=number)),
    "token": lambda world, _: world.fetched(Token()),
    "token failed": lambda world, _: world.fetched(TokenFailed()),
    "pulled": lambda world, _: world.pulled(),
    "pulled a page": lambda world, _: world.pulled(limit=1),
    "pull failed": lambda world, number: world.pull_failed(PullFailed(retry_after_s=number)),
    "pull refused": lambda world, _: world.pull_failed(PullFailed(unauthorized=True)),
}

lives = st.lists(
    st.tuples(
        st.sampled_from(sorted(OPERATIONS)),
        st.floats(0, 1, exclude_max=True),
        st.floats(0, 100) | st.sampled_from([0.0, 0.5]),
    ),
    max_size=60,
)


def live(life: Sequence[tuple[str, float, float]]) -> Iterator[World]:
    """A world after each of the steps that an adversary has chosen."""
    world = World()
    for operation, random, number in life:
        yield world
        world.random = random
        OPERATIONS[operation](world, number)
    yield world


@given(lives)
def test_the_core_recovers_from_anything(life: list[tuple[str, float, float]]) -> None:
    """After any faults a client that meets no more of them is ready and has all there is.

    And on the way: never two pulls, tokens or sockets at once, nothing sent without a socket,
    nothing due left undone, and always something that will happen next.
    """
    *_, world = live(life)
    world.recover()
    assert world.core.ready
    assert world.core.cursor == world.head


@given(lives)
def test_no_poke_is_forgotten(life: list[tuple[str, float, float]]) -> None:
    """Whenever no pull runs or waits, the cursor is at the highest version that was heard."""
    for world in live(life):
        pulls = world.core._pulls
        if not pulls.running and pulls.due_at == inf:
            assert world.core.cursor >= world.heard


@given(
    st.lists(st.sampled_from([1001, 1006, 1013, 4307]), min_size=1, max_size=20),
    st.floats(0, 1, exclude_max=True),
)
def test_the_delay_is_bounded_however_long_it_lasts(codes: list[int], random: float) -> None:
    """No number of failures makes the next attempt wait longer than the cap, or overflow."""
    core = ClientCore(URL)
    now = 0.0
    events: list[AnyEvent] = [Start(), Token(), *map(Closed, codes * 100)]
    for event in events:
        core.handle(event, now=now, random=random)
        if core._connect_at < inf:
            overload = isinstance(event, Closed) and event.code == 1013
            cap_s = Policy().overload_cap_s if overload else Policy().cap_s
            assert core._connect_at - now <= random * cap_s + 1e-6
            now = core._connect_at
            core.handle(Tick(), now=now, random=random)


@given(st.text() | st.binary().map(lambda raw: raw.decode(errors="surrogateescape")))
def test_no_text_does_any_harm(text: str) -> None:
    """Whatever text the server sends, the core ignores it or takes an allowed action."""
    world = World()
    world.fetched(Token())
    world.feed(Text(text))
    world.frame(type="ready")
    world.feed(Text(text))
    assert world.core.ready


@given(
    st.sampled_from(["ready", "poke", "auth", "move", "pong"]),
    st.dictionaries(
        st.sampled_from(["version", "within_ms", "expires_in", "url", "type"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=4,
        ),
    ),
)
def test_no_field_does_any_harm(kind: str, fields: dict[str, object]) -> None:
    """A known message with fields of any kind and size leaves the client able to go on."""
    world = World()
    world.fetched(Token())
    world.frame(type="ready")
    world.feed(Text(json.dumps({"type": kind} | fields)))
    world.recover()
    assert world.core.ready
