"""UDP sockets: bound once, never blocking, read a few datagrams at a time.

Every socket reads into one buffer that its owner shares among all of them: a datagram is
handled before the next one is read. A datagram that cannot be sent is lost, as UDP may
lose it anywhere else; it is counted and that is all.
"""

import errno
import socket
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final

from relay.net.addresses import WILDCARDS
from relay.net.reactor import Reactor

READ_BUDGET: Final = 32  # datagrams per socket and turn of the reactor, at most
# Finding a socket empty costs an exception. Where datagrams come one at a time that is as much
# as reading one, so after such a one the next few are read without looking for more.
LONE_READS: Final = 4
LISTEN_BUFFER: Final = 4 << 20  # bytes the kernel may queue for the listening socket
RELAY_BUFFER: Final = 512 << 10  # for each relay port: a burst of 200 large datagrams

# From <asm-generic/socket.h>, <linux/in.h> and <linux/in6.h>; the socket module lacks them.
_SO_RCVBUFFORCE: Final = 33
_SO_SNDBUFFORCE: Final = 32
_IP_PKTINFO: Final = 8
_IPV6_PKTINFO: Final = socket.IPV6_PKTINFO
_IP_MTU_DISCOVER: Final = 10
_IPV6_MTU_DISCOVER: Final = 23
_PMTUDISC_OMIT: Final = 5

# How the kernel usually refuses a datagram. Others can come, under their own names.
USUAL_LOSSES: Final = tuple(
    f"send_{name}"
    for name in ("eagain", "einval", "emsgsize", "enetunreach", "ehostunreach", "enobufs", "eperm")
)

SocketAddress = tuple[Any, ...]
"""What the kernel reports: (host, port), for IPv6 with flow label and scope."""

OnDatagram = Callable[[int, Any], None]
"""Takes size and source of a datagram that lies in the buffer."""

Lost = Callable[[str], None]
"""Takes what failed and why, such as ``send_enobufs``."""


def bind_udp(host: str, port: int, buffer_size: int) -> socket.socket:
    """Return a non-blocking UDP socket bound to *host* and *port*. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        _prepare(sock, buffer_size)
        sock.bind((host, port))
    except BaseException:
        sock.close()
        raise
    return sock


def _prepare(sock: socket.socket, buffer_size: int) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_OMIT)
    else:
        # DF stays clear, as RFC 8656 §14 wants without DONT-FRAGMENT, and no forged
        # "fragmentation needed" can shrink what is sent.
        sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_OMIT)
    _set_buffers(sock, buffer_size)


def _set_buffers(sock: socket.socket, size: int) -> None:
    """Ask for queues of *size* bytes: past the system's limit if we may, else up to it."""
    for forced, plain in (
        (_SO_RCVBUFFORCE, socket.SO_RCVBUF),
        (_SO_SNDBUFFORCE, socket.SO_SNDBUF),
    ):
        try:
            sock.setsockopt(socket.SOL_SOCKET, forced, size)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, plain, size)


class RelaySocket:
    """The socket of one relay port in one family. It talks to peers."""

    __slots__ = ("_buffer", "_lone", "_lost", "_reactor", "_sendto", "_sock")

    def __init__(
        self, sock: socket.socket, buffer: memoryview, lost: Lost, reactor: Reactor
    ) -> None:
        """Own *sock*; read into *buffer*; report what could not be sent to *lost*."""
        self._sock = sock
        self._reactor = reactor
        self._buffer = buffer
        self._lost = lost
        self._sendto = sock.sendto
        self._lone = 0

    def receive(self, on_datagram: OnDatagram) -> None:
        """Read what is there, within the budget; hand over size and source of each datagram."""
        receive, buffer = self._sock.recvfrom_into, self._buffer
        for count in range(1 if self._lone else READ_BUDGET):
            try:
                size, source = receive(buffer)
            except OSError as error:
                self._lone = _lone_reads_after(count, error, self._lost)
                return
            # Of an IPv6 source, flow label and scope do not count.
            on_datagram(size, source if len(source) == 2 else source[:2])
        if self._lone:
            self._lone -= 1

    def send(self, datagram: memoryview | bytes, to: SocketAddress) -> bool:
        """Send one datagram to (host, port); return whether the kernel took it."""
        try:
            self._sendto(datagram, to)
        except OSError as error:
            self._lost(f"send_{_name(error)}")
            return False
        return True

    def close(self) -> None:
        """Stop reading at once; the port is given back after the present batch of events."""
        self._reactor.retire(self._sock)


class RelayPorts:
    """Opens relay ports, and has the reactor read them."""

    def __init__(
        self, reactor: Reactor, hosts: Mapping[int, str], buffer: memoryview, lost: Lost
    ) -> None:
        """Take where to bind in each family, and what every :class:`RelaySocket` needs."""
        self._reactor = reactor
        self._hosts = hosts
        self._buffer = buffer
        self._lost = lost

    def open(self, family: int, port: int, on_datagram: OnDatagram) -> RelaySocket:
        """Bind a port, and call back with size and source of each datagram. Raises OSError."""
        self._reactor.close_retired()  # it may be the very port
        sock = bind_udp(self._hosts[family], port, RELAY_BUFFER)
        relay_socket = RelaySocket(sock, self._buffer, self._lost, self._reactor)
        self._reactor.register(sock, partial(relay_socket.receive, on_datagram))
        return relay_socket


