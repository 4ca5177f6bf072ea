"""UDP sockets: bound once, never blocking, read a few datagrams at a time.

Every socket reads into one buffer that its owner shares among all of them, and calls its
:class:`Receiver`, which is done with a datagram before the next one is read. What is to be
sent goes through a :class:`UdpDestination`. A datagram that cannot be sent is lost, as UDP may
lose it anywhere else; it is counted and that is all.

Where datagrams come in bursts the kernel hands over many of them as segments of one read
(:mod:`relay.net.offload`). Only ``recvmsg_into`` tells how to cut them, and which DSCP and ECN they
came with (:mod:`relay.net.tos`), at 0.3 µs more per call than ``recvfrom_into``. So a socket begins
with the latter, and changes for good when it has read a burst that began and ended with the same
source, or a datagram that was marked with a DSCP or ECN. When a flow may begin, it looks at all
datagrams for that, :data:`LOOKS` times; then of those that come alone at one in seventeen, of those
that are read together at the first of every fourth lot.
"""

import errno
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from relay.net.buffers import BufferGiver, Overflows, log_buffers, set_buffers
from relay.net.icmp import ErrorQueue, TakeError, report_errors
from relay.net.offload import SEGMENT_ROOM, Offload, SegmentSender, segment_size
from relay.net.reactor import Reactor
from relay.net.tos import LOW_BYTE, MARKS, ROOM, CopyTos, report_tos

READ_BUDGET: Final = 32  # datagrams per call of on_readable, at most
# Segmented reads per call, and segments that one of them may be handed on singly without being
# the last at once: the longest ones take as long as a hundred datagrams.
SEGMENTED_BUDGET: Final = 4
BURST: Final = 16  # datagrams of one flow, read in one call, that tell bulk traffic from calls
# Finding a socket empty costs an exception, as much as reading a datagram. So after a single one
# the next few are read without looking for more: the more, the longer they come one at a time.
SINGLE_READS: Final = 4
MAX_SINGLE_READS: Final = 16
SAMPLED_BURSTS: Final = 4  # one in so many bursts is looked at for DSCP and ECN
# Bursts, or datagrams that come alone: all of them are looked at when a flow may begin.
LOOKS: Final = 32
_ONCE: Final = range(1)
_UP_TO_BUDGET: Final = range(READ_BUDGET)
# Bytes the kernel may queue for each port. All UDP sockets of a host share its memory for UDP
# (net.ipv4.udp_mem, a sixth of all by default), and when that is full everyone's datagrams are
# dropped. Whoever sends junk to many ports faster than it is read fills so many queues, so they
# are no longer than a burst of two hundred large datagrams.
PORT_BUFFER: Final = 256 << 10

_IP_MTU_DISCOVER: Final = 10  # <linux/in.h>; the socket module lacks them
_IPV6_MTU_DISCOVER: Final = 23  # <linux/in6.h>
_PMTUDISC_PROBE: Final = 3
_PMTUDISC_OMIT: Final = 5
_IPV6_DONTFRAG: Final = (socket.IPPROTO_IPV6, 62, struct.pack("i", 1))

# How the kernel usually refuses a datagram. Others can come, under their own names.
USUAL_LOSSES: Final = tuple(
    f"send_{name}"
    for name in ("eagain", "einval", "emsgsize", "enetunreach", "ehostunreach", "enobufs", "eperm")
)

SocketAddress = tuple[Any, ...]
"""What the kernel reports and takes: (host, port), for IPv6 with flow label and scope."""

Lost = Callable[[str], None]
"""Takes what failed and why, such as ``send_enobufs``."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What sockets have in common."""

    buffer: memoryview  # where they read to
    lost: Lost  # is told what the kernel did not take or give
    offload: Offload
    copy_tos: CopyTos = "off"  # if receivers hear of DSCP and ECN: auto, once there are any


class Receiver(Protocol):
    """What takes the datagrams that a socket has read.

    *tos* is the octet of their DSCP and ECN, 0 if it is not to be copied.
    """

    def on_datagram(self, size: int, source: Any, tos: int = 0, /) -> object:  # noqa: ANN401
        """Take a datagram of *size* bytes, which lies in the buffer."""

    def on_segments(self, size: int, segment: int, source: Any, tos: int = 0, /) -> int:  # noqa: ANN401
        """Take datagrams that lie in the buffer end to end, *size* bytes in all.

        Each has *segment* bytes, but the last may be shorter. Returns how many of them had to
        be handled singly.
        """


