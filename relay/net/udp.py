"""UDP sockets: bound once, never blocking, read a few datagrams at a time.

Every socket reads into one buffer that its owner shares among all of them: what was read is
handled before the next read. A datagram that cannot be sent is lost, as UDP may lose it
anywhere else; it is counted and that is all.

Where datagrams come in bursts the kernel hands over whole trains (:mod:`relay.net.offload`).
Only ``recvmsg_into`` tells how to cut them, at 0.3 µs more per call than ``recvfrom_into``. So
a socket begins with the latter, and changes for good when it has read a burst that began and
ended with the same source. The one on a wildcard address needs ``recvmsg_into`` anyway, and
asks for trains from the start.
"""

import errno
import socket
import struct
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final

from relay.net.addresses import WILDCARDS, local_addresses
from relay.net.buffers import log_buffers, set_buffers
from relay.net.offload import SEGMENT_ROOM, ControlMessage, Offload, TrainSender, segment_size
from relay.net.reactor import Reactor

READ_BUDGET: Final = 32  # datagrams per socket and turn of the reactor, at most
# Reads after which a train is the last, and datagrams that one may be taken apart into without
# being so at once: the longest ones take as long as a hundred datagrams.
TRAIN_BUDGET: Final = 4
BURST: Final = 16  # datagrams of one flow, read in one turn, that tell bulk traffic from calls
# Finding a socket empty costs an exception. Where datagrams come one at a time that is as much
# as reading one, so after such a one the next few are read without looking for more.
LONE_READS: Final = 4
LISTEN_BUFFER: Final = 4 << 20  # bytes the kernel may queue for the listening socket
RELAY_BUFFER: Final = 512 << 10  # for each relay port: a burst of 200 large datagrams

# From <asm-generic/socket.h> and <linux/sock_diag.h>, as are the next ones from <linux/in.h> and
# <linux/in6.h>; the socket module lacks them.
_SO_MEMINFO: Final = 55
_TIMESTAMPS: Final = (29, 35)  # SO_TIMESTAMP, SO_TIMESTAMPNS
_MEMINFO: Final = struct.Struct("9I")
_MEMINFO_DROPS: Final = 8  # SK_MEMINFO_DROPS
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
QUEUE_FULL: Final = "receive_queue_full"  # how datagrams count that came when a queue was full

SocketAddress = tuple[Any, ...]
"""What the kernel reports: (host, port), for IPv6 with flow label and scope."""

Client = tuple[SocketAddress, bytes]
"""A client's socket address, and that of ours which it wrote to, packed."""

OnDatagram = Callable[[int, Any], None]
"""Takes size and source of a datagram that lies in the buffer."""

OnTrain = Callable[[int, int, Any], int]
"""Takes the size of a train that lies in the buffer, that of its datagrams, and their source.

All datagrams have the same size but the last, which may be shorter. Returns how many of them
had to be served one by one.
"""

Lost = Callable[[str], None]
"""Takes what failed and why, such as ``send_enobufs``."""


