"""One connection of a client over TCP or TLS: read, written to and ended, never waited for.

What the client sends is read in portions and handed to a :class:`StreamReceiver`, which says how
much of it was complete messages; the rest is kept. What it is to get is queued as whole messages,
and leaves at the end of the loop's iteration with one system call. A client that reads too slowly
loses the oldest of the datagrams that wait for it, and never half a message.

Whose turn it is, and how much there may be of everything, is for :mod:`relay.net.streams` to say.
"""

import logging
import socket
import ssl
import struct
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from enum import Enum, auto
from itertools import repeat
from typing import TYPE_CHECKING, Any, Final, Protocol

from relay.net.proxyprotocol import NoHeader, read_header
from relay.net.tls import LARGEST_REPLY, TlsSession
from relay.net.udp import SocketAddress

if TYPE_CHECKING:
    from relay.net.streams import Streams

logger = logging.getLogger("relay.net")

READ_SIZE: Final = 64 << 10  # bytes at a time, of a connection
TLS_READ_SIZE: Final = 32 << 10  # bytes, for the same reason as SEALED_AT_ONCE
NEWCOMER_READ_SIZE: Final = 4 << 10  # bytes, until it has been in use

QUEUED: Final = 128 << 10  # bytes of datagrams that may wait for one client
OVERHEAD: Final = 64  # bytes of memory that each message takes beside its own
SENT_AT_ONCE: Final = 64 << 10  # bytes, or a message more
SEALED_AT_ONCE: Final = 32 << 10  # likewise, of TLS: its buffers keep the size that they once had
ANSWERS: Final = 16 << 10  # bytes of answers, from which on no more is asked
_MOST_OUTSIDE: Final = 4 * SENT_AT_ONCE  # bytes of handshakes and alerts: nobody needs so many
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)  # struct linger

STREAM_FULL: Final = "stream_full"
"""Why a datagram for a client was lost that reads too slowly."""


class End(Enum):
    """Why a connection has ended. The value is the name under which it is counted."""

    CLIENT = "client"  # closed it
    RESET = "reset"  # or is gone
    MALFORMED = "malformed"  # what it sent is neither STUN nor ChannelData, or too long
    TLS = "tls"  # it did not get through the handshake, or broke the protocol after it
    PROXY = "proxy"  # no good header of the PROXY protocol
    IDLE = "idle"  # it had no allocation for PATIENCE, or up to twice that
    CROWDED_OUT = "crowded_out"  # it had none, and there were too many
    FULL = "full"  # there were too many, all in use
    ADDRESS_FULL = "address_full"  # there were too many of its address
    RATE = "rate"  # more than its network, or all together, may open
    STOPPED = "stopped"  # the relay ends
    REPLACED = "replaced"  # another process goes on, and TLS cannot be handed to it
    BUG = "bug"


_REFUSED: Final = frozenset({End.FULL, End.ADDRESS_FULL, End.RATE, End.PROXY, End.CROWDED_OUT})


class Then(Enum):
    """What comes after what has been served."""

    MORE = auto()  # more has to be read: all complete messages are served
    AGAIN = auto()  # complete ones may be left, but it is the others' turn
    LATER = auto()  # one is left that cannot be served at the moment


class Broken(ValueError):
    """What a client has sent cannot be read; the connection is good for nothing more."""


class StreamReceiver(Protocol):
    """What takes what clients send."""

    def on_connected(self, stream: "Stream", /) -> Any:  # noqa: ANN401
        """Take a connection: return what it is known by to the other methods, or None to refuse."""

    def on_stream(self, client: Any, view: memoryview, size: int, /) -> tuple[int, Then]:  # noqa: ANN401
        """Serve the complete messages in the first *size* bytes; return how many bytes they had.

        Raises Broken.
        """

    def on_disconnected(self, client: Any, /) -> None:  # noqa: ANN401
        """Forget a client whose connection has ended."""

    def is_in_use(self, client: Any, /) -> bool:  # noqa: ANN401
        """Tell if a connection is still good for something."""


