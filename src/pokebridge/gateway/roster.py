"""Which instances a recipient is connected to, for an operator.

No instance knows the sessions of others, so it asks them on the transport. Each instance with the
role ``gateway`` answers, even if it has none. That costs one signal and one for each instance, and
only an operator's question causes it.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from pokebridge.errors import TransportError
from pokebridge.gateway.listener import Listener
from pokebridge.gateway.session_map import SessionMap
from pokebridge.session import UNKNOWN_VERSION
from pokebridge.transport.base import Signal, Transport
from pokebridge.wire import ListedSession, Lookup, encode_lookup

ANSWER_WITHIN_S = 2.0
"""How long the other instances have to answer."""
MAX_LISTED = 1000
"""The most sessions of one recipient that an instance reports."""


class Whereabouts(NamedTuple):
    """The sessions of a recipient, by instance, and the instances that did not answer."""

    sessions: dict[str, Sequence[ListedSession]]
    silent: Sequence[str]


@dataclass(eq=False, slots=True)
class _Question:
    lookup: Lookup
    missing: set[str]
    answers: dict[str, Sequence[ListedSession]] = field(default_factory=dict)
    is_answered: asyncio.Event = field(default_factory=asyncio.Event)


class Roster:
    """Asks all instances for the sessions of a recipient, and answers for this one.

    Args:
        instance: this instance's id.
        sessions: its sessions.
        transport: where instances hear each other.
        do_later: runs a coroutine function in the background; answers are published by it.
    """

    def __init__(
        self,
        instance: str,
        sessions: SessionMap[Listener],
        transport: Transport,
        do_later: Callable[[str, Callable[[], Coroutine[Any, Any, None]]], None],
    ) -> None:
        self._instance = instance
        self._sessions = sessions
        self._transport = transport
        self._do_later = do_later
        self._questions: dict[str, _Question] = {}

    def here(self, recipient: str) -> Sequence[ListedSession]:
        """The sessions of ``recipient`` on this instance, oldest first."""
        sessions = islice(self._sessions.find(recipient), MAX_LISTED)
        return [_listed(each) for each in sessions]

    async def find(self, recipient: str, others: Collection[str]) -> Whereabouts:
        """The sessions of ``recipient`` here and on the instances ``others``.

        Those that have not answered within ANSWER_WITHIN_S, such as one of release 0.1.0, are
        ``silent``.
        """
        lookup = Lookup(secrets.token_hex(8), self._instance, recipient)
        question = _Question(lookup, set(others))
        self._questions[lookup.id] = question
        try:
            if others:
                with contextlib.suppress(TransportError, TimeoutError):
                    async with asyncio.timeout(ANSWER_WITHIN_S):
                        await self._publish(lookup)
                        await question.is_answered.wait()
        finally:
            del self._questions[lookup.id]
        found = {self._instance: self.here(recipient)} | question.answers
        return Whereabouts(found, sorted(question.missing))

    def hear(self, lookup: Lookup) -> None:
        """Answer a question of another instance, or take its answer."""
        if lookup.sender == self._instance:
            return
        if lookup.sessions is None:
            sessions = list(self.here(lookup.recipient))
            answer = Lookup(lookup.id, self._instance, lookup.recipient, sessions)
            self._do_later("answer_lookup", lambda: self._answer(answer))
        elif (question := self._questions.get(lookup.id)) is not None:
            question.answers[lookup.sender] = lookup.sessions
            question.missing.discard(lookup.sender)
            if not question.missing:
                question.is_answered.set()

    async def _answer(self, answer: Lookup) -> None:
        with contextlib.suppress(TransportError):  # then this instance counts as silent
            await self._publish(answer)

    async def _publish(self, lookup: Lookup) -> None:
        await self._transport.publish([Signal(encode_lookup(lookup))])


def _listed(session: Listener) -> ListedSession:
    told = None if session.told == UNKNOWN_VERSION else session.told
    return ListedSession(session.device, session.address, session.began_at, told)