def bind_udp(host: str, port: int, buffer_size: int, *, reuse_port: bool = False) -> socket.socket:
    """Return a non-blocking UDP socket bound to *host* and *port*. Raises OSError.

    With *reuse_port* another socket of this user may hold the port that allows it too
    (SO_REUSEPORT).
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        _prepare(sock, buffer_size)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
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
    set_buffers(sock, buffer_size)


def _is_last(count: int, taken_apart: int) -> bool:
    """Tell if a train is the last of the turn, after *count* other reads."""
    return count + 1 >= TRAIN_BUDGET or taken_apart > TRAIN_BUDGET


class _Socket:
    """What all sockets have in common: when they read, and how they read trains."""

    __slots__ = ("_buffer", "_lone", "_lost", "_offload", "_reads_trains", "_sock", "_trains")

    def __init__(
        self, sock: socket.socket, buffer: memoryview, lost: Lost, offload: Offload
    ) -> None:
        """Own *sock*; read into *buffer*; report what could not be sent to *lost*."""
        self._sock = sock
        self._buffer = buffer
        self._lost = lost
        self._offload = offload
        self._trains = TrainSender(sock, offload)
        self._reads_trains = offload.reads_trains(sock)
        self._lone = 0

    def _receive_trains(
        self, on_datagram: OnDatagram, on_train: OnTrain, origin: Callable[[SocketAddress], Any]
    ) -> None:
        """Read what is there, within the budget; *origin* makes a peer or client of a source."""
        receive, buffers = self._sock.recvmsg_into, (self._buffer,)
        for count in range(1 if self._lone else READ_BUDGET):
            try:
                size, ancillary, _, source = receive(buffers, SEGMENT_ROOM)
            except OSError as error:
                self._pause(count, error)
                return
            if ancillary and (segment := segment_size(ancillary)):
                taken_apart = on_train(size, segment, origin(source))
                if _is_last(count, taken_apart):
                    break
            else:
                on_datagram(size, origin(source))
        if self._lone:
            self._lone -= 1

    def _pause(self, count: int, error: OSError) -> None:
        """Note what to do next time, as the queue is empty now after *count* reads."""
        if not isinstance(error, BlockingIOError):
            self._lost(f"receive_{_name(error)}")
        self._lone = LONE_READS if count <= 1 else 0

    def _expect_trains(self) -> None:
        """Read trains from here on, if the kernel makes any."""
        self._reads_trains = self._offload.receive_trains(self._sock)


class RelaySocket(_Socket):
    """The socket of one relay port in one family. It talks to peers."""

    __slots__ = ("_reactor", "_sendto")

    def __init__(
        self,
        sock: socket.socket,
        buffer: memoryview,
        lost: Lost,
        offload: Offload,
        reactor: Reactor,
    ) -> None:
        """Own *sock*; read into *buffer*; report what could not be sent to *lost*."""
        super().__init__(sock, buffer, lost, offload)
        self._reactor = reactor
        self._sendto = sock.sendto

    def receive(self, on_datagram: OnDatagram, on_train: OnTrain) -> None:
        """Read what is there, within the budget; hand over sizes and sources."""
        if self._reads_trains:
            self._receive_trains(on_datagram, on_train, _host_and_port)
            return
        receive, buffer = self._sock.recvfrom_into, self._buffer
        first = source = None
        for count in range(1 if self._lone else READ_BUDGET):
            try:
                size, source = receive(buffer)
            except OSError as error:
                self._pause(count, error)
                if count >= BURST and source == first:
                    self._expect_trains()
                return
            if not count:
                first = source
            on_datagram(size, source if len(source) == 2 else source[:2])
        if self._lone:
            self._lone -= 1
        elif source == first:
            self._expect_trains()

    def send(self, datagram: memoryview | bytes, to: SocketAddress) -> bool:
        """Send one datagram to (host, port); return whether the kernel took it."""
        try:
            self._sendto(datagram, to)
        except OSError as error:
            self._lost(f"send_{_name(error)}")
            return False
        return True

    def send_train(
        self, pieces: list[memoryview | bytes], each: int, size: int, to: SocketAddress
    ) -> int:
        """Send a train to (host, port), as :meth:`TrainSender.send` says."""
        return self._trains.send(pieces, each, size, to)

    def close(self) -> None:
        """Stop reading at once; the port is given back after the present batch of events."""
        self._reactor.retire(self._sock)


def _host_and_port(source: SocketAddress) -> SocketAddress:
    """Return what counts of a peer: of an IPv6 source, flow label and scope do not."""
    return source[:2]


class RelayPorts:
    """Opens relay ports, and has the reactor read them."""

    def __init__(
        self,
        reactor: Reactor,
        hosts: Mapping[int, str],
        buffer: memoryview,
        lost: Lost,
        offload: Offload,
    ) -> None:
        """Take where to bind in each family, and what every :class:`RelaySocket` needs."""
        self._reactor = reactor
        self._hosts = hosts
        self._buffer = buffer
        self._lost = lost
        self._offload = offload
        self._logged_buffers = False

    def open(
        self, family: int, port: int, on_datagram: OnDatagram, on_train: OnTrain
    ) -> RelaySocket:
        """Bind a port, and call back with what arrives there. Raises OSError."""
        self._reactor.close_retired()  # it may be the very port
        sock = bind_udp(self._hosts[family], port, RELAY_BUFFER)
        if not self._logged_buffers:  # by then privileges are dropped, so the first one tells
            self._logged_buffers = True
            log_buffers(sock, RELAY_BUFFER, "each relay port")
        relay_socket = RelaySocket(sock, self._buffer, self._lost, self._offload, self._reactor)
        self._reactor.register(sock, partial(relay_socket.receive, on_datagram, on_train))
        return relay_socket


def listen(
    host: str, port: int, buffer: memoryview, lost: Lost, offload: Offload
) -> "ListeningSocket":
    """Bind a socket for clients that reads into *buffer*. Raises OSError."""
    listener = _listening(bind_udp(host, port, LISTEN_BUFFER), buffer, lost, offload)
    if isinstance(listener, WildcardSocket):
        listener.bind_beside(local_addresses())
    return listener


def adopt(
    sock: socket.socket, buffer: memoryview, lost: Lost, offload: Offload
) -> "ListeningSocket":
    """Serve clients on a UDP socket that is bound already. Raises OSError.

    One for IPv6 must be for nothing else (IPV6_V6ONLY): ValueError says that it is not.
    """
    if sock.family == socket.AF_INET6 and not sock.getsockopt(
        socket.IPPROTO_IPV6, socket.IPV6_V6ONLY
    ):
        raise ValueError("an IPv6 socket that takes IPv4 too (BindIPv6Only=ipv6-only is missing)")
    sock.setblocking(False)
    for timestamp in _TIMESTAMPS:  # they would take the room of what has to be read
        sock.setsockopt(socket.SOL_SOCKET, timestamp, 0)
    _prepare(sock, LISTEN_BUFFER)
    # No others beside it: they would be without its device, its mark and the rest, and would not
    # be there while the next process starts.
    return _listening(sock, buffer, lost, offload)


def _listening(
    sock: socket.socket, buffer: memoryview, lost: Lost, offload: Offload
) -> "ListeningSocket":
    host = sock.getsockname()[0]
    log_buffers(sock, LISTEN_BUFFER, f"the socket for clients on {host}")
    kind = WildcardSocket if host in WILDCARDS else ListeningSocket
    return kind(sock, buffer, lost, offload)


class ListeningSocket(_Socket):
    """A socket that clients talk to, bound to one address.

    Clients are pairs of socket address and local address; the latter is the same for all here.
    """

    def __init__(
        self,
        sock: socket.socket,
        buffer: memoryview,
        lost: Lost,
        offload: Offload,
        local: bytes = b"",
    ) -> None:
        """Own *sock*; read into *buffer*; report what could not be sent to *lost*."""
        super().__init__(sock, buffer, lost, offload)
        self._local = local
        self.sendto = sock.sendto
        self.address: SocketAddress = sock.getsockname()
        self.sockets: list[ListeningSocket] = [self]  # what there is to read

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._sock.fileno()

    def receive(self, on_datagram: OnDatagram, on_train: OnTrain) -> None:
        """Read what is there, within the budget; hand over sizes and clients."""
        if self._reads_trains:
            self._receive_trains(on_datagram, on_train, self._client)
            return
        receive, buffer, local = self._sock.recvfrom_into, self._buffer, self._local
        first = source = None
        for count in range(1 if self._lone else READ_BUDGET):
            try:
                size, source = receive(buffer)
            except OSError as error:
                self._pause(count, error)
                if count >= BURST and source == first:
                    self._expect_trains()
                return
            if not count:
                first = source
            on_datagram(size, (source, local))
        if self._lone:
            self._lone -= 1
        elif source == first:
            self._expect_trains()

    def send(self, datagram: memoryview | bytes, to: Client) -> bool:
        """Send one datagram to a client; return whether the kernel took it."""
        try:
            self.sendto(datagram, to[0])
        except OSError as error:
            self._lost(f"send_{_name(error)}")
            return False
        return True

    def send_train(self, pieces: list[memoryview | bytes], each: int, size: int, to: Client) -> int:
        """Send a train to a client, as :meth:`TrainSender.send` says."""
        return self._trains.send(pieces, each, size, to[0])

    def close(self) -> None:
        """Give the port back to the system."""
        with suppress(OSError):
            self._sock.close()

    def overflows(self) -> int:
        """Return how many datagrams found the queue full since the socket was made."""
        meminfo = self._sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
        drops: int = _MEMINFO.unpack(meminfo)[_MEMINFO_DROPS]
        return drops

    def _client(self, source: SocketAddress) -> Client:
        return source, self._local


class WildcardSocket(ListeningSocket):
    """A socket that clients talk to, at every address of this host.

    It notes which of them each datagram was sent to, and answers from that one (IP_PKTINFO):
    the route's preferred source may be another, which a client behind NAT would never hear.

    The system calls for that cost a quarter more. So each address that the host has at start gets
    a socket of its own, bound to it beside this one. To them the kernel gives what is sent
    there; the wildcard is left for addresses that the host gets later. A client looks the same
    either way, and answers go through this socket, which knows where from.
    """

    def __init__(
        self, sock: socket.socket, buffer: memoryview, lost: Lost, offload: Offload
    ) -> None:
        """Own *sock*; read into *buffer*; report what could not be sent to *lost*."""
        super().__init__(sock, buffer, lost, offload)
        self._buffers = [buffer]
        self._beside: dict[bytes, ListeningSocket] = {}
        self._sources: dict[bytes, tuple[ControlMessage]] = {}
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            self._local_part = slice(0, 16)  # struct in6_pktinfo: destination, interface
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
            self._local_part = slice(4, 8)  # struct in_pktinfo: interface, local address, ...
        offload.receive_trains(sock)

    def bind_beside(self, hosts: Iterable[str]) -> None:
        """Bind a socket to each of *hosts* that can be bound, but not to too many."""
        family, port = self._sock.family, self.address[1]
        ours = [host for host in sorted(hosts) if (":" in host) == (family == socket.AF_INET6)]
        sharing = [self._sock]
        # Only in here, or anybody could bind to our addresses too and take what is sent to us.
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        for host in ours[:_MOST_BESIDE]:
            with suppress(OSError):  # such as a link-local one; the wildcard serves it as well
                sock = bind_udp(host, port, LISTEN_BUFFER, reuse_port=True)
                sharing.append(sock)
                local = socket.inet_pton(family, host)
                self._beside[local] = ListeningSocket(
                    sock, self._buffer, self._lost, self._offload, local
                )
        for sock in sharing:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
        self.sockets += self._beside.values()

    def receive(self, on_datagram: OnDatagram, on_train: OnTrain) -> None:
        """Read what is there, within the budget; hand over sizes and clients."""
        receive, buffers, local_part = self._sock.recvmsg_into, self._buffers, self._local_part
        for count in range(1 if self._lone else READ_BUDGET):
            try:
                size, ancillary, _, source = receive(buffers, _CONTROL_ROOM)
            except OSError as error:
                self._pause(count, error)
                return
            client = (source, ancillary[-1][2][local_part])
            if len(ancillary) == 1 or not (segment := segment_size(ancillary)):
                on_datagram(size, client)
            else:
                taken_apart = on_train(size, segment, client)
                if _is_last(count, taken_apart):
                    break
        if self._lone:
            self._lone -= 1

    def send(self, datagram: memoryview | bytes, to: Client) -> bool:
        """Send one datagram to a client, from the address that it wrote to.

        Returns whether the kernel took it.
        """
        address, local = to
        beside = self._beside.get(local)
        try:
            if beside is not None:
                beside.sendto(datagram, address)
            else:
                source = self._sources.get(local) or self._source(local)
                self._sock.sendmsg((datagram,), source, 0, address)
        except OSError as error:
            self._lost(f"send_{_name(error)}")
            return False
        return True

    def send_train(self, pieces: list[memoryview | bytes], each: int, size: int, to: Client) -> int:
        """Send a train to a client, from the address that it wrote to."""
        address, local = to
        source = self._sources.get(local) or self._source(local)
        return self._trains.send(pieces, each, size, address, source)

    def close(self) -> None:
        """Give the port back to the system, at all addresses."""
        for beside in self._beside.values():
            beside.close()
        super().close()

    def _source(self, local: bytes) -> tuple[ControlMessage]:
        """Return the control message that sets the source; the interface is the route's."""
        if len(self._sources) >= _MOST_LOCAL_ADDRESSES:
            self._sources.clear()
        if len(local) == 16:
            info = (socket.IPPROTO_IPV6, _IPV6_PKTINFO, struct.pack("16sI", local, 0))
        else:
            info = (socket.IPPROTO_IP, _IP_PKTINFO, struct.pack("I4s4s", 0, local, bytes(4)))
        source = self._sources[local] = (info,)
        return source


# What comes with a train, and the larger one of what else comes: in6_pktinfo.
_CONTROL_ROOM: Final = SEGMENT_ROOM + socket.CMSG_SPACE(20)
_MOST_BESIDE: Final = 16  # sockets for one address each
# A whole prefix can be local to a host (AnyIP); what is remembered of it stays small.
_MOST_LOCAL_ADDRESSES: Final = 256


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "unknown").lower()
