"""One Pub/Sub subscription of an instance: created, streamed, restored, deleted.

What can happen to it, and how it recovers:

- The stream ends (every half hour, an outage, a dead connection): it is opened again with full
  jitter. The subscription keeps what is published meanwhile, so this is a gap only when it took
  nearly as long as messages are retained.
- The subscription is missing, or attached to a topic that was deleted: it is created anew, and a
  gap is reported. If somebody else has its name then, as an instance of the same name has, it gets
  another. Otherwise the two would delete each other's for ever.
- Nothing arrives for :data:`SILENT_S`: the service is asked whether the subscription is attached to
  the topic. It is not when somebody has deleted the topic and created it again, and no error tells.
- Nothing arrives for :data:`QUIET_S`: a probe tests whether the subscription delivers. If not,
  the stream is opened again, and the subscription is checked.
- Google's emulator keeps delivering to the broken stream. So there a broken stream costs the
  subscription, which is created anew.

A gap is reported only when a probe has arrived through the restored stream.
"""

import asyncio
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import structlog

from pokebridge.backoff import backoff_s
from pokebridge.errors import TransportError
from pokebridge.supervisor import cancel, supervise
from pokebridge.transport.base import Feed, Receiver, Selection, Signal, deliver, report_gap
from pokebridge.transport.google_pubsub_api import (
    PubSubApi,
    PubSubError,
    StreamingCall,
    StreamingPullRequest,
)
from pokebridge.transport.google_pubsub_topic import SHARD_ATTRIBUTE, Topic
from pokebridge.wire import encode_probe

ACK_DEADLINE_S = 10
RETENTION_S = 600
EXPIRY_S = 24 * 60 * 60
ACK_EVERY_S = 0.1
MAX_ACKS_A_REQUEST = 2500  # as many as Google's clients send; the limit is 512 KiB
MAX_OUTSTANDING_MESSAGES = 10_000
MAX_OUTSTANDING_BYTES = 16 * 1024 * 1024
# Google closes a stream whose client sends nothing for a minute.
HEARTBEAT_S = 30.0
# An outage is noticed late, by up to a heartbeat and a keepalive: hence the margin.
COVERED_S = RETENTION_S - 120
# The gateway probes what has been silent for 5 s. So after this time something is wrong.
SILENT_S = 8.0
QUIET_S = 60.0
WATCH_S = 5.0
PROOF_TIMEOUT_S = 10.0
PROOF_RETRY_S = 0.25
SETTLE_S = 5.0
BACKOFF_BASE_S, BACKOFF_CAP_S = 0.1, 1.0
STABLE_S = 10.0
DELETE_TIMEOUT_S = 5.0
EMULATOR_FORGETS_S = 0.2

log = structlog.get_logger(__name__)


def filter_for(selection: Selection) -> str:
    """Return the Pub/Sub filter for ``selection``, which is empty for everything."""
    if selection is Feed.ALL:
        return ""
    if selection is Feed.UNTAGGED:
        return f"NOT attributes:{SHARD_ATTRIBUTE}"
    return f'attributes.{SHARD_ATTRIBUTE} = "{selection}"'


class Source(NamedTuple):
    """What a subscription delivers."""

    topic: Topic
    wanted: Selection
    """What it takes from the topic."""
    selection: Selection
    """What its receiver asked for, which gaps report. It may consist of several sources."""
    shard: int | None
    """The tag of its probes."""


