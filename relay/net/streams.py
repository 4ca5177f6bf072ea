"""The connections of clients over TCP and TLS: how many there may be, and whose turn it is.

What each of them does is in :mod:`relay.net.stream`. Here they are accepted, counted, made to wait
and ended, so that none of them, and no flood of them, holds up the others or anybody's datagrams.

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
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address, ip_network
from itertools import islice
from typing import Any, Final

from relay.net.addresses import pack, require_one_family
from relay.net.reactor import Reactor
from relay.net.stream import READ_SIZE, End, Stream, StreamReceiver
from relay.net.tls import Identity
from relay.net.udp import SocketAddress

logger = logging.getLogger("relay.net")

BACKLOG: Final = 1024  # connections that wait to be accepted
ACCEPTS_AT_ONCE: Final = 16
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

DROPPED_AT_ONCE: Final = 8  # clients, each time that there is no room for all
QUEUED_IN_ALL: Final = 64 << 20  # bytes that may wait for all clients
UNSENT_BY_KERNEL: Final = 128 << 10  # bytes that it takes before they fit into the network

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
_SHORTAGES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_IPV6_SITE_BYTES: Final = 8  # a /64: whoever has one address of it has them all


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
        self.changes = 0  # how often one has come or gone
        self._at_site: Counter[bytes] = Counter()
        # Each until when it may be good for nothing, the first one first.
        self._newcomers: dict[Stream, float] = {}
        self._in_use: dict[Stream, float] = {}  # likewise: when to look again
        self._has_shaken = False  # in this iteration
        self._to_shake: deque[Stream] = deque()
        self._again: deque[Stream] = deque()
        self._later: deque[Stream] = deque()
        self._slow: dict[Stream, None] = {}  # those that the kernel takes nothing for, in order

    def add(self, sock: socket.socket, transport: str, *, is_inherited: bool = False) -> None:
        """Own a listening socket; clients that come through it speak *transport*.

        One that *is_inherited* stays as another process has made it.
        """
        sock.setblocking(False)
        for level, option, value in (
            () if is_inherited else _OPTIONS
        ):  # the kernel gives them to the connections, too
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
        for sock, transport in self._listeners:
            self.reactor.register(sock, partial(self._accept_some, sock, transport))

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

    # --- From one process to another ---------------------------------------------------------

    @property
    def listeners(self) -> list[tuple[socket.socket, str]]:
        """The listening sockets, each with what is spoken there."""
        return self._listeners

    def movable(self) -> list[Stream]:
        """Return the connections that another process can go on with."""
        return [stream for stream in self._streams if stream.can_move]

    def adopt(self, sock: socket.socket, address: SocketAddress, transport: str) -> Stream:
        """Go on with a connection that another process has accepted, and still serves.

        Raises OSError.
        """
        stream = Stream(self, sock, address, transport, None, is_proxied=False)
        self.reactor.register(sock, stream.on_event)
        self._streams.add(stream)
        self.open[transport] += 1
        self._wait_for(self._newcomers, stream)
        return stream

    def settle(self, stream: Stream, client: Any) -> None:  # noqa: ANN401
        """Know a connection that was adopted by its client."""
        stream.client = client
        self._count_at_site(stream)

    def leave(self) -> None:
        """Leave all that can move to another process, and end the rest."""
        for stream in list(self._streams):
            if stream.can_move:
                stream.leave()
        self._close_all(End.REPLACED)

    def close(self) -> None:
        """End all connections, and listen no more."""
        self._close_all(End.STOPPED)
        self._stop_listening()

    def _close_all(self, why: End) -> None:
        for stream in list(self._streams):
            try:
                stream.close(why)
            except Exception:
                logger.exception("a connection cannot be ended; this is a bug")

    def _stop_listening(self) -> None:
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

    def _accept_some(self, sock: socket.socket, transport: str) -> None:
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
        self.changes += 1
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
        site = self._count_at_site(stream)
        most = self._limits.per_address
        if most is not None and self._at_site[site] > most:
            return End.ADDRESS_FULL
        stream.client = self.receiver.on_connected(stream)
        return End.RATE if stream.client is None else None

    def _count_at_site(self, stream: "Stream") -> bytes:
        stream.site = site = pack(stream.address[0].partition("%")[0])[:_IPV6_SITE_BYTES]
        self._at_site[site] += 1
        return site

    def forget(self, stream: "Stream", why: End) -> None:
        """Have nothing to do with a connection any more."""
        logger.debug("connection from %s has ended: %s", stream.address[:2], why.value)
        self.ended[why] += 1
        self.drop(stream)

    def drop(self, stream: "Stream") -> None:
        """Know nothing of a connection any more."""
        self.changes += 1
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

    def make_room(self) -> None:
        """Where too much waits, drop what does for those who have read nothing for longest."""
        if self.queued <= QUEUED_IN_ALL:
            return
        for stream in list(islice(self._slow, DROPPED_AT_ONCE)):
            if self.queued <= QUEUED_IN_ALL:
                break
            stream.drop_all()
            # What it has begun to be sent stays; it need not be looked at again before the others.
            self._slow[stream] = self._slow.pop(stream)
