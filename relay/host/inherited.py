"""Listening sockets that systemd has opened, and hands over at start."""

import logging
import os
import socket
from typing import Final

from relay.host.systemd import inherited_sockets
from relay.stun.address import family_of, format_endpoint
from relay.stun.const import Family

logger = logging.getLogger("relay.host")

ACTIVATED: Final = "turn"  # FileDescriptorName= of these sockets

_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)
_KINDS: Final = {socket.SOCK_DGRAM: "UDP", socket.SOCK_STREAM: "TCP"}


def inherited_listeners(port: int) -> dict[Family, socket.socket]:
    """Return the UDP sockets for *port* that were handed over, by family.

    They are the caller's to close; what else was handed over is closed. Raises
    :class:`~relay.host.systemd.ActivationError`.
    """
    found: dict[Family, socket.socket] = {}
    for name, sock in inherited_sockets(os.environ, os.getpid()):
        is_udp = sock.family in _FAMILIES and sock.type == socket.SOCK_DGRAM
        is_ours = name == ACTIVATED and is_udp and sock.getsockname()[1] == port
        if is_ours and (family := family_of(sock.getsockname()[0])) not in found:
            found[family] = sock
        else:  # the name or port of another, or one address too many of a family
            _leave_out(sock, name)
    return found


def _leave_out(sock: socket.socket, name: str) -> None:
    kind, address = _KINDS.get(sock.type, "other"), sock.getsockname()
    where = format_endpoint(*address[:2]) if sock.family in _FAMILIES else "a socket"
    logger.warning("not used: %s (%s), handed over by systemd as %r", where, kind, name)
    sock.close()
