"""sendmmsg(2) and recvmmsg(2): many datagrams per system call, from arrays prepared once.

The socket module has neither. Whatever the kernel reads or writes lies in buffers that the
objects here own, so a call builds next to nothing.
"""

import ctypes
import errno
import itertools
import os
import socket
import struct
from collections.abc import Sequence
from typing import Final, Literal

# From <linux/udp.h>; the socket module lacks them.
SOL_UDP: Final = 17
UDP_SEGMENT: Final = 103
UDP_GRO: Final = 104

LARGEST_DATAGRAM: Final = 65507  # payload of a UDP datagram over IPv4
MAX_SEGMENTS: Final = 64  # datagrams: UDP_MAX_SEGMENTS of older kernels


class Outbox:
    """A buffer for *count* frames of *size* bytes, one after the other, and the way to send them.

    With *gso* they leave in one piece, which the kernel or the network card segments
    (UDP_SEGMENT); else each is a datagram from the start. With *name_size* they go where
    :meth:`address_to` says, else through connected sockets.
    """

    def __init__(self, size: int, count: int, *, gso: bool, name_size: int = 0) -> None:
        self.buffer = bytearray(size * count)
        self.offsets = range(0, size * count, size)
        pieces = 1 if gso else count
        self._frames_per_piece = count // pieces
        self._name = bytearray(max(name_size, 1))
        self._segment = ctypes.create_string_buffer(_segment_control(size))
        self._vectors = (_Iovec * pieces)()
        self._headers = (_MMsgHdr * pieces)()
        start, name = _address_of(self.buffer), _address_of(self._name)
        for number, (vector, message) in enumerate(zip(self._vectors, self._headers, strict=True)):
            vector.length = size * self._frames_per_piece
            vector.base = start + number * vector.length
            message.header.iov = ctypes.addressof(vector)
            message.header.iovlen = 1
            if name_size:
                message.header.name = name
                message.header.namelen = name_size
            if gso:
                message.header.control = ctypes.addressof(self._segment)
                message.header.controllen = _CONTROL_ROOM
        self._arguments = ctypes.addressof(self._headers), pieces, socket.MSG_DONTWAIT

    def address_to(self, name: bytes) -> None:
        """Send to *name* from here on; it is a :func:`socket_name`."""
        self._name[:] = name

    def send(self, descriptor: int) -> int:
        """Send all frames; return how many the kernel took. Raises ConnectionRefusedError."""
        taken: int = _sendmmsg(descriptor, *self._arguments)
        if taken < 0:
            _raise_unless_full(ctypes.get_errno())
            return 0
        return taken * self._frames_per_piece


class Volleys:
    """Datagrams of any sizes, sent over and over through a connected socket."""

    def __init__(self, datagrams: Sequence[bytes], at_once: int) -> None:
        """Send so many of *datagrams* in each call; their number is a multiple of that."""
        self._datagrams = bytearray().join(datagrams)
        self._vectors = (_Iovec * len(datagrams))()
        self._headers = (_MMsgHdr * len(datagrams))()
        start = _address_of(self._datagrams)
        for datagram, vector, message in zip(datagrams, self._vectors, self._headers, strict=True):
            vector.base, vector.length = start, len(datagram)
            message.header.iov = ctypes.addressof(vector)
            message.header.iovlen = 1
            start += len(datagram)
        first, size = ctypes.addressof(self._headers), ctypes.sizeof(_MMsgHdr)
        self._starts = itertools.cycle(range(first, first + size * len(datagrams), size * at_once))
        self._at_once = at_once

    def send(self, descriptor: int) -> int:
        """Send the next ones; return how many the kernel took."""
        taken: int = _sendmmsg(descriptor, next(self._starts), self._at_once, socket.MSG_DONTWAIT)
        if taken < 0:
            _raise_unless_full(ctypes.get_errno())
            return 0
        return taken


