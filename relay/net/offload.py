"""Segmentation offload: many datagrams of one flow and size in one read, and in one send.

With UDP_GRO the kernel hands over up to 128 datagrams in one read, end to end, and tells how
long each is; only the last may be shorter. With UDP_SEGMENT (GSO) it cuts what one call sends
into such datagrams. It calls them *segments*; what lies in one read or send is a *train* of them.
A train costs about as much as a few single datagrams, so it is what makes bulk traffic cheap. A
kernel or device that refuses gets datagrams one by one instead.

UDP_GRO is never switched off again: what the kernel had joined before would then be read as
one datagram, and nothing would tell. Switching it on is safe at any time: what waits in the
queue is single, and stays so.
"""

import errno
import logging
import socket
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final

logger = logging.getLogger("relay.net.offload")

# From <linux/udp.h>; the socket module lacks them.
_SOL_UDP: Final = 17
_UDP_SEGMENT: Final = 103
_UDP_GRO: Final = 104
MAX_SEGMENTS: Final = 64  # UDP_MAX_SEGMENTS, which newer kernels have doubled
_MAX_BYTES: Final = 65507  # payload of the largest datagram over IPv4
_TRIED_AFTER: Final = 256  # sends after a refusal until the next try
_MAX_REFUSED: Final = 256  # hosts
_NOT_REFUSED: Final = (0, 0)
SEGMENT_ROOM: Final = socket.CMSG_SPACE(struct.calcsize("i"))
_pack_size = struct.Struct("H").pack

ControlMessage = tuple[int, int, bytes]


class Offload:
    """Whether offload is wanted at all, and what was logged of refusals."""

    def __init__(self, *, wanted: bool) -> None:
        """Use it where it is possible, if it is *wanted*."""
        self.wanted = wanted
        self.max_segments = MAX_SEGMENTS  # that one call may send
        self._logged: set[str] = set()

    def enable_gro(self, sock: socket.socket) -> bool:
        """Have the kernel hand over segments on *sock*; return whether it will."""
        if not self.wanted:
            return False
        try:
            sock.setsockopt(_SOL_UDP, _UDP_GRO, 1)
        except OSError as error:
            self.wanted = False  # the kernel knows nothing of it, on any socket
            self.log_once("no UDP_GRO (%s): datagrams are read one by one", error.strerror)
            return False
        return True

    def has_gro(self, sock: socket.socket) -> bool:
        """Tell if the kernel hands over segments on *sock* already: systemd keeps what we set."""
        with suppress(OSError):  # a kernel that knows nothing of it
            return bool(sock.getsockopt(_SOL_UDP, _UDP_GRO))
        return False

    def log_once(self, message: str, *values: object) -> None:
        """Log *message* with the *values* in it, unless it was logged before with any others."""
        if message not in self._logged:
            self._logged.add(message)
            logger.info(message, *values)


def segment_size(ancillary: list[ControlMessage]) -> int:
    """Return how long each segment of a read is, or 0 if what was read is a single datagram."""
    for level, kind, value in ancillary:
        if level == _SOL_UDP and kind == _UDP_GRO:
            return int.from_bytes(value, sys.byteorder)
    return 0


class SegmentSender:
    """Sends many datagrams at once from one socket, where the kernel takes them.

    A kernel that cannot is not asked again. Whether a device can, and how long datagrams may be,
    depends on where they go to, and may change with routes and addresses, so that is remembered
    by host and for some sends only.
    """

    __slots__ = ("_is_possible", "_offload", "_refused", "_sock")

    def __init__(self, sock: socket.socket, offload: Offload) -> None:
        """Send from *sock*, which stays the caller's."""
        self._sock = sock
        self._offload = offload
        self._is_possible = offload.wanted
        # By host: the size from which on it was refused, and how many sends not to try.
        self._refused: dict[str, tuple[int, int]] = {}

    def send(
        self,
        pieces: list[memoryview | bytes],
        each: int,
        size: int,
        to: tuple[Any, ...],
        control: Iterable[ControlMessage] = (),
    ) -> int:
        """Send datagrams; return how many of them the kernel took, from the first on.

        Every *each* of the *pieces* make a datagram of *size* bytes; the last may be shorter,
        but not empty. What the kernel did not take can be sent one by one.
        """
        if not self._is_possible or size > _MAX_BYTES:
            return 0
        refused_size, left_out = self._refused.get(to[0], _NOT_REFUSED)
        if left_out and size >= refused_size:
            self._refused[to[0]] = (refused_size, left_out - 1)
            return 0
        control = (*control, (_SOL_UDP, _UDP_SEGMENT, _pack_size(size)))
        most = min(self._offload.max_segments, _MAX_BYTES // size) * each
        for start in range(0, len(pieces), most):
            try:
                self._sock.sendmsg(pieces[start : start + most], control, 0, to)
            except OSError as error:
                self._refuse(to[0], size, error, min(most, len(pieces) - start) // each)
                return start // each
        return len(pieces) // each

    def _refuse(self, host: str, size: int, error: OSError, count: int) -> None:
        """Do not try again soon what can be expected to fail again: *count* segments to *host*."""
        if error.errno == errno.ENOPROTOOPT:
            self._is_possible = False
            self._offload.log_once("no UDP_SEGMENT (%s): sent one by one", error.strerror)
        elif error.errno == errno.EINVAL and count == MAX_SEGMENTS:
            # Linux before 5.16 counted the UDP header in, so 64 full ones were too many.
            self._offload.max_segments = MAX_SEGMENTS - 1
        elif error.errno in _TOO_LONG:
            self._remember(host, size)
            self._offload.log_once(
                "UDP_SEGMENT refuses datagrams of %d bytes (%s): sent one by one",
                size,
                error.strerror,
            )
        elif error.errno in _NOT_THERE:
            self._remember(host, 0)
            self._offload.log_once(
                "no UDP_SEGMENT on the way to a host (%s): sent one by one", error.strerror
            )
        # Else it is a shortage, or no way to there: the next send may have more luck.

    def _remember(self, host: str, size: int) -> None:
        """Do not try *size* bytes and more to *host* for some time."""
        if len(self._refused) >= _MAX_REFUSED:
            self._refused.clear()
        self._refused[host] = (size, _TRIED_AFTER)


# Longer than the device can send unfragmented. Of old kernels it is EINVAL.
_TOO_LONG: Final = frozenset({errno.EMSGSIZE, errno.EINVAL})
# The device on the way cannot compute checksums (a tunnel's), or the route is encrypted (IPsec).
_NOT_THERE: Final = frozenset({errno.EIO, errno.EOPNOTSUPP})
