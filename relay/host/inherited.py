"""Listening sockets that systemd has opened, and hands over at start."""

import logging
import os
import socket
from collections.abc import Collection
from typing import Final

from relay.host.systemd import inherited_sockets
from relay.stun.address import family_of, format_endpoint
from relay.stun.const import Family

logger = logging.getLogger("relay.host")

ACTIVATED: Final = "turn"  # FileDescriptorName= of these sockets

_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)
_KINDS: Final = {socket.SOCK_DGRAM: "UDP", socket.SOCK_STREAM: "TCP"}


Place = tuple[int, int]
"""The kind of a socket, SOCK_DGRAM or a SOCK_STREAM that listens, and its port."""


def inherited_listeners(places: Collection[Place]) -> dict[Place, dict[Family, socket.socket]]:
    """Return the sockets for *places* that were handed over, by place and family.

    They are the caller's to close; what else was handed over is closed. Raises
    :class:`~relay.host.systemd.ActivationError`.
    """
    found: dict[Place, dict[Family, socket.socket]] = {place: {} for place in places}
    for name, sock in inherited_sockets(os.environ, os.getpid()):
        by_family = found.get(_place(sock)) if name == ACTIVATED else None
        family = family_of(sock.getsockname()[0]) if by_family is not None else None
        if by_family is not None and family is not None and family not in by_family:
            by_family[family] = sock
        else:  # the name or port of another, or one address too many of a family
            _leave_out(sock, name)
    return found


def _place(sock: socket.socket) -> Place:
    if sock.family not in _FAMILIES:
        return (0, 0)
    if sock.type == socket.SOCK_STREAM and not sock.getsockopt(
        socket.SOL_SOCKET, socket.SO_ACCEPTCONN
    ):
        return (0, 0)
    return (sock.type, sock.getsockname()[1])


def _leave_out(sock: socket.socket, name: str) -> None:
    kind, address = _KINDS.get(sock.type, "other"), sock.getsockname()
    where = format_endpoint(*address[:2]) if sock.family in _FAMILIES else "a socket"
    logger.warning("not used: %s (%s), handed over by systemd as %r", where, kind, name)
    sock.close()
