"""How many bytes the kernel may queue for a socket, and how many datagrams found no room.

Short queues lose datagrams in a burst. The limit of the system is net.core.rmem_max and
net.core.wmem_max, about 200 KiB unless someone raised it; CAP_NET_ADMIN gets past it.
An operator who is told can change both.
"""

import logging
import socket
import struct
from collections.abc import Callable
from typing import Final

logger = logging.getLogger("relay.net.buffers")

# From <asm-generic/socket.h>; the socket module lacks them.
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33

_SO_MEMINFO: Final = 55
_MEMINFO: Final = struct.Struct("9I")  # <linux/sock_diag.h>
_MEMINFO_DROPS: Final = 8  # SK_MEMINFO_DROPS
_MAX_DROPS: Final = 0xFFFFFFFF  # the kernel's counter begins again after that

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


def overflows_of(sock: socket.socket) -> int:
    """Return how many datagrams found the queue of *sock* full since it was made."""
    meminfo = sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
    drops: int = _MEMINFO.unpack(meminfo)[_MEMINFO_DROPS]
    return drops


class Overflows:
    """How many datagrams found the queue of one of many sockets full, closed ones included.

    The kernel counts by socket, and tells one at a time when asked. So each is asked before it is
    closed, and meanwhile once in :attr:`PERIOD`, a portion of them at a time: 16,000 sockets take
    a quarter of a millisecond, six times a second.
    """

    PERIOD: Final = 10.0  # seconds
    PORTION: Final = 256  # sockets

    def __init__(self, call_later: Callable[[float, Callable[[], None]], None]) -> None:
        """*call_later* calls something in so many seconds, instead of when it was to be called."""
        self._call_later = call_later
        self._counted: dict[socket.socket, int] = {}  # by socket, what is in the total of it
        self._unasked: list[socket.socket] = []  # in this period
        self._is_asking = False
        self._total = 0

    def watch(self, sock: socket.socket, *, is_new: bool = True) -> None:
        """Count those of a socket from here on."""
        self._counted[sock] = 0 if is_new else overflows_of(sock)
        if not self._is_asking:
            self._ask_later()

    def forget(self, sock: socket.socket) -> None:
        """Count the last ones of a socket that is about to be closed."""
        self._count(sock)
        del self._counted[sock]

    def overflows(self) -> int:
        """Return how many there were. Safe in any thread."""
        return self._total

    def add(self, overflows: int) -> None:
        """Count some that another process has counted."""
        self._total += overflows

    def _ask_later(self) -> None:
        """Go on in time, or, with nothing to watch, not at all: then the loop can sleep."""
        self._is_asking = bool(self._counted)
        if self._is_asking:
            share = self.PORTION / max(self.PORTION, len(self._counted))
            self._call_later(self.PERIOD * share, self._ask_portion)

    def _ask_portion(self) -> None:
        unasked = self._unasked = self._unasked or list(self._counted)
        for _ in range(min(self.PORTION, len(unasked))):
            sock = unasked.pop()
            if sock in self._counted:  # else it was closed meanwhile
                self._count(sock)
        self._ask_later()

    def _count(self, sock: socket.socket) -> None:
        overflows = overflows_of(sock)
        self._total += (overflows - self._counted[sock]) & _MAX_DROPS
        self._counted[sock] = overflows


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
