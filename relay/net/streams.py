"""Connections of clients over TCP and TLS: accepted, read, written to and ended, never waited for.

What a client sends is read in portions into one buffer that all connections share, and handed to
a :class:`StreamReceiver`, which says how much of it was complete messages; the rest is kept. What
it is to get is queued as whole messages, and leaves at the end of the loop's iteration with one
system call. A client that reads too slowly loses the oldest of the datagrams that wait for it, and
never half a message.

=============================  ================================================================
bound                          what it stands against
=============================  ================================================================
most connections               using up descriptors and memory; the oldest newcomer has to go
most of one address            using up those
:data:`PATIENCE`               connections that never ask for anything, or too slowly
one handshake per iteration    the computing of many handshakes ahead of everybody's datagrams
records at a time              records of TLS that cost much and say nothing
:data:`READ_SIZE`              one client that sends much, ahead of the others
:data:`NEWCOMER_READ_SIZE`     holding much for those who have proven nothing
:data:`QUEUED`, in all too     clients that do not read, while their peers send
=============================  ================================================================
"""

import errno
import logging
import socket
import ssl
import struct
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from ipaddress import ip_address, ip_network
from itertools import islice
from typing import Any, Final, Protocol

from relay.net.addresses import pack, require_one_family
from relay.net.proxyprotocol import NoHeader, read_header
from relay.net.reactor import Reactor
from relay.net.tls import LARGEST_REPLY, Identity, TlsSession
from relay.net.udp import SocketAddress

logger = logging.getLogger("relay.net")

BACKLOG: Final = 1024  # connections that wait to be accepted
ACCEPTS_AT_ONCE: Final = 16
READ_SIZE: Final = 64 << 10  # bytes at a time, of a connection
TLS_READ_SIZE: Final = 32 << 10  # bytes; OpenSSL's buffers keep the size that they once had
NEWCOMER_READ_SIZE: Final = 4 << 10  # bytes, until it has been in use
_LONGEST_HELD: Final = 64 << 10  # bytes of a message whose end has not come yet
RESUMED_AT_ONCE: Final = 4  # connections per iteration, of those that wait for their turn
RETRIED_AT_ONCE: Final = 50  # of those that could not be served, each time that it is tried
HELLOS_AT_ONCE: Final = 64  # of which nothing has come of yet, per iteration
PATIENCE: Final = 10.0  # seconds that a connection may be good for nothing
ENDED_AT_ONCE: Final = 200  # connections whose time is over, per iteration
# Seconds until what cannot be served now is tried again. As often as over UDP (RFC 8489 §6.2.1),
# and no more often than a quiet client asks (QUIET_RATE in relay.turn.ratelimit).
LATER: Final = 0.5
ACCEPTING_AGAIN: Final = 1.0  # seconds, when there are no descriptors or no memory

QUEUED: Final = 128 << 10  # bytes of datagrams that may wait for one client
DROPPED_AT_ONCE: Final = 8  # clients, each time that there is no room for all
QUEUED_IN_ALL: Final = 64 << 20  # bytes for all of them
OVERHEAD: Final = 64  # bytes of memory that each message takes beside its own
SENT_AT_ONCE: Final = 64 << 10  # bytes, or a message more
SEALED_AT_ONCE: Final = 16 << 10  # likewise, of TLS
ANSWERS: Final = 16 << 10  # bytes of answers, from which on no more is asked
UNSENT_BY_KERNEL: Final = 128 << 10  # bytes that it takes before they fit into the network
_MOST_OUTSIDE: Final = 4 * SENT_AT_ONCE  # bytes of handshakes and alerts: nobody needs so many

_TCP_NOTSENT_LOWAT: Final = 25  # <linux/tcp.h>; the socket module of Python 3.11 lacks it
# A client that is gone without a word: found after some 75 seconds of silence, or 60 of data that
# nobody acknowledges.
_OPTIONS: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),  # seconds
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000),  # milliseconds
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, UNSENT_BY_KERNEL),
)
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)  # struct linger
_SHORTAGES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_IPV6_SITE_BYTES: Final = 8  # a /64: whoever has one address of it has them all

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


@dataclass(frozen=True, slots=True)
class Limits:
    """How many connections there may be, and whom to believe about their origin."""

    connections: int
    per_address: int | None  # of IPv6, per /64; None: no limit
    proxies: tuple[str, ...] = ()  # CIDR: who sends a header of the PROXY protocol


