"""The sockets that many talk to at one port: at one address, or at every address of this host.

Who talks to them is told apart by a pair: its socket address, and the address of ours that it
wrote to, packed. Answers go out from the latter.
"""

import socket
import struct
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from typing import Final

from relay.net.addresses import (
    WILDCARDS,
    local_addresses,
    outward_address,
    require_one_family,
)
from relay.net.buffers import log_buffers, overflows_of, set_buffers
from relay.net.offload import ControlMessage, SegmentSender
from relay.net.tos import report_tos
from relay.net.udp import (
    Lost,
    Receiver,
    Shared,
    SocketAddress,
    UdpDestination,
    UdpReader,
    bind_udp,
    never_set_df,
)

LISTEN_BUFFER: Final = 4 << 20  # bytes the kernel may queue for a listening socket

# From <asm-generic/socket.h> and <linux/in.h>; the socket module lacks them.
_TIMESTAMPS: Final = (29, 35)  # SO_TIMESTAMP, SO_TIMESTAMPNS
_IP_PKTINFO: Final = 8
_IPV6_PKTINFO: Final = socket.IPV6_PKTINFO

# Where the local address is in what the kernel reports.
_LOCAL_PART: Final = {
    socket.AF_INET: slice(4, 8),  # struct in_pktinfo: interface, local address, ...
    socket.AF_INET6: slice(0, 16),  # struct in6_pktinfo: destination, interface
}

_MAX_PER_ADDRESS: Final = 16  # sockets for one address each
# A whole prefix can be local to a host (AnyIP); what is remembered of it stays small.
_MAX_LOCAL_ADDRESSES: Final = 256

Client = tuple[SocketAddress, bytes]
"""A socket address, and that of ours which it wrote to: packed, or empty if there is just one."""


def listen(
    host: str, port: int, shared: Shared, receiver: Receiver, *, public: str = ""
) -> "ListeningSocket":
    """Bind a socket whose datagrams *receiver* takes. Raises OSError.

    *public* is the address that most clients can be expected to write to, if that is known.
    """
    sock = bind_udp(host, port, LISTEN_BUFFER)
    listener = _listening(sock, shared, receiver)
    if isinstance(listener, WildcardSocket):
        # Behind a 1:1 NAT the public one is none of ours: what arrives is for the outward one.
        preferred = {public, outward_address(sock.family)}
        listener.bind_per_address(local_addresses(), receiver, preferred)
    return listener


def adopt(sock: socket.socket, shared: Shared, receiver: Receiver) -> "ListeningSocket":
    """Listen on a UDP socket that is bound already. Raises OSError.

    One for IPv6 must be for nothing else (IPV6_V6ONLY): ValueError says that it is not.
    """
    require_one_family(sock)
    sock.setblocking(False)
    for timestamp in _TIMESTAMPS:  # they would take the room of what has to be read
        sock.setsockopt(socket.SOL_SOCKET, timestamp, 0)
    report_tos(sock, wanted=False)  # unless we want it, too
    never_set_df(sock)
    set_buffers(sock, LISTEN_BUFFER)
    # No sockets per address: they would be without its device, its mark and the rest, and would
    # not be there while the next process starts.
    return _listening(sock, shared, receiver)


def inherit(
    sock: socket.socket,
    per_address: Mapping[bytes, socket.socket],
    shared: Shared,
    receiver: Receiver,
) -> "ListeningSocket":
    """Listen on what another process listens on, and still reads; *per_address* of a wildcard.

    :meth:`ListeningSocket.take_over` has to come before the first read. Raises OSError.
    """
    if sock.getsockname()[0] not in WILDCARDS:
        return ListeningSocket(sock, shared, receiver, is_inherited=True)
    listener = WildcardSocket(sock, shared, receiver, is_inherited=True)
    for local, each in per_address.items():
        listener.add(local, each, receiver, is_inherited=True)
    return listener


def _listening(sock: socket.socket, shared: Shared, receiver: Receiver) -> "ListeningSocket":
    host = sock.getsockname()[0]
    log_buffers(sock, LISTEN_BUFFER, f"the socket for clients on {host}")
    kind = WildcardSocket if host in WILDCARDS else ListeningSocket
    return kind(sock, shared, receiver)


class ListeningSocket:
    """A socket that is bound to one address.

    What it tells its receiver is a :data:`Client`, always with the same local address.
    """

    def __init__(
        self,
        sock: socket.socket,
        shared: Shared,
        receiver: Receiver,
        local: bytes = b"",
        *,
        is_inherited: bool = False,
    ) -> None:
        """Own *sock*. *local* is the address of ours that all who write here mean.

        *is_inherited*: another process still reads it, see :func:`inherit`.
        """
        self._sock = sock
        self._is_inherited = is_inherited
        self._shared = shared
        self._segments = SegmentSender(sock, shared.offload)
        self.reader = self._make_reader(receiver, local)
        if shared.offload.has_gro(sock):
            self.reader.expect_segments()
        self.address: SocketAddress = sock.getsockname()
        self.sockets: list[ListeningSocket] = [self]  # what there is to read
        self._last_overflows = 0  # once it is closed

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._sock.fileno()

    def reach(self, client: Client) -> UdpDestination:
        """Return how to send to a client from here."""
        return UdpDestination(self._sock, self._segments, client[0], self._shared.lost)

    def local_address(self, client: Client) -> tuple[str, int]:
        """Return the address of ours that a client writes to, with the port."""
        host = socket.inet_ntop(self._sock.family, client[1]) if client[1] else self.address[0]
        return (host, self.address[1])

    @property
    def per_address(self) -> "Mapping[bytes, ListeningSocket]":
        """The sockets that each stand for one address of a wildcard's, packed."""
        return {}

    def take_over(self) -> None:
        """Read what another process has read until now."""
        for sock in self.sockets:
            sock.reader.take_over()

    def look_for_marks(self) -> None:
        """Look at the next datagrams for DSCP and ECN."""
        for sock in self.sockets:
            sock.reader.look_for_marks()

    def hand_to(self, receiver: Receiver) -> None:
        """Have *receiver* take what is read from here on."""
        self.reader.hand_to(receiver)

    def close(self) -> None:
        """Give the port back to the system."""
        self._last_overflows = self.overflows()
        with suppress(OSError):
            self._sock.close()

    def overflows(self) -> int:
        """Return how many datagrams found the queue full, from when it was made to its closing."""
        return self._last_overflows if self.fileno() < 0 else overflows_of(self._sock)

    def _make_reader(self, receiver: Receiver, local: bytes) -> UdpReader:
        return UdpReader(
            self._sock, self._shared, receiver, local=local, is_inherited=self._is_inherited
        )