def listen(host: str, port: int, buffer: memoryview, lost: Lost) -> "ListeningSocket":
    """Bind a socket for clients that reads into *buffer*. Raises OSError."""
    return _listening(bind_udp(host, port, LISTEN_BUFFER), buffer, lost)


def adopt(sock: socket.socket, buffer: memoryview, lost: Lost) -> "ListeningSocket":
    """Serve clients on a UDP socket that is bound already. Raises OSError.

    One for IPv6 must be for nothing else (IPV6_V6ONLY): ValueError says that it is not.
    """
    if sock.family == socket.AF_INET6 and not sock.getsockopt(
        socket.IPPROTO_IPV6, socket.IPV6_V6ONLY
    ):
        raise ValueError("an IPv6 socket that takes IPv4 too (BindIPv6Only=ipv6-only is missing)")
    sock.setblocking(False)
    _prepare(sock, LISTEN_BUFFER)
    return _listening(sock, buffer, lost)


def _listening(sock: socket.socket, buffer: memoryview, lost: Lost) -> "ListeningSocket":
    kind = WildcardSocket if sock.getsockname()[0] in WILDCARDS else ListeningSocket
    return kind(sock, buffer, lost)


class ListeningSocket:
    """A socket that clients talk to, bound to one address.

    Clients are pairs of socket address and local address; the latter is empty here, where
    there is only one.
    """

    def __init__(self, sock: socket.socket, buffer: memoryview, lost: Lost) -> None:
        """Own *sock*; read into *buffer*; report what could not be sent to *lost*."""
        self._sock = sock
        self._buffer = buffer
        self._lost = lost
        self._lone = 0
        self.address: SocketAddress = sock.getsockname()

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._sock.fileno()

    def receive(self, on_datagram: OnDatagram) -> None:
        """Read what is there, within the budget; hand over size and client of each datagram."""
        receive, buffer = self._sock.recvfrom_into, self._buffer
        for count in range(1 if self._lone else READ_BUDGET):
            try:
                size, source = receive(buffer)
            except OSError as error:
                self._lone = _lone_reads_after(count, error, self._lost)
                return
            on_datagram(size, (source, b""))
        if self._lone:
            self._lone -= 1

    def send(self, datagram: memoryview | bytes, to: tuple[SocketAddress, bytes]) -> bool:
        """Send one datagram to a client; return whether the kernel took it."""
        try:
            self._sock.sendto(datagram, to[0])
        except OSError as error:
            self._lost(f"send_{_name(error)}")
            return False
        return True

    def close(self) -> None:
        """Give the port back to the system."""
        with suppress(OSError):
            self._sock.close()


class WildcardSocket(ListeningSocket):
    """A socket that clients talk to, at every address of this host.

    It notes which of them each datagram was sent to, and answers from that one (IP_PKTINFO):
    the route's preferred source may be another, which a client behind NAT would never hear.
    """

    def __init__(self, sock: socket.socket, buffer: memoryview, lost: Lost) -> None:
        """Own *sock*; read into *buffer*; report what could not be sent to *lost*."""
        super().__init__(sock, buffer, lost)
        self._buffers = [buffer]
        self._sources: dict[bytes, list[tuple[int, int, bytes]]] = {}
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            self._local_part = slice(0, 16)  # struct in6_pktinfo: destination, interface
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
            self._local_part = slice(4, 8)  # struct in_pktinfo: interface, local address, ...

    def receive(self, on_datagram: OnDatagram) -> None:
        """Read what is there, within the budget; hand over size and client of each datagram."""
        receive, buffers, local_part = self._sock.recvmsg_into, self._buffers, self._local_part
        for count in range(1 if self._lone else READ_BUDGET):
            try:
                size, ancillary, _, source = receive(buffers, _PKTINFO_ROOM)
            except OSError as error:
                self._lone = _lone_reads_after(count, error, self._lost)
                return
            on_datagram(size, (source, ancillary[0][2][local_part]))
        if self._lone:
            self._lone -= 1

    def send(self, datagram: memoryview | bytes, to: tuple[SocketAddress, bytes]) -> bool:
        """Send one datagram to a client, from the address that it wrote to.

        Returns whether the kernel took it.
        """
        address, local = to
        try:
            source = self._sources.get(local) or self._source(local)
            self._sock.sendmsg((datagram,), source, 0, address)
        except OSError as error:
            self._lost(f"send_{_name(error)}")
            return False
        return True

    def _source(self, local: bytes) -> list[tuple[int, int, bytes]]:
        """Return the control message that sets the source; the interface is the route's."""
        if len(self._sources) >= _MOST_LOCAL_ADDRESSES:
            self._sources.clear()
        if len(local) == 16:
            info = (socket.IPPROTO_IPV6, _IPV6_PKTINFO, struct.pack("16sI", local, 0))
        else:
            info = (socket.IPPROTO_IP, _IP_PKTINFO, struct.pack("I4s4s", 0, local, bytes(4)))
        source = self._sources[local] = [info]
        return source


_PKTINFO_ROOM: Final = socket.CMSG_SPACE(20)  # of the larger one, in6_pktinfo
# A whole prefix can be local to a host (AnyIP); what is remembered of it stays small.
_MOST_LOCAL_ADDRESSES: Final = 256


def _lone_reads_after(count: int, error: OSError, lost: Lost) -> int:
    """Return how many lone reads are to follow a socket that held *count* datagrams."""
    if not isinstance(error, BlockingIOError):
        lost(f"receive_{_name(error)}")
    return LONE_READS if count <= 1 else 0


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "unknown").lower()