def listen_tcp(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def adopt_tcp(sock: socket.socket) -> socket.socket:
    """Take a listening socket that somebody else has made.

    One for IPv6 must be for nothing else (IPV6_V6ONLY): ValueError says that it is not.
    """
    require_one_family(sock)
    return sock


class Streams:
    """All connections, and the sockets that they come through."""

    def __init__(
        self,
        reactor: Reactor,
        limits: Limits,
        lost: Callable[[str], None],
        identity: Identity | None = None,
    ) -> None:
        """Begin with none. *lost* counts what is lost.

        *identity* is for TLS. Raises ValueError if it is not good for that.
        """
        self.reactor = reactor
        self.certificate_expires: float | None = None  # Unix time
        self._context: ssl.SSLContext | None = None
        if identity is not None:
            self.change_identity(identity)
        self.lost = lost
        self.receiver: StreamReceiver
        self.change_limits(limits)
        self.view = memoryview(bytearray(_LONGEST_HELD + 2 * READ_SIZE))  # of what is served
        self.raw = memoryview(bytearray(READ_SIZE))  # of what TLS or a PROXY header is in
        self.queued = 0  # bytes of memory, for all clients
        self.accepted: Counter[str] = Counter()  # connections, by transport
        self.open: Counter[str] = Counter()  # those there are now
        self.ended: Counter[End] = Counter()
        self._listeners: list[tuple[socket.socket, str]] = []
        self._has_started = False
        self._streams: set[Stream] = set()
        self._at_site: Counter[bytes] = Counter()
        # Each until when it may be good for nothing, the first one first.
        self._newcomers: dict[Stream, float] = {}
        self._in_use: dict[Stream, float] = {}  # likewise: when to look again
        self._has_shaken = False  # in this iteration
        self._to_shake: deque[Stream] = deque()
        self._again: deque[Stream] = deque()
        self._later: deque[Stream] = deque()
        self._slow: dict[Stream, None] = {}  # those that the kernel takes nothing for, in order

    def add(self, sock: socket.socket, transport: str) -> None:
        """Own a listening socket; clients that come through it speak *transport*."""
        sock.setblocking(False)
        for level, option, value in _OPTIONS:  # the kernel gives them to the connections, too
            with suppress(OSError):  # another kind of TCP may lack one, and does without
                sock.setsockopt(level, option, value)
        self._listeners.append((sock, transport))

    @property
    def addresses(self) -> list[tuple[str, tuple[str, int]]]:
        """Where clients are listened for: transport, and host with port."""
        return [(transport, sock.getsockname()[:2]) for sock, transport in self._listeners]

    def start(self, receiver: StreamReceiver) -> None:
        """Accept connections from here on."""
        self.receiver = receiver
        self._has_started = True
        for number, (sock, _) in enumerate(self._listeners):
            self.reactor.register(sock, _Acceptor(self, number).on_acceptable)

    def change_limits(self, limits: Limits) -> None:
        """Go on with other limits. Connections that there are already stay."""
        self._limits = limits
        self._proxies = [ip_network(cidr) for cidr in limits.proxies]

    def change_identity(self, identity: Identity) -> None:
        """Go on with another certificate. Sessions that there are already are not touched.

        Raises ValueError if it is not good for TLS; then all stays as it was.
        """
        self._context = identity.context()
        self.certificate_expires = identity.chain.expires

    @property
    def most_descriptors(self) -> int:
        """How many there may be."""
        return self._limits.connections + len(self._listeners) * (1 + ACCEPTS_AT_ONCE)

    def close(self) -> None:
        """End all connections, and listen no more."""
        for stream in list(self._streams):
            try:
                stream.close(End.STOPPED)
            except Exception:
                logger.exception("a connection cannot be ended; this is a bug")
        for sock, _ in self._listeners:
            if self._has_started:
                self.reactor.retire(sock)
            else:
                sock.close()
        self._listeners.clear()
        self.reactor.close_retired()

    def __len__(self) -> int:
        return len(self._streams)

    # --- Newcomers ---------------------------------------------------------------------------

    def accept_some(self, number: int) -> None:
        """Accept a few connections."""
        sock, transport = self._listeners[number]
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                connection, address = sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _SHORTAGES:
                    self._rest(error)
                    return
                continue  # that one is gone already
            connection.setblocking(False)
            self._welcome(connection, address, transport)

    def _welcome(self, sock: socket.socket, address: SocketAddress, transport: str) -> None:
        is_proxy = bool(self._proxies) and self._is_proxy(address[0])
        context = self._context if transport == "tls" else None
        stream = Stream(self, sock, address, transport, context, is_proxied=is_proxy)
        try:
            self.reactor.register(sock, stream.on_event)
        except OSError as error:  # epoll has a limit of its own: fs.epoll.max_user_watches
            sock.close()
            self._rest(error)
            return
        self.accepted[transport] += 1
        self._streams.add(stream)
        self.open[transport] += 1
        if not is_proxy and not stream.come_from(address):
            return
        if len(self._streams) > self._limits.connections:
            oldest = self._oldest_newcomer()
            if oldest is None:
                stream.close(End.FULL)
                return
            oldest.close(End.CROWDED_OUT)
        self._wait_for(self._newcomers, stream)

    def admit(self, stream: "Stream") -> End | None:
        """Count a connection for where it is from; return why there may not be so many."""
        stream.site = site = pack(stream.address[0].partition("%")[0])[:_IPV6_SITE_BYTES]
        self._at_site[site] += 1
        most = self._limits.per_address
        if most is not None and self._at_site[site] > most:
            return End.ADDRESS_FULL
        stream.client = self.receiver.on_connected(stream)
        return End.RATE if stream.client is None else None

    def forget(self, stream: "Stream", why: End) -> None:
        """Have nothing to do with a connection any more."""
        logger.debug("connection from %s has ended: %s", stream.address[:2], why.value)
        self.ended[why] += 1
        self.open[stream.transport] -= 1
        self._streams.remove(stream)
        self._newcomers.pop(stream, None)
        self._in_use.pop(stream, None)
        self._slow.pop(stream, None)
        if stream.site is not None:
            self._at_site[stream.site] -= 1
            if not self._at_site[stream.site]:
                del self._at_site[stream.site]

    def _is_proxy(self, host: str) -> bool:
        address = ip_address(host.partition("%")[0])
        return any(address in network for network in self._proxies)

    def _oldest_newcomer(self) -> "Stream | None":
        """Return the connection that has been good for nothing for the longest time."""
        while self._newcomers:
            stream = next(iter(self._newcomers))
            if not stream.is_in_use:
                return stream
            del self._newcomers[stream]
            self._wait_for(self._in_use, stream)
        return None

    def _wait_for(self, waiting: "dict[Stream, float]", stream: "Stream") -> None:
        """Look in PATIENCE whether a connection is good for something."""
        now = self.reactor.clock()
        waiting[stream] = now + PATIENCE
        if len(waiting) == 1:
            self.reactor.call_at(self._next_look(), self._look)

    def _next_look(self) -> float:
        waiting = [queue for queue in (self._newcomers, self._in_use) if queue]
        return min(next(iter(queue.values())) for queue in waiting)

    def _look(self) -> None:
        """End the connections that have not been good for anything, some at a time."""
        now, left = self.reactor.clock(), ENDED_AT_ONCE
        try:
            for waiting in (self._newcomers, self._in_use):
                while waiting and left:
                    stream, deadline = next(iter(waiting.items()))
                    if deadline > now:
                        break
                    left -= 1
                    del waiting[stream]
                    if stream.is_in_use:
                        self._wait_for(self._in_use, stream)
                    elif waiting is self._in_use:  # a moment ago, perhaps: it may allocate again
                        self._wait_for(self._newcomers, stream)
                    else:
                        stream.close(End.IDLE)
        finally:
            if self._newcomers or self._in_use:
                self.reactor.call_at(self._next_look(), self._look)

    def _rest(self, error: OSError) -> None:
        """Accept nothing for a moment: what cannot be accepted would keep the loop awake."""
        logger.warning("connections have to wait: %s", error.strerror)
        for sock, _ in self._listeners:
            self.reactor.watch(sock, readable=False, writable=False)
        self.reactor.call_later(ACCEPTING_AGAIN, self._go_on_accepting)

    def _go_on_accepting(self) -> None:
        for sock, _ in self._listeners:
            self.reactor.watch(sock, readable=True, writable=False)

    # --- Whose turn it is --------------------------------------------------------------------

    def may_shake_hands(self, stream: "Stream") -> bool:
        """Tell if a connection may go on with its handshake now; else its turn will come."""
        if self._has_shaken:
            self._to_shake.append(stream)
            if len(self._to_shake) == 1:
                self.reactor.call_at_end(self._shake_next_soon)
            return False
        return True

    def has_shaken_hands(self) -> None:
        """Note that a handshake has been computed: that is enough for this iteration."""
        if not self._has_shaken:
            self._has_shaken = True
            self.reactor.call_at_end(self._end_of_shaking)

    def _end_of_shaking(self) -> None:
        self._has_shaken = False

    def _shake_next_soon(self) -> None:
        if self._to_shake:
            self.reactor.call_later(0.0, self._shake_next)

    def _shake_next(self) -> None:
        """Let those go on who wait to: one with whom something comes of it."""
        self.reactor.call_at_end(self._shake_next_soon)
        for _ in range(min(len(self._to_shake), HELLOS_AT_ONCE)):
            if self._has_shaken:
                break
            self._to_shake.popleft().resume()

    def serve_again(self, stream: "Stream") -> None:
        """Go on with a connection when others have had their turn."""
        self._again.append(stream)
        self.reactor.call_later(0.0, self._serve_again)

    def _serve_again(self) -> None:
        for _ in range(min(len(self._again), RESUMED_AT_ONCE)):
            self.reactor.call_at_end(self._again.popleft().resume)
        if self._again:
            self.reactor.call_later(0.0, self._serve_again)

    def serve_later(self, stream: "Stream") -> None:
        """Go on with a connection in a moment."""
        if not self._later:
            self.reactor.call_later(LATER, self._serve_later)
        self._later.append(stream)

    def _serve_later(self) -> None:
        for _ in range(min(len(self._later), RETRIED_AT_ONCE)):
            self.reactor.call_at_end(self._later.popleft().resume)
        if self._later:
            self.reactor.call_later(LATER / 10, self._serve_later)

    # --- What waits for clients --------------------------------------------------------------

    def be_slow(self, stream: "Stream", *, is_slow: bool) -> None:
        """Note whether the kernel takes nothing more for a client."""
        if is_slow:
            self._slow[stream] = None
        else:
            self._slow.pop(stream, None)

    def drop_some(self) -> None:
        """Drop what waits for those who have read nothing for the longest time."""
        for stream in list(islice(self._slow, DROPPED_AT_ONCE)):
            if self.queued <= QUEUED_IN_ALL:
                break
            stream.drop_all()
            # What it has begun to be sent stays; it need not be looked at again before the others.
            self._slow[stream] = self._slow.pop(stream)


class _Acceptor:
    """What the reactor calls when somebody wants to be accepted."""

    def __init__(self, streams: Streams, number: int) -> None:
        self._streams = streams
        self._number = number

    def on_acceptable(self) -> None:
        """Accept a few connections."""
        self._streams.accept_some(self._number)


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
        streams: Streams,
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
        self._queue_message(b"".join((datagram, _PADDING[rest])) if rest else bytes(datagram))
        return True

    def send_many(
        self, pieces: list[memoryview | bytes], each: int, _size: int, _tos: int = 0
    ) -> int:
        """Queue messages of *each* pieces; return how many, which is all of them."""
        for at in range(0, len(pieces), each):
            message = b"".join(pieces[at : at + each])
            rest = len(message) & 3
            self._queue_message(message + _PADDING[rest] if rest else message)
        return len(pieces) // each

    def answer(self, message: bytes) -> None:
        """Queue an answer. It goes ahead of the datagrams, and is never dropped for them."""
        self._answers.append(message)
        self._answers_size += len(message)
        self._push_soon()

    def _queue_message(self, message: bytes) -> None:
        streams, size = self._streams, len(message) + OVERHEAD
        self._queue.append(message)
        self._queue_size += size
        streams.queued += size
        self._push_soon()
        if self._queue_size > SENT_AT_ONCE and not self._is_blocked:
            self._push()
        # Of datagrams in real time the oldest is worth least.
        while self._queue_size > QUEUED:
            self._drop_oldest()
        if streams.queued > QUEUED_IN_ALL:
            streams.drop_some()

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
        self._unsent = memoryview(b"".join(messages) if tls is None else tls.seal(messages))
        self._streams.queued += len(self._unsent) - taken

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
