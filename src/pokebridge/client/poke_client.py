"""The client for asyncio: one socket for a user, and for the recipients on their screen."""

from dataclasses import replace
from ssl import SSLContext
from types import TracebackType

from pokebridge.client.listening import Listening, SharedSocket, SharingDriver
from pokebridge.client.policy import Policy
from pokebridge.client.pulling import OnMessages, OnPoke
from pokebridge.client.shell import OnEvent, Setup, Shell, TokenProvider
from pokebridge.client.transports import Transport
from pokebridge.model import DEFAULT_DEVICE, check_recipient


class PokeClient(SharingDriver, Shell):
    """Keeps a connection to the bridge, and pulls whenever a poke arrives, until it is closed.

    ::

        async with PokeClient("https://bridge.example.org", get_token, on_messages) as client:
            ...

    It reconnects, renews its token and retries by itself, by the rules of
    :class:`~pokebridge.client.core.ClientCore`. Store ``cursor`` to continue from it after a
    restart.

    Args:
        url: the bridge's HTTP address.
        token: a JWT, or a coroutine function that returns a new one. The function is called at the
            start, before the token expires, and when the server refused the token.
        on_messages: is called with the mailbox's messages in order, one call at a time. When it
            returns, the messages are acked. When it raises, the error is logged and the messages
            are delivered again.
        on_poke: replaces ``on_messages`` when the data is not in the bridge's mailbox. It is called
            whenever there may be something new. When it raises, it is called again.
        device: the name of this device. A message is kept until each known device has acked it.
        cursor: the version up to which all messages are handled already.
        on_event: is called with every event and action of the core. None of them holds a token.
        policy: the delays.
        transport: "auto" connects by WebSocket, and polls over HTTP if no WebSocket works; then it
            retries one from time to time. "websocket" and "poll" use only that transport.
        tls: for ``https``. By default, the system's certificate authorities are trusted.

    Raises:
        ConfigError: the url is not an HTTP URL, or the environment names a proxy that can't be
            used.
        InputError: the device's name is invalid.
    """

    def __init__(
        self,
        url: str,
        token: TokenProvider,
        on_messages: OnMessages | None = None,
        *,
        on_poke: OnPoke | None = None,
        device: str = DEFAULT_DEVICE,
        cursor: int = 0,
        on_event: OnEvent | None = None,
        policy: Policy | None = None,
        transport: Transport = "auto",
        tls: SSLContext | None = None,
    ) -> None:
        super().__init__(
            Setup(
                url=url,
                token=token,
                on_messages=on_messages,
                on_poke=on_poke,
                device=device,
                cursor=cursor,
                on_event=on_event,
                policy=policy,
                transport=transport,
                tls=tls,
            )
        )
        self._shared = SharedSocket(self._say)

    def listen(
        self,
        recipient: str,
        token: TokenProvider,
        on_messages: OnMessages | None = None,
        *,
        on_poke: OnPoke | None = None,
        cursor: int = 0,
    ) -> Listening:
        """Listen to ``recipient`` as well: to a document, a room or a team.

        ::

            listening = client.listen("urn:doc:7", get_token_of_the_doc, on_poke=reload)
            ...
            await listening.close()

        Its pokes come over this client's socket, and its pulls use its own token and cursor. If the
        instance does not support that, as in release 0.1.0, it gets a separate socket.

        Args:
            recipient: whom to hear; the ``sub`` of the token.
            token: as the client's, but of this recipient.
            on_messages: as the client's.
            on_poke: as the client's.
            cursor: as the client's.

        Raises:
            InputError: the recipient is invalid.
            ValueError: this client listens to it already.
        """
        self._entered()
        setup = replace(
            self._setup,
            token=token,
            on_messages=on_messages,
            on_poke=on_poke,
            cursor=cursor,
            on_event=None,
        )
        return self._shared.listen(setup, check_recipient(recipient))

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close everything. A running handler is cancelled, and its page is not acked."""
        await self._shared.close()
        await super().__aexit__(kind, error, traceback)

    def wake(self) -> None:
        """Retry at once instead of after a delay: the network is back, or the machine woke up."""
        super().wake()
        self._shared.wake()