class _Stage(Enum):
    PROXY = auto()  # waits for a header of the PROXY protocol
    HANDSHAKE = auto()
    OPEN = auto()
    ENDED = auto()


class Stream:
    """One connection. To the data path it is a client that can be sent to."""

    __slots__ = (
        "_answers",
        "_answers_size",
        "_context",
        "_failure",
        "_has_been_in_use",
        "_has_messages",
        "_held",
        "_is_blocked",
        "_is_over",
        "_is_reading",
        "_queue",
        "_queue_size",
        "_sock",
        "_stage",
        "_streams",
        "_tls",
        "_undecrypted",
        "_unsent",
        "_will_push",
        "address",
        "client",
        "site",
        "transport",
    )

    def __init__(
        self,
        streams: "Streams",
        sock: socket.socket,
        address: SocketAddress,
        transport: str,
        context: ssl.SSLContext | None,
        *,
        is_proxied: bool,
    ) -> None:
        """Own *sock*. With a *context*, TLS is spoken."""
        self.address = address  # of the client, whoever the other end of the connection is
        self.transport = transport
        self.client: Any = None  # what the receiver knows it by
        self.site: bytes | None = None
        self._streams = streams
        self._sock = sock
        self._context = context
        self._tls: TlsSession | None = None  # until there is something for it
        self._stage = _Stage.PROXY if is_proxied else self._first_stage
        self._undecrypted = b""  # records that have to wait
        self._held = b""  # messages that have to wait, or the start of one
        self._has_messages = False  # there may be complete ones in what is held
        self._has_been_in_use = False
        self._is_over = False  # the client has said that it will say nothing more
        self._is_reading = True
        self._is_blocked = False  # the kernel takes nothing more at the moment
        self._will_push = False
        self._failure: End | None = None
        # Bytes that were begun to be sent, then whole messages: answers, then datagrams.
        self._unsent: memoryview | bytes = b""
        self._answers: deque[bytes] = deque()
        self._answers_size = 0
        self._queue: deque[bytes] = deque()
        self._queue_size = 0

    @property
    def _first_stage(self) -> _Stage:
        return _Stage.OPEN if self._context is None else _Stage.HANDSHAKE

    @property
    def is_in_use(self) -> bool:
        """Whether it is good for something."""
        return self.client is not None and self._streams.receiver.is_in_use(self.client)

    @property
    def is_clogged(self) -> bool:
        """Whether so many answers wait that no more should be asked."""
        return self._answers_size > ANSWERS

    def come_from(self, address: SocketAddress) -> bool:
        """Be the connection of a client at *address*; return whether it may be."""
        self.address = address
        refused = self._streams.admit(self)
        if refused is not None:
            self.close(refused)
        return refused is None

    # --- What the client sends ---------------------------------------------------------------

    def on_event(self) -> None:
        """Send, if that was waited for, and read a portion."""
        if self._is_blocked:
            self._push()
            if self._failure is not None:
                self.close(self._failure)
                return
        if self._is_reading:
            self._read()
        elif self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.close(End.RESET)

    def resume(self) -> None:
        """Go on where it was to wait for its turn."""
        if self._stage is _Stage.ENDED:
            return
        if self._stage is _Stage.HANDSHAKE:
            self._decrypt(self._undecrypted)
        elif self._has_messages:
            self._has_messages = False
            self._streams.view[: len(self._held)] = self._held
            self._serve(len(self._held))
        elif self._undecrypted:
            self._decrypt(self._undecrypted)
        else:
            self._go_on()

    def _read(self) -> None:
        streams, is_plain = self._streams, self._context is None and self._stage is _Stage.OPEN
        held = 0
        into, most = streams.raw, TLS_READ_SIZE
        if is_plain:
            held, most = len(self._held), READ_SIZE
            into = streams.view[held:]
            if held:
                streams.view[:held] = self._held
        if not self._has_been_in_use:
            most = NEWCOMER_READ_SIZE
        try:
            size = self._sock.recv_into(into, most)
        except BlockingIOError:
            return
        except OSError:
            self.close(End.RESET)
            return
        if not size:
            self.close(End.CLIENT)
        elif is_plain:
            self._serve(held + size)
        else:
            self._take(into[:size])

    def _take(self, received: memoryview) -> None:
        """Take what is in TLS, or behind a header that has yet to come."""
        if self._stage is _Stage.PROXY:
            begin = self._held + bytes(received)
            try:
                header = read_header(begin)
            except NoHeader as error:
                logger.debug("connection from %s: %s", self.address[:2], error)
                self.close(End.PROXY)
                return
            if header is None:
                self._held = begin
                return
            self._held = b""
            self._stage = self._first_stage
            if not self.come_from(header.source or self.address):
                return
            received = memoryview(begin)[header.size :]
            if self._context is None:
                self._streams.view[: len(received)] = received
                self._serve(len(received))
                return
        self._decrypt(received)

    def _decrypt(self, received: memoryview | bytes) -> None:
        """Go on with the handshake, or read some records of TLS; the rest has to wait."""
        view, is_over = self._streams.view, False
        tls = self._tls
        if tls is None:
            assert self._context is not None
            tls = self._tls = TlsSession(self._context)
        size = held = len(self._held)
        try:
            if self._stage is _Stage.HANDSHAKE and not self._streams.may_shake_hands(self):
                self._undecrypted = bytes(received)
                self._watch(reading=False)
                return
            fed = tls.feed(memoryview(received))
            self._undecrypted = bytes(received[fed:])
            if self._stage is _Stage.HANDSHAKE and not self._shake_hands(tls):
                self._go_on()
                return
            view[:held] = self._held
            while (read := tls.read_into(view[size:])) is not None:
                size += read
                if not read:
                    is_over = True
                    break
            said = tls.output()
            if len(said) > LARGEST_REPLY:  # KeyUpdates, over and over
                self.close(End.TLS)
                return
            self._send_outside(said)
        except ssl.SSLError as error:
            logger.debug("connection from %s: %s", self.address[:2], error.reason)
            self._streams.has_shaken_hands()
            self._send_outside(tls.output())
            self.close(End.TLS)
            return
        if is_over:
            self._is_over, self._undecrypted = True, b""
        if size > held:
            self._serve(size)
        else:
            self._go_on()

    def _shake_hands(self, tls: TlsSession) -> bool:
        """Go on with the handshake when it is our turn; return whether it is done."""
        is_done = tls.shake_hands()
        said = tls.output()
        if said or is_done:  # else only a part of something has come, which costs nothing
            self._streams.has_shaken_hands()
        self._send_outside(said)
        if is_done:
            self._stage = _Stage.OPEN
        return is_done

    def _go_on(self) -> None:
        """Go on when all that could be served is: decrypt more, read more, or end."""
        if self._stage is _Stage.ENDED:
            return
        if self._undecrypted:
            self._wait(self._streams.serve_again)
        elif self._is_over:
            self.close(End.CLIENT)
        else:
            self._watch(reading=True)

    def _wait(self, for_what: Callable[["Stream"], None]) -> None:
        self._watch(reading=False)
        for_what(self)

    def _serve(self, size: int) -> None:
        """Have the messages served that are in the first *size* bytes of the view."""
        streams = self._streams
        try:
            served, then = streams.receiver.on_stream(self.client, streams.view, size)
        except Broken as error:
            logger.debug("connection from %s: %s", self.address[:2], error)
            self.close(End.MALFORMED)
            return
        except BaseException:
            self.close(End.BUG)
            raise
        self._held = bytes(streams.view[served:size])
        if not self._has_been_in_use:
            self._has_been_in_use = self.is_in_use
        self._has_messages = then is not Then.MORE
        if then is Then.AGAIN:
            self._wait(streams.serve_again)
        elif then is Then.LATER:
            self._wait(streams.serve_later)
        else:
            self._go_on()

    # --- What it is sent ---------------------------------------------------------------------

    def send(self, datagram: memoryview | bytes, _tos: int = 0) -> bool:
        """Queue a message, a datagram in its frame; return whether there was room for it."""
        rest = len(datagram) & 3
        message = b"".join((datagram, _PADDING[rest])) if rest else bytes(datagram)
        self._queue_messages((message,), len(message))
        return True

    def send_many(
        self, pieces: list[memoryview | bytes], each: int, size: int, _tos: int = 0
    ) -> int:
        """Queue messages of *each* pieces and *size* bytes, of which the last may be shorter.

        Returns how many, which is all of them.
        """
        padding = _PADDING[size & 3]
        groups = zip(*[iter(pieces)] * each, repeat(padding), strict=False)
        messages = list(map(b"".join, groups))
        last = b"".join(pieces[-each:])
        messages[-1] = last + _PADDING[len(last) & 3]
        whole = (len(messages) - 1) * (size + len(padding))
        self._queue_messages(messages, whole + len(messages[-1]))
        return len(messages)

    def answer(self, message: bytes) -> None:
        """Queue an answer. It goes ahead of the datagrams, and is never dropped for them."""
        self._answers.append(message)
        self._answers_size += len(message)
        self._push_soon()

    def _queue_messages(self, messages: Sequence[bytes], size: int) -> None:
        """Queue messages of *size* bytes together."""
        streams, size = self._streams, size + OVERHEAD * len(messages)
        self._queue.extend(messages)
        self._queue_size += size
        streams.queued += size
        self._push_soon()
        if self._queue_size > SENT_AT_ONCE and not self._is_blocked:
            self._push()
        # Of datagrams in real time the oldest is worth least.
        while self._queue_size > QUEUED:
            self._drop_oldest()
        streams.make_room()

    def _drop_oldest(self) -> None:
        size = len(self._queue.popleft()) + OVERHEAD
        self._queue_size -= size
        self._streams.queued -= size
        self._streams.lost(STREAM_FULL)

    def drop_all(self) -> None:
        """Drop the datagrams that wait for this client; there is no room for all of them."""
        while self._queue:
            self._drop_oldest()

    def _push_soon(self) -> None:
        if not self._will_push and not self._is_blocked:
            self._will_push = True
            self._streams.reactor.call_at_end(self._push_now)

    def _push_now(self) -> None:
        """Send what waits, at the end of an iteration."""
        self._will_push = False
        if self._stage is _Stage.ENDED:
            return
        if not self._is_blocked:
            self._push()
        if self._failure is not None:
            self.close(self._failure)

    def _push(self) -> None:
        """Send as much as the kernel takes. A failure is only noted: routes may be in use."""
        while self._unsent or self._answers or self._queue:
            try:
                if not self._unsent:
                    self._seal_next()
                sent = self._sock.send(self._unsent)
            except BlockingIOError:
                sent = 0
            except OSError:  # ssl's errors among them
                self._failure = End.RESET
                return
            self._unsent = self._unsent[sent:]
            self._streams.queued -= sent
            if self._unsent:
                self._block(is_blocked=True)
                return
        self._block(is_blocked=False)

    def _seal_next(self) -> None:
        """Take messages that are to leave next, as they are or encrypted. Raises ssl.SSLError."""
        messages = list(self._answers)
        self._answers.clear()
        self._answers_size = 0
        queue, tls = self._queue, self._tls
        most = SENT_AT_ONCE if tls is None else SEALED_AT_ONCE
        if self._queue_size <= most:
            messages += queue
            queue.clear()
            taken = self._queue_size
        else:
            taken = 0
            while taken < most and queue:
                messages.append(queue.popleft())
                taken += len(messages[-1]) + OVERHEAD
        self._queue_size -= taken
        self._streams.queued -= taken
        self._unsent = memoryview(b"".join(messages) if tls is None else tls.seal(messages))
        self._streams.queued += len(self._unsent)

    def _send_outside(self, records: bytes) -> None:
        """Send what TLS itself has to say, before anything that is sealed after it."""
        if records:
            self._unsent = bytes(self._unsent) + records
            self._streams.queued += len(records)
            if len(self._unsent) > _MOST_OUTSIDE:
                self._failure = End.TLS
            self._push_soon()

    def _block(self, *, is_blocked: bool) -> None:
        if is_blocked is not self._is_blocked:
            self._is_blocked = is_blocked
            self._streams.be_slow(self, is_slow=is_blocked)
            self._streams.reactor.watch(
                self._sock, readable=self._is_reading, writable=self._is_blocked
            )

    def _watch(self, *, reading: bool) -> None:
        if reading is not self._is_reading and self._stage is not _Stage.ENDED:
            self._is_reading = reading
            self._streams.reactor.watch(self._sock, readable=reading, writable=self._is_blocked)

    # --- From one process to another ---------------------------------------------------------

    @property
    def can_move(self) -> bool:
        """Whether another process can go on with it: not with TLS, whose keys are OpenSSL's."""
        return self._context is None and self._stage is not _Stage.ENDED

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._sock.fileno()

    def dump(self) -> dict[str, Any] | None:
        """Return what has been begun and is not finished, for :meth:`load`; None if nothing is."""
        waits = (self._held, self._unsent, self._answers, self._queue)
        if self._stage is _Stage.OPEN and self._has_been_in_use and not any(waits):
            return None
        return {
            "awaits_proxy": self._stage is _Stage.PROXY,
            "has_been_in_use": self._has_been_in_use,
            "has_messages": self._has_messages,
            "held": self._held.hex(),
            "unsent": bytes(self._unsent).hex(),
            "answers": [message.hex() for message in self._answers],
            # It may be long, so it is written in one piece.
            "queue": b64encode(b"".join(self._queue)).decode(),
            "sizes": [len(message) for message in self._queue],
        }

    def load(self, unfinished: Mapping[str, Any] | None) -> None:
        """Go on with what another process has begun. Raises KeyError, TypeError or ValueError."""
        if unfinished is None:
            self._has_been_in_use = True
            return
        self._stage = _Stage.PROXY if unfinished["awaits_proxy"] else _Stage.OPEN
        self._has_been_in_use = bool(unfinished["has_been_in_use"])
        self._held = bytes.fromhex(unfinished["held"])
        self._unsent = bytes.fromhex(unfinished["unsent"])
        self._streams.queued += len(self._unsent)
        for message in map(bytes.fromhex, unfinished["answers"]):
            self.answer(message)
        whole, at, messages = b64decode(unfinished["queue"]), 0, []
        for size in unfinished["sizes"]:
            messages.append(whole[at : at + size])
            at += size
        self._queue.extend(messages)
        size = sum(map(len, messages)) + OVERHEAD * len(messages)
        self._queue_size += size
        self._streams.queued += size
        self._push_soon()
        if unfinished["has_messages"]:
            self._has_messages = True
            self._wait(self._streams.serve_again)

    def leave(self) -> None:
        """Have nothing to do with the connection any more: it is another process's to end."""
        self._stage = _Stage.ENDED
        self._streams.queued -= self._queue_size + len(self._unsent)
        self._streams.reactor.retire(self._sock)
        self._streams.drop(self)

    def close(self, why: End) -> None:
        """End the connection; what waits for the client is sent as far as that can be at once."""
        if self._stage is _Stage.ENDED:
            return
        is_open, self._stage = self._stage is _Stage.OPEN, _Stage.ENDED
        with suppress(OSError):  # the client may be gone
            if why in _REFUSED:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            elif not self._is_blocked:
                self._say_goodbye(is_open=is_open)
        self._streams.queued -= self._queue_size + len(self._unsent)
        self._streams.reactor.retire(self._sock)
        self._streams.forget(self, why)
        if self.client is not None:
            self._streams.receiver.on_disconnected(self.client)

    def _say_goodbye(self, *, is_open: bool) -> None:
        """Send what there is to say about the end. Raises OSError."""
        self._push()
        if is_open and self._tls is not None and not self._is_blocked and self._failure is None:
            self._sock.send(self._tls.end())


_PADDING: Final = (b"", bytes(3), bytes(2), bytes(1))