class Inbox:
    """A buffer in slots, each as large as one read with GRO can be, and the way to fill it."""

    SLOTS: Final = 16
    SLOT_SIZE: Final = 65536

    def __init__(self) -> None:
        self.buffer = bytearray(self.SLOTS * self.SLOT_SIZE)
        self._control = bytearray(self.SLOTS * _CONTROL_ROOM)
        self._vectors = (_Iovec * self.SLOTS)()
        header_bytes = bytearray(self.SLOTS * ctypes.sizeof(_MMsgHdr))
        self._headers = (_MMsgHdr * self.SLOTS).from_buffer(header_bytes)
        start, control = _address_of(self.buffer), _address_of(self._control)
        for slot, (vector, message) in enumerate(zip(self._vectors, self._headers, strict=True)):
            vector.base = start + slot * self.SLOT_SIZE
            vector.length = self.SLOT_SIZE
            message.header.iov = ctypes.addressof(vector)
            message.header.iovlen = 1
            message.header.control = control + slot * _CONTROL_ROOM
            message.header.controllen = _CONTROL_ROOM
        self._arguments = ctypes.addressof(self._headers), self.SLOTS, socket.MSG_DONTWAIT, None
        # One column of each array, as the kernel leaves it.
        self._sizes = _column(header_bytes, "I", _MMsgHdr.size.offset, ctypes.sizeof(_MMsgHdr))
        self._control_sizes = _column(
            header_bytes, "L", _MsgHdr.controllen.offset, ctypes.sizeof(_MMsgHdr)
        )
        self._segment_sizes = _column(self._control, "i", socket.CMSG_LEN(0), _CONTROL_ROOM)

    def receive(self, descriptor: int) -> list[tuple[int, int, int]]:
        """Read what is there, as far as there are slots.

        Return where each piece begins in :attr:`buffer`, where it ends, and how large its
        datagrams are: those that the kernel kept or put together (UDP_GRO) are one piece.
        Raises ConnectionRefusedError.
        """
        count = _recvmmsg(descriptor, *self._arguments)
        if count < 0:
            _raise_unless_full(ctypes.get_errno())
            return []
        pieces = []
        start = 0
        for slot in range(count):
            size = step = self._sizes[slot]
            if self._control_sizes[slot]:  # which the kernel spares single datagrams
                step = self._segment_sizes[slot]
            self._control_sizes[slot] = _CONTROL_ROOM
            pieces.append((start, start + size, step))
            start += self.SLOT_SIZE
        return pieces


def socket_name(host: str, port: int) -> bytes:
    """Return the ``sockaddr_in`` or ``sockaddr_in6`` of a numeric host and a port."""
    if ":" in host:
        packed = socket.inet_pton(socket.AF_INET6, host)
        return _SOCKADDR_IN6.pack(_native(socket.AF_INET6), port, 0, packed, 0)
    packed = socket.inet_pton(socket.AF_INET, host)
    return _SOCKADDR_IN.pack(_native(socket.AF_INET), port, packed)


# The family in the machine's byte order, the port in the network's.
_SOCKADDR_IN: Final = struct.Struct("!2sH4s8x")
_SOCKADDR_IN6: Final = struct.Struct("!2sHI16sI")


def _native(number: int) -> bytes:
    return struct.pack("=H", number)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _MsgHdr(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint),
        ("iov", ctypes.c_void_p),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _MMsgHdr(ctypes.Structure):
    _fields_ = (("header", _MsgHdr), ("size", ctypes.c_uint))


_libc: Final = ctypes.CDLL(None, use_errno=True)
_sendmmsg: Final = _libc.sendmmsg
_sendmmsg.argtypes = ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int
_recvmmsg: Final = _libc.recvmmsg
_recvmmsg.argtypes = *_sendmmsg.argtypes, ctypes.c_void_p

_CONTROL_ROOM: Final = socket.CMSG_SPACE(4)
_FULL: Final = {errno.EAGAIN, errno.ENOBUFS, errno.EINTR}


def _segment_control(size: int) -> bytes:
    """Return the control message that has the kernel segment into datagrams of *size* bytes."""
    header = struct.pack("@Nii", socket.CMSG_LEN(2), SOL_UDP, UDP_SEGMENT)
    return (header + struct.pack("=H", size)).ljust(_CONTROL_ROOM, b"\0")


def _address_of(buffer: bytearray) -> int:
    """Return where *buffer* lies. Its owner keeps it, and never resizes it."""
    return ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer))


def _column(
    table: bytearray, kind: Literal["i", "I", "L"], offset: int, row_size: int
) -> memoryview:
    """Return the numbers that lie at *offset* of each row. A size_t is an ``L`` on Linux."""
    cells = memoryview(table).cast(kind)
    return cells[offset // cells.itemsize :: row_size // cells.itemsize]


def _raise_unless_full(number: int) -> None:
    if number not in _FULL:
        raise OSError(number, os.strerror(number))
