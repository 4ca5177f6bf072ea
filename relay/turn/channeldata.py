"""The four-byte frame around relayed data. RFC 8656 §12.4.

::

     0                   1                   2                   3
     0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    +-------------------------------+-------------------------------+
    |         Channel Number        |            Length             |
    +-------------------------------+-------------------------------+
    /                       Application Data                        /
"""

import struct
from typing import Final

HEADER_SIZE: Final = 4
HEADER: Final = struct.Struct("!HH")
_unpack_from = HEADER.unpack_from

RFC8656_NUMBERS: Final = range(0x4000, 0x5000)  # RFC 8656 §12
RFC5766_NUMBERS: Final = range(0x4000, 0x8000)  # RFC 5766 §11, with older clients


def parse(datagram: bytes | bytearray | memoryview, size: int) -> tuple[int, int] | None:
    """Return ``(channel number, payload length)``, or None if it is no ChannelData.

    *datagram* is a buffer whose first *size* bytes are the datagram. Over UDP the frame
    may be padded, by any amount, so it can be longer than header and payload together.
    RFC 8656 §12.5.
    """
    if size < HEADER_SIZE:
        return None
    frame: tuple[int, int] = _unpack_from(datagram)
    return frame if frame[1] + HEADER_SIZE <= size else None
