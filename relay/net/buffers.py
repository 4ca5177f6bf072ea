"""How many bytes the kernel may queue for a socket, and what the operator can do about it.

Short queues lose datagrams in a burst. The limit of the system is net.core.rmem_max and
net.core.wmem_max, about 200 KiB unless someone raised it; CAP_NET_ADMIN gets past it.
"""

import logging
import socket
from typing import Final

logger = logging.getLogger("relay.net.buffers")

# From <asm-generic/socket.h>; the socket module lacks them.
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33

_DIRECTIONS: Final = (
    (socket.SO_RCVBUF, _SO_RCVBUFFORCE, "net.core.rmem_max"),
    (socket.SO_SNDBUF, _SO_SNDBUFFORCE, "net.core.wmem_max"),
)


def set_buffers(sock: socket.socket, size: int) -> None:
    """Ask for queues of *size* bytes: past the system's limit if we may, else up to it.

    What is that long already stays so: systemd may have asked for it, with more privileges.
    """
    for plain, forced, _ in _DIRECTIONS:
        _set_buffer(sock, plain, forced, size)


class BufferGiver:
    """Gives many new sockets their queues, with as few system calls as that takes.

    What has to be asked for is found out with the first of them: privileges do not come back,
    and the system's default is the same for all.
    """

    def __init__(self) -> None:
        self._options: list[int] | None = None

    def give(self, sock: socket.socket, size: int) -> None:
        """Ask for queues of *size* bytes for a socket that was just made."""
        if self._options is None:
            self._options = [
                option
                for plain, forced, _ in _DIRECTIONS
                if (option := _set_buffer(sock, plain, forced, size)) is not None
            ]
        else:
            for option in self._options:
                sock.setsockopt(socket.SOL_SOCKET, option, size)


def log_buffers(sock: socket.socket, size: int, whose: str) -> None:
    """Log the queues that *sock* got, and how to get the *size* that was asked for."""
    actual = [_actual(sock, plain) for plain, _, _ in _DIRECTIONS]
    logger.info("%s: the kernel queues %d bytes to read, %d to send", whose, *actual)
    limits = [
        f"{limit}={size}"
        for (_, _, limit), got in zip(_DIRECTIONS, actual, strict=True)
        if got < size
    ]
    if limits:
        logger.warning(
            "%s: bursts may be lost, as the queues are shorter than %d bytes. To change that: "
            "sysctl -w %s",
            whose,
            size,
            " ".join(limits),
        )


def _set_buffer(sock: socket.socket, plain: int, forced: int, size: int) -> int | None:
    """Make one queue *size* bytes long; return the option that did it, None if none had to."""
    if _actual(sock, plain) >= size:
        return None
    try:
        sock.setsockopt(socket.SOL_SOCKET, forced, size)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, plain, size)
        return plain
    return forced


def _actual(sock: socket.socket, plain: int) -> int:
    """Return the bytes of a queue. The kernel doubles them, for what it adds to each datagram."""
    return sock.getsockopt(socket.SOL_SOCKET, plain) // 2
