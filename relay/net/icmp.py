"""ICMP errors about what a socket has sent. ip(7), IP_RECVERR.

A socket that asks for them gets each in two ways: as an entry of its error queue, with the address
that was sent to and the ICMP type and code; and as the failure of whatever system call comes next
on that socket, which may be about another datagram. Who sends has to try again after that; who
reads has to empty the queue, for epoll reports the socket as long as there is anything in it.
"""

import errno
import socket
import struct
from collections.abc import Callable
from typing import Any, Final

from relay.net.offload import ControlMessage

AT_ONCE: Final = 32  # errors that are read in one go; others may be waiting for the loop

# From <linux/in.h>, <linux/in6.h> and <linux/errqueue.h>; the socket module lacks them.
_IP_RECVERR: Final = 11
_IPV6_RECVERR: Final = 25
_LOCAL, _ICMP, _ICMP6 = 1, 2, 3  # where an error comes from
_EXTENDED: Final = struct.Struct("=IBBBBII")  # sock_extended_err
_ROOM: Final = socket.CMSG_SPACE(_EXTENDED.size + 28) + socket.CMSG_SPACE(64)

# Those that are about a datagram's way: unreachable, too big, time exceeded. RFC 792, RFC 4443.
_ABOUT_THE_WAY: Final = {_ICMP: frozenset({3, 11}), _ICMP6: frozenset({1, 2, 3})}
_TOO_BIG: Final = {socket.AF_INET: (3, 4), socket.AF_INET6: (2, 0)}

Icmp = tuple[int, int, int]
"""Type and code, as they are for the family, and the MTU if a datagram was too big, else 0."""

TakeError = Callable[[Any, Icmp], None]
"""Takes an error: host and port that were sent to, and what ICMP says."""


class ErrorQueue:
    """The error queue of one UDP socket."""

    __slots__ = ("_sock", "_too_big", "take")

    def __init__(self, sock: socket.socket, take: TakeError) -> None:
        """Ask for errors; *take* gets those that are about the way of a datagram."""
        self._sock = sock
        self.take = take
        self._too_big = _TOO_BIG[sock.family]
        report_errors(sock, wanted=True)

    def drain(self, to: Any = None) -> bool:  # noqa: ANN401
        """Read what is there, up to a bound; return whether there was anything.

        *to* is the address that was just sent to: of a datagram that is too big for our own
        interface the kernel does not say where it should have gone.
        """
        for count in range(AT_ONCE):
            try:
                _, ancillary, _, address = self._sock.recvmsg(0, _ROOM, socket.MSG_ERRQUEUE)
            except OSError:
                return count > 0
            error = self._error_in(ancillary)
            if error is not None:
                is_local, icmp = error
                peer = to if is_local else address
                if peer is not None:
                    self.take(peer[:2], icmp)
        return True

    def _error_in(self, ancillary: list[ControlMessage]) -> tuple[bool, Icmp] | None:
        """Return whether an error is our own host's, and what it says; None if nobody cares."""
        for level, kind, value in ancillary:
            if (level, kind) in _REPORTS:
                number, origin, icmp_type, code, _, info, _ = _EXTENDED.unpack_from(value)
                if origin == _LOCAL and number == errno.EMSGSIZE:
                    return True, (*self._too_big, info)
                if icmp_type in _ABOUT_THE_WAY.get(origin, ()):
                    is_too_big = (icmp_type, code) == self._too_big
                    return False, (icmp_type, code, info if is_too_big else 0)
        return None


def report_errors(sock: socket.socket, *, wanted: bool) -> None:
    """Have the kernel queue errors for a UDP socket, or not: then those that are there go."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, wanted)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, wanted)


_REPORTS: Final = frozenset(
    {(socket.IPPROTO_IP, _IP_RECVERR), (socket.IPPROTO_IPV6, _IPV6_RECVERR)}
)