class PulledSubscription:
    """A subscription and the stream that pulls from it.

    Args:
        api: calls the project.
        name: the full resource name.
        source: what the subscription delivers.
        receiver: receives it.
        labels: identify the owner. A subscription of this name with other labels is not replaced.
        on_closed: called when the subscription is closed and deleted.
    """

    def __init__(
        self,
        api: PubSubApi,
        name: str,
        source: Source,
        receiver: Receiver,
        *,
        labels: Mapping[str, str],
        on_closed: Callable[[], object],
    ) -> None:
        self._api = api
        self.name = name
        # The last failure, until signals arrive again.
        self.trouble: str | None = None
        self._source = source
        self._topic = source.topic
        # Which tags are passed on, and the tag of signals that have none.
        self._wanted_tag = None if isinstance(source.wanted, Feed) else str(source.wanted)
        self._takes_all = source.wanted is Feed.ALL
        self._own_tag = str(source.shard) if self._takes_all and source.shard is not None else None
        self._receiver = receiver
        self._labels = dict(labels)
        self._on_closed = on_closed
        self._client_id = secrets.token_hex(16)
        # Received messages to acknowledge.
        self._acks: list[str] = []
        self._has_acks = asyncio.Event()
        # The body of the probe that is waited for, and whether it has arrived.
        self._proof = b""
        self._proven = asyncio.Event()
        # Why signals may have been lost, until that is reported.
        self._gap: str | None = None
        # Whether the subscription was created in the background, which is no gap.
        self._is_new = False
        # Whether the subscription must be created anew.
        self._gone = False
        # When the service was last asked whether the subscription is attached to the topic.
        self._asked_s = 0.0
        # Wakes the watch.
        self._doubted = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        # When a message last arrived, and when the stream last worked.
        self._heard_s = self._good_s = self._loop.time()
        self._denied: asyncio.Future[PubSubError] = self._loop.create_future()
        self._task: asyncio.Task[None] | None = None
        # Whether it was ever created, and whether there may be something to delete.
        self._has_existed = self._may_exist = False
        self._closed = False

    async def open(self, *, await_refusal_s: float) -> None:
        """Create the subscription and start to receive.

        Raises:
            TransportError: creating it is refused, or reading it is refused within
                ``await_refusal_s``. The service does not report that it accepted a stream.
        """
        await self._create()
        self._gone, self._gap = False, None
        self._start()
        await asyncio.wait({self._denied}, timeout=await_refusal_s)
        if self._denied.done():
            raise self._denied.result()

    def open_later(self) -> None:
        """Open in the background, retrying. The first gap reported means that it delivers."""
        self._is_new = True
        self.lose("it is new")
        self._start()

    async def close(self) -> None:
        """Stop receiving and delete the subscription. If that fails, a sweep will delete it."""
        if self._closed:
            return
        self._closed = True
        if self._gap is not None and not self._is_new:
            report_gap(self._receiver, self._source.selection, self._gap)
        await cancel(self._task)
        try:
            if self._may_exist:
                await self._api.call(
                    "DeleteSubscription", subscription=self.name, timeout_s=DELETE_TIMEOUT_S
                )
        except PubSubError as error:
            if not error.is_missing:
                log.warning(
                    "pubsub_subscription_undeleted", subscription=self.name, reason=str(error)
                )
        finally:
            self._topic.attached.discard(self)
            self._on_closed()

    def lose(self, reason: str) -> None:
        """Create the subscription anew, and report a gap."""
        self._gone = True
        self._gap = reason
        self._doubted.set()

    # --- the subscription -----------------------------------------------------------------------

    async def _create(self) -> None:
        is_anothers = self._has_existed and not self._may_exist
        try:
            await self._topic.needed_by(self._call_create)
        except PubSubError as error:
            if not error.is_taken:
                raise
            if is_anothers:
                self._leave_the_name()
            else:
                await self._delete_leftover()
            await self._topic.needed_by(self._call_create)

    def _leave_the_name(self) -> None:
        """Take another name, since another instance of this name uses it."""
        taken, self.name = self.name, f"{self.name.partition('~')[0]}~{secrets.token_hex(4)}"
        log.error("pubsub_subscription_taken", subscription=taken, instead=self.name)

    async def _call_create(self) -> None:
        self._may_exist = True
        try:
            await self._api.call(
                "CreateSubscription",
                name=self.name,
                topic=self._topic.name,
                labels=self._labels,
                filter=filter_for(self._source.wanted),
                ack_deadline_seconds=ACK_DEADLINE_S,
                message_retention_duration={"seconds": RETENTION_S},
                expiration_policy={"ttl": {"seconds": EXPIRY_S}},
            )
        except PubSubError as error:
            self._may_exist = error.is_transient
            raise
        self._has_existed = True
        self._topic.attached.add(self)

    async def _delete_leftover(self) -> None:
        """Delete a subscription that an earlier process or a lost answer left behind.

        It must not be shared: two readers of one subscription would receive half of it each.
        """
        found = await self._api.call("GetSubscription", subscription=self.name)
        if dict(found.labels) != self._labels:
            raise TransportError(
                f"{self.name} has another owner, by its labels {dict(found.labels)}: delete it,"
                " or give this instance another name"
            )
        log.warning("pubsub_subscription_replaced", subscription=self.name)
        await self._api.call("DeleteSubscription", subscription=self.name)
        if self._api.is_emulator:
            # Every 50 ms it ends the streams of deleted subscriptions, which it finds by name.
            await asyncio.sleep(EMULATOR_FORGETS_S)

    async def _is_attached(self) -> bool:
        """Whether it exists and is attached to the topic, not to a deleted one of that name."""
        try:
            found = await self._api.call("GetSubscription", subscription=self.name)
        except PubSubError as error:
            return not error.is_missing
        return bool(found.topic == self._topic.name)

    # --- the stream -----------------------------------------------------------------------------

    def _start(self) -> None:
        self._task = supervise("pubsub_stream", self._run)

    async def _run(self) -> None:
        failures = 0
        while True:
            began_s = self._loop.time()
            try:
                if self._gone:
                    await self._create()
                    self._gone = False
                await self._stream()
            except PubSubError as error:
                self._note(error)
            if self._loop.time() - began_s > STABLE_S:
                failures = 0
            await asyncio.sleep(backoff_s(failures, first_s=BACKOFF_BASE_S, cap_s=BACKOFF_CAP_S))
            failures += 1

    def _note(self, error: PubSubError) -> None:
        self.trouble = str(error)
        if error.is_deleted:
            self._may_exist = False
        if error.is_missing:
            log.warning("pubsub_subscription_missing", subscription=self.name, reason=str(error))
            self.lose("the subscription was gone")
        elif self._api.is_emulator:
            self.lose("the stream broke")
        elif error.is_transient:
            log.info("pubsub_stream_ended", subscription=self.name, reason=str(error))
        else:
            log.error("pubsub_stream_refused", subscription=self.name, reason=str(error))
        if error.is_denied and not self._denied.done():
            self._denied.set_result(error)

    async def _stream(self) -> None:
        """Receive until the stream ends. Raises PubSubError when it broke."""
        async with self._api.stream(self.name) as call:
            await call.write(
                StreamingPullRequest(
                    subscription=self.name,
                    client_id=self._client_id,
                    stream_ack_deadline_seconds=ACK_DEADLINE_S,
                    max_outstanding_messages=MAX_OUTSTANDING_MESSAGES,
                    max_outstanding_bytes=MAX_OUTSTANDING_BYTES,
                )
            )
            self._doubted.clear()
            self._heard_s = self._loop.time()
            tasks = [
                asyncio.create_task(part)
                for part in (self._read(call), self._write(call), self._watch())
            ]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    if task.done() and not task.cancelled():
                        task.result()
            finally:
                await cancel(*tasks)

    async def _read(self, call: StreamingCall) -> None:
        async for response in call:
            self._take(response)

    def _take(self, response: Any) -> None:
        """Acknowledge on receipt: a late poke is worthless, and its version is in the mailbox."""
        self._mark_good()
        self._heard_s = self._good_s
        self.trouble = None
        for received in response.received_messages:
            self._acks.append(received.ack_id)
            message = received.message
            tag = message.attributes.get(SHARD_ATTRIBUTE)
            # Google's emulator ignores filters.
            if self._takes_all or tag == self._wanted_tag:
                body = message.data
                deliver(self._receiver, body, tag or self._own_tag)
                if body == self._proof:
                    self._proven.set()
        self._has_acks.set()

    async def _write(self, call: StreamingCall) -> None:
        """Acknowledge in batches, and send a heartbeat when there is nothing to acknowledge."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._has_acks.wait()
                    await asyncio.sleep(ACK_EVERY_S)
            self._has_acks.clear()
            acks, self._acks = self._acks, []
            for start in range(0, max(len(acks), 1), MAX_ACKS_A_REQUEST):
                batch = acks[start : start + MAX_ACKS_A_REQUEST]
                await call.write(StreamingPullRequest(ack_ids=batch))
            self._mark_good()

    # --- gaps -----------------------------------------------------------------------------------

    def _mark_good(self) -> None:
        """Note that the stream works. If it last did too long ago, messages are lost."""
        now_s = self._loop.time()
        if now_s - self._good_s > COVERED_S:
            self._gap = f"cut off for {now_s - self._good_s:.0f} s"
            self._doubted.set()
        self._good_s = now_s

    async def _watch(self) -> None:
        """Report gaps once the stream is proven. Return when it must be opened again."""
        while not self._gone:
            if self._loop.time() - self._good_s > COVERED_S:
                self._mark_good()
            self._doubted.clear()
            gap, quiet_s = self._gap, self._loop.time() - self._heard_s
            if gap is None and not await self._seems_attached():
                self.lose("the topic was deleted")
                return
            if gap is not None or quiet_s > QUIET_S:
                if not await self._prove():
                    if self._api.is_emulator or not await self._is_attached():
                        self.lose("the subscription did not deliver")
                    return
                self._heard_s = self._loop.time()
                if gap is not None and not self._gone:
                    self._gap = None
                    if not self._is_new:
                        log.warning("pubsub_gap", subscription=self.name, reason=gap)
                    self._is_new = False
                    report_gap(self._receiver, self._source.selection, gap)
            with suppress(TimeoutError):
                async with asyncio.timeout(WATCH_S):
                    await self._doubted.wait()

    async def _seems_attached(self) -> bool:
        """As :meth:`_is_attached`, but asked every :data:`SILENT_S` only, while nothing arrives."""
        now_s = self._loop.time()
        if now_s - max(self._heard_s, self._asked_s) < SILENT_S:
            return True
        self._asked_s = now_s
        return await self._is_attached()

    async def _prove(self) -> bool:
        """Whether a probe arrives.

        An account that may not publish can't send one. Then this waits several times as long as
        Google was measured to need for a new subscription, and assumes that it delivers.
        """
        self._proof = encode_probe(secrets.token_hex(8))
        self._proven.clear()
        wait_s = PROOF_RETRY_S
        try:
            async with asyncio.timeout(PROOF_TIMEOUT_S):
                while not self._proven.is_set():
                    await self._topic.publish([Signal(self._proof, self._source.shard)])
                    with suppress(TimeoutError):
                        async with asyncio.timeout(wait_s):
                            await self._proven.wait()
                    wait_s *= 2
        except TimeoutError:
            return False
        except PubSubError as error:
            if error.is_denied:
                await asyncio.sleep(SETTLE_S)
            return error.is_denied
        finally:
            self._proof = b""
        return True
