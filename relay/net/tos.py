"""DSCP and ECN: the octet in the IP header that says how a datagram is to be treated on its way.

IPv4 calls it TOS, IPv6 traffic class. The upper six bits are the DSCP (RFC 2474), the lower two are
ECN (RFC 3168). The kernel reports the octet of what is read, and takes one for what is sent, in a
control message: of IPv4 in one byte, of IPv6 in an int. Of segments that were read at once it
reports one octet, for it joins no datagrams that differ in it. Before Linux 6.10 some kernels do;
then all have that of the first.
"""

import socket
import struct
import sys
from typing import Final, Literal

from relay.net.offload import ControlMessage

CopyTos = Literal["auto", "on", "off"]
"""If what is relayed has the octet that it came with. auto: each socket finds out if it must."""

_IP_RECVTOS: Final = 13  # <linux/in.h>; the socket module of Python 3.11 lacks it
_REPORTS: Final = {
    socket.AF_INET: (socket.IPPROTO_IP, _IP_RECVTOS),
    socket.AF_INET6: (socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS),
}

LOW_BYTE: Final = 0 if sys.byteorder == "little" else -1  # where the octet is, in either family
ROOM: Final = socket.CMSG_SPACE(struct.calcsize("i"))
"""What the control message takes when it is read, in bytes."""

Marks = tuple[tuple[ControlMessage, ...], ...]
"""The control messages to send with a datagram, by the octet that it is to have; none for 0."""

MARKS: Final[dict[int, Marks]] = {
    socket.AF_INET: (
        (),
        *(((socket.IPPROTO_IP, socket.IP_TOS, bytes([octet])),) for octet in range(1, 256)),
    ),
    socket.AF_INET6: (
        (),
        *(
            ((socket.IPPROTO_IPV6, socket.IPV6_TCLASS, struct.pack("i", octet)),)
            for octet in range(1, 256)
        ),
    ),
}
"""By family of the socket that sends."""


def report_tos(sock: socket.socket, *, wanted: bool) -> None:
    """Have the kernel report the octet of each datagram that is read from *sock*, or not."""
    sock.setsockopt(*_REPORTS[sock.family], wanted)