class WildcardSocket(ListeningSocket):
    """A socket for every address of this host.

    It notes which of them each datagram was sent to, and answers from that one (IP_PKTINFO):
    the route's preferred source may be another, which a client behind NAT would never hear.

    The system calls for that cost a quarter more. So each address that the host has at start gets
    a per-address socket. To these the kernel gives what is sent there; the wildcard is left for
    addresses that the host gets later. A client looks the same either way, and this socket
    knows through which it is reached.
    """

    def __init__(
        self,
        sock: socket.socket,
        shared: Shared,
        receiver: Receiver,
        *,
        is_inherited: bool = False,
    ) -> None:
        """Own *sock*."""
        super().__init__(sock, shared, receiver, is_inherited=is_inherited)
        self._per_address: dict[bytes, ListeningSocket] = {}
        self._sources: dict[bytes, ControlMessage] = {}
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)

    def bind_per_address(
        self, hosts: Iterable[str], receiver: Receiver, preferred: Container[str | None] = ()
    ) -> None:
        """Bind a socket to each of *hosts* that can be bound, but not to too many.

        The *preferred* ones go first: a host can have hundreds that no client ever writes to,
        of bridges and of services in a cluster.
        """
        family, port = self._sock.family, self.address[1]
        ours = [host for host in sorted(hosts) if (":" in host) == (family == socket.AF_INET6)]
        ours.sort(key=lambda host: host not in preferred)
        sharing = [self._sock]
        # Only in here, or anybody could bind to our addresses too and take what is sent to us.
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        for host in ours[:_MAX_PER_ADDRESS]:
            with suppress(OSError):  # such as a link-local one; the wildcard serves it as well
                sock = bind_udp(host, port, LISTEN_BUFFER, reuse_port=True)
                sharing.append(sock)
                self.add(socket.inet_pton(family, host), sock, receiver)
        for sock in sharing:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)

    def add(
        self, local: bytes, sock: socket.socket, receiver: Receiver, *, is_inherited: bool = False
    ) -> None:
        """Own a socket, too, that is bound to one address, packed."""
        each = ListeningSocket(sock, self._shared, receiver, local, is_inherited=is_inherited)
        self._per_address[local] = each
        self.sockets.append(each)

    @property
    def per_address(self) -> Mapping[bytes, ListeningSocket]:
        """The sockets that each stand for one address, packed."""
        return self._per_address

    def reach(self, client: Client) -> UdpDestination:
        """Return how to send to a client, from the address that it wrote to."""
        address, local = client
        per_address = self._per_address.get(local)
        if per_address is not None:
            return per_address.reach(client)
        control = (self._sources.get(local) or self._source(local),)
        return _SourcedDestination(self._sock, self._segments, address, self._shared.lost, control)

    def hand_to(self, receiver: Receiver) -> None:
        """Have *receiver* take what is read from here on, at all addresses."""
        super().hand_to(receiver)
        for sock in self._per_address.values():
            sock.hand_to(receiver)

    def close(self) -> None:
        """Give the port back to the system, at all addresses."""
        for sock in self._per_address.values():
            sock.close()
        super().close()

    def _make_reader(self, receiver: Receiver, _local: bytes) -> UdpReader:
        local_part = _LOCAL_PART[self._sock.family]
        return UdpReader(
            *(self._sock, self._shared, receiver),
            local_part=local_part,
            is_inherited=self._is_inherited,
        )

    def _source(self, local: bytes) -> ControlMessage:
        """Return the control message that sets the source; the interface is the route's."""
        if len(self._sources) >= _MAX_LOCAL_ADDRESSES:
            self._sources.clear()
        if len(local) == 16:
            info = (socket.IPPROTO_IPV6, _IPV6_PKTINFO, struct.pack("16sI", local, 0))
        else:
            info = (socket.IPPROTO_IP, _IP_PKTINFO, struct.pack("I4s4s", 0, local, bytes(4)))
        self._sources[local] = info
        return info


class _SourcedDestination(UdpDestination):
    """One to which *control* goes with each datagram: the address of ours to send it from."""

    __slots__ = ("_control",)

    def __init__(
        self,
        sock: socket.socket,
        segments: SegmentSender,
        address: SocketAddress,
        lost: Lost,
        control: tuple[ControlMessage, ...],
    ) -> None:
        super().__init__(sock, segments, address, lost)
        self._control = control

    def send(self, datagram: memoryview | bytes, tos: int = 0) -> bool:
        control = self._control + self._marks[tos]
        try:
            self._sock.sendmsg((datagram,), control, 0, self._address)
        except OSError as error:
            return self._count_loss(error)
        return True

    def send_many(
        self, pieces: list[memoryview | bytes], each: int, size: int, tos: int = 0
    ) -> int:
        control = self._control + self._marks[tos]
        return self._segments.send(pieces, each, size, self._address, control)