def bind_udp(
    host: str,
    port: int,
    buffer_size: int,
    *,
    give_buffers: Callable[[socket.socket, int], None] = set_buffers,
    reuse_port: bool = False,
) -> socket.socket:
    """Return a non-blocking UDP socket bound to *host* and *port*. Raises OSError.

    *give_buffers* gives it queues of *buffer_size* bytes. With *reuse_port* another socket of this
    user may hold the port that allows it too (SO_REUSEPORT).
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        never_set_df(sock)
        give_buffers(sock, buffer_size)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
    except BaseException:
        sock.close()
        raise
    return sock


def never_set_df(sock: socket.socket) -> None:
    """Keep DF clear, as RFC 8656 §14 wants without DONT-FRAGMENT.

    Nor can a forged "fragmentation needed" shrink what is sent.
    """
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_OMIT)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_OMIT)


class UdpDestination:
    """An address, and the socket from which it is reached.

    What is sent there has the DSCP and ECN of *tos*.
    """

    __slots__ = ("_address", "_lost", "_marks", "_segments", "_sendto", "_sock")

    def __init__(
        self,
        sock: socket.socket,
        segments: SegmentSender,
        address: SocketAddress,
        lost: Lost,
    ) -> None:
        """Send single datagrams from *sock*, many at once by *segments*."""
        self._sock = sock
        self._sendto = sock.sendto
        self._marks = MARKS[sock.family]
        self._segments = segments
        self._address = address
        self._lost = lost

    def send(self, datagram: memoryview | bytes, tos: int = 0) -> bool:
        """Send one datagram, or count it as lost; return whether the kernel took it."""
        try:
            if tos:
                self._sock.sendmsg((datagram,), self._marks[tos], 0, self._address)
            else:
                self._sendto(datagram, self._address)
        except OSError as error:
            return self._on_failure(error, self._transmit, datagram, tos)
        return True

    def send_many(
        self, pieces: list[memoryview | bytes], each: int, size: int, tos: int = 0
    ) -> int:
        """Send many datagrams, as :meth:`SegmentSender.send` does."""
        return self._segments.send(pieces, each, size, self._address, self._marks[tos])

    def answer(self, message: bytes) -> None:
        """Send what is no data: over UDP that is no different."""
        self.send(message)

    def _transmit(self, datagram: memoryview | bytes, tos: int) -> None:
        """Send one datagram. Raises OSError."""
        self._sock.sendmsg((datagram,), self._marks[tos], 0, self._address)

    def _on_failure(
        self, error: OSError, _transmit: "Transmit", _datagram: memoryview | bytes, _tos: int
    ) -> bool:
        """Go on after a failure to send; return whether the datagram was sent after all."""
        return self._count_loss(error)

    def _count_loss(self, error: OSError) -> bool:
        """Count a datagram that the kernel did not take; return that it was not sent."""
        self._lost(f"send_{errno_name(error)}")
        return False


Transmit = Callable[[memoryview | bytes, int], None]
"""Sends a datagram with a TOS. Raises OSError."""


class PortDestination(UdpDestination):
    """A peer, reached from a relay port."""

    __slots__ = ("_port",)

    def __init__(
        self,
        port: "PortSocket",
        sock: socket.socket,
        segments: SegmentSender,
        address: SocketAddress,
    ) -> None:
        super().__init__(sock, segments, address, port.lost)
        self._port = port

    def send_whole(self, datagram: memoryview | bytes, tos: int = 0) -> bool:
        """Send one datagram that is not to be fragmented on its way, or count it as lost."""
        try:
            self._transmit_whole(datagram, tos)
        except OSError as error:
            return self._on_failure(error, self._transmit_whole, datagram, tos)
        return True

    def _transmit_whole(self, datagram: memoryview | bytes, tos: int) -> None:
        """Send one datagram with DF, or as what IPv6 has instead. Raises OSError."""
        sock, marks = self._sock, self._marks[tos]
        if sock.family == socket.AF_INET6:
            sock.sendmsg((datagram,), (*marks, _IPV6_DONTFRAG), 0, self._address)
            return
        # Linux has no control message for it.
        sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE)
        try:
            sock.sendmsg((datagram,), marks, 0, self._address)
        finally:
            never_set_df(sock)

    def _on_failure(
        self, error: OSError, transmit: Transmit, datagram: memoryview | bytes, tos: int
    ) -> bool:
        """Send again what failed only because of an ICMP error about an earlier datagram."""
        if self._port.drain_errors(self._address):
            try:
                transmit(datagram, tos)
            except OSError as again:
                self._port.drain_errors(self._address)
                error = again
            else:
                return True
        return self._count_loss(error)


class UdpReader:
    """Reads a bound socket, a few datagrams at a time, and hands them to a receiver.

    The receiver is told host and port of each source; of an IPv6 source, flow label and scope
    do not count. A listening socket tells more: the socket address as it is, and the local
    address that was written to. That is *local*, or, for a socket at every address, the part
    *local_part* of the control message with which the kernel reports it (IP_PKTINFO).
    """

    # One class for all sockets, not a base of several: CPython then knows where its attributes
    # are, which is worth half a microsecond per datagram.
    __slots__ = (
        "_buffer",
        "_errors",
        "_local",
        "_local_at",
        "_local_part",
        "_looks",
        "_looks_at_all",
        "_lost",
        "_next_singles",
        "_offload",
        "_on_datagram",
        "_on_segments",
        "_reads_control",
        "_reads_tos",
        "_recvfrom_into",
        "_recvmsg_into",
        "_samples_tos",
        "_singles",
        "_sock",
        "_until_sample",
        "_usual",
    )

    def __init__(
        self,
        sock: socket.socket,
        shared: Shared,
        receiver: Receiver,
        *,
        local: bytes | None = None,
        local_part: slice | None = None,
        is_inherited: bool = False,
    ) -> None:
        """Read *sock*, which stays the caller's.

        A port gives neither *local* nor *local_part*, a socket at one address its *local*, and
        one at every address *local_part*. One that *is_inherited* is not touched, for another
        process still reads it; :meth:`take_over` has to come before the first read.
        """
        self._sock = sock
        self._recvfrom_into = sock.recvfrom_into
        self._recvmsg_into = sock.recvmsg_into
        self._buffer = shared.buffer
        self._lost = shared.lost
        self._offload = shared.offload
        self._local = local
        self._local_part = local_part
        self._samples_tos = shared.copy_tos == "auto"
        self._until_sample = 0
        self._looks = LOOKS if self._samples_tos else 0
        self._reads_tos = shared.copy_tos != "off"
        self._looks_at_all = shared.copy_tos == "on"
        # How many control messages come in any case, and which of them, is the local address.
        self._usual = (local_part is not None) + self._reads_tos
        self._local_at = -2 if self._reads_tos else -1
        self._reads_control = False
        self._errors: ErrorQueue | None = None
        self._singles = 0  # how many are still to be read without looking for more
        self._next_singles = SINGLE_READS  # how many will be, once one comes alone again
        if not is_inherited:
            if self._reads_tos:
                report_tos(sock, wanted=True)
            self._begin()
        self.hand_to(receiver)

    def take_over(self) -> None:
        """Have the kernel tell what is wanted here, whatever the process before wanted to know."""
        report_tos(self._sock, wanted=self._reads_tos)
        if self._offload.has_gro(self._sock):
            self.expect_segments()
        self._begin()

    def _begin(self) -> None:
        if self._local_part is not None or self._looks_at_all:
            self._read_control()

    def hand_to(self, receiver: Receiver) -> None:
        """Have *receiver* take what is read from here on."""
        self._on_datagram = receiver.on_datagram
        self._on_segments = receiver.on_segments

    def read_errors(self, errors: ErrorQueue) -> None:
        """Empty the error queue whenever there may be something in it."""
        self._errors = errors

    def expect_segments(self) -> None:
        """Read segments from here on, for the kernel makes them."""
        self._reads_control = True

    def look_for_marks(self) -> None:
        """Look at all of the next datagrams for DSCP and ECN: a flow may begin."""
        if self._samples_tos and not self._reads_control:
            self._looks = LOOKS
            self._singles = self._until_sample = 0

    def on_readable(self) -> bool:
        """Read what is there, within the budget; return whether that was used up."""
        if self._singles:
            self._singles -= 1
            return self._read_with_control(_ONCE) if self._reads_control else self._read_one()
        if self._reads_control:
            return self._read_with_control(_UP_TO_BUDGET)
        if self._looks:
            self._looks -= 1
            return self._read_with_control(_UP_TO_BUDGET)
        sampled = 0
        if self._until_sample:
            self._until_sample -= 1
        elif self._samples_tos:
            self._until_sample = SAMPLED_BURSTS - 1
            if not self._read_with_control(_ONCE):
                return False
            sampled = 1
        return self._read_many(sampled)

    def _read_many(self, sampled: int) -> bool:
        """Read what is there; *sampled* datagrams of it have been read already."""
        receive, buffer, local = self._recvfrom_into, self._buffer, self._local
        on_datagram = self._on_datagram
        first = source = None
        for count in _UP_TO_BUDGET:
            if self._looks or self._reads_control:  # since a moment ago
                return True
            try:
                size, source = receive(buffer)
            except OSError as error:
                self._pause(count + sampled, error)
                if count >= BURST and source == first:
                    self._enable_gro()
                return False
            if not count:
                first = source
            if local is not None:
                on_datagram(size, (source, local))
            else:
                on_datagram(size, source if len(source) == 2 else source[:2])
        self._next_singles = SINGLE_READS
        if source == first:
            self._enable_gro()
        return True

    def _read_one(self) -> bool:
        """Read a single datagram, without looking for more: what calls are like."""
        try:
            size, source = self._recvfrom_into(self._buffer)
        except OSError as error:
            self._pause(0, error)
            return False
        if self._local is not None:
            self._on_datagram(size, (source, self._local))
        else:
            self._on_datagram(size, source if len(source) == 2 else source[:2])
        return True

    def _read_with_control(self, budget: range) -> bool:
        """Do the same where the kernel tells more than size and source in control messages.

        They come in this order: how long segments are, if that is what was read; then the local
        address and the octet of DSCP and ECN, each if it is reported at all.
        """
        receive, buffers = self._recvmsg_into, (self._buffer,)
        local, local_part, local_at = self._local, self._local_part, self._local_at
        usual, reads_tos = self._usual, self._reads_tos
        tos = 0
        first = source = None
        for count in budget:
            try:
                size, ancillary, _, source_address = receive(buffers, _CONTROL_ROOM)
            except OSError as error:
                self._pause(count, error)
                if count >= BURST and source == first and not self._reads_control:
                    self._enable_gro()
                return False
            if local_part is not None:
                source = (source_address, ancillary[local_at][2][local_part])
            else:
                source = source_address[:2] if local is None else (source_address, local)
            if not count:
                first = source
            if reads_tos and (tos := ancillary[-1][2][LOW_BYTE]) and not self._reads_control:
                self._read_control()
            if len(ancillary) == usual or not (segment := segment_size(ancillary)):
                self._on_datagram(size, source, tos)
            else:
                singly = self._on_segments(size, segment, source, tos)
                if count + 1 >= SEGMENTED_BUDGET or singly > SEGMENTED_BUDGET:
                    break
        if budget is _UP_TO_BUDGET:
            self._next_singles = SINGLE_READS
            if source == first and not self._reads_control:
                self._enable_gro()
        return True

    def _pause(self, count: int, error: OSError) -> None:
        """Note what to do next time, as the queue is empty now after *count* reads."""
        is_empty = isinstance(error, BlockingIOError)
        if self._errors is not None and not (is_empty and count) and self._errors.drain():
            return
        if not is_empty:
            self._lost(f"receive_{errno_name(error)}")
        if count == 1:
            self._until_sample = 0
            if not self._looks:
                self._singles = self._next_singles
                self._next_singles = min(2 * self._next_singles, MAX_SINGLE_READS)
        elif count:
            self._next_singles = SINGLE_READS

    def _enable_gro(self) -> None:
        """Read segments from here on, if the kernel makes any."""
        self._reads_control = self._offload.enable_gro(self._sock)

    def _read_control(self) -> None:
        """Read control messages from here on. Then segments cost nothing more."""
        self._reads_control = True
        self._looks = 0
        self._offload.enable_gro(self._sock)


class PortSocket:
    """A socket that the reactor reads until it is closed."""

    __slots__ = ("_errors", "_overflows", "_reactor", "_segments", "_sock", "lost", "reader")

    def __init__(
        self,
        sock: socket.socket,
        shared: Shared,
        receiver: Receiver,
        reactor: Reactor,
        overflows: Overflows | None = None,
        *,
        is_inherited: bool = False,
    ) -> None:
        """Own *sock*, and have *reactor* read it. *overflows* counts what finds its queue full.

        One that *is_inherited* is not touched before it has something to read.
        """
        self._sock = sock
        self._overflows = overflows
        self._errors: ErrorQueue | None = None
        self.lost = shared.lost
        self._segments = SegmentSender(sock, shared.offload)
        self._reactor = reactor
        self.reader = UdpReader(sock, shared, receiver, is_inherited=is_inherited)
        reactor.register(sock, self._read_first if is_inherited else self.reader.on_readable)
        if overflows is not None:
            overflows.watch(sock, is_new=not is_inherited)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._sock.fileno()

    def _read_first(self) -> bool:
        self.reader.take_over()
        if self._errors is None:  # else the process before may have wanted them
            report_errors(self._sock, wanted=False)
        self._reactor.hand_to(self._sock, self.reader.on_readable)
        return self.reader.on_readable()

    def reach(self, address: SocketAddress) -> PortDestination:
        """Return how to send to *address* from here."""
        return PortDestination(self, self._sock, self._segments, address)

    @property
    def host(self) -> str:
        """The address that it is bound to, which may be a wildcard."""
        host: str = self._sock.getsockname()[0]
        return host

    def look_for_marks(self) -> None:
        """Look at the next datagrams for DSCP and ECN."""
        self.reader.look_for_marks()

    def report_errors(self, take: TakeError) -> None:
        """Call ``take(peer, icmp)`` for each ICMP error about what was sent from here."""
        if self._errors is None:
            self._errors = ErrorQueue(self._sock, take)
            self.reader.read_errors(self._errors)
        else:
            self._errors.take = take

    def drain_errors(self, to: SocketAddress) -> bool:
        """Read ICMP errors after a failure to send *to* somebody; return whether there were any."""
        return self._errors is not None and self._errors.drain(to)

    def close(self) -> None:
        """Stop reading at once; the port is given back after the present batch of events."""
        if self._overflows is not None:
            self._overflows.forget(self._sock)
        self._reactor.retire(self._sock)


class PortOpener:
    """Opens ports at one address per family."""

    def __init__(
        self, reactor: Reactor, hosts: Mapping[int, str], shared: Shared, name: str = "each port"
    ) -> None:
        """Take where to bind in each family, and how the log is to call a port."""
        self._name = name
        self._reactor = reactor
        self._hosts = hosts
        self._shared = shared
        self._buffers = BufferGiver()
        self._logged_buffers = False
        self.queues = Overflows(reactor.call_later)  # of all its ports

    def open(self, family: int, port: int, receiver: Receiver) -> PortSocket:
        """Bind a port; *receiver* takes what arrives there. Raises OSError."""
        self._reactor.close_retired()  # it may be the very port
        sock = bind_udp(self._hosts[family], port, PORT_BUFFER, give_buffers=self._buffers.give)
        if not self._logged_buffers:  # by then privileges are dropped, so the first one tells
            self._logged_buffers = True
            log_buffers(sock, PORT_BUFFER, self._name)
        return self._own(sock, receiver, is_inherited=False)

    def adopt(self, sock: socket.socket, receiver: Receiver) -> PortSocket:
        """Go on with a port that another process has opened, and still reads. Raises OSError."""
        return self._own(sock, receiver, is_inherited=True)

    def _own(self, sock: socket.socket, receiver: Receiver, *, is_inherited: bool) -> PortSocket:
        try:
            return PortSocket(
                *(sock, self._shared, receiver, self._reactor, self.queues),
                is_inherited=is_inherited,
            )
        except OSError:  # epoll has a limit of its own: fs.epoll.max_user_watches
            sock.close()
            raise


def errno_name(error: OSError) -> str:
    """Return what an error is counted under: ``enobufs``."""
    return errno.errorcode.get(error.errno or 0, "unknown").lower()


# The length of segments, in6_pktinfo, which is the larger one of what else can come, and TOS.
_CONTROL_ROOM: Final = SEGMENT_ROOM + socket.CMSG_SPACE(20) + ROOM
