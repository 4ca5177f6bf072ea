"""Messages in a stream: STUN and ChannelData, one after the other. RFC 8656 §12.5, RFC 8489 §6.2.2.

A stream has no boundaries of its own, so each message says how long it is. The first two bits of a
message tell which of both it is::

    00  STUN: 20 bytes of header, with the magic cookie, and as many as the header says
    01  ChannelData: 4 bytes of header, as many as it says, and up to 3 bytes of padding, so that
        the next message begins at a multiple of four bytes

What is neither cannot be skipped, for nobody knows where it ends.
"""

import struct
from typing import Final

from relay.stun.const import HEADER_SIZE, MAGIC_COOKIE
from relay.turn.channeldata import HEADER_SIZE as CHANNEL_HEADER_SIZE

SHORTEST: Final = CHANNEL_HEADER_SIZE  # bytes that tell how long a message is
FIRST_CHANNEL: Final = 0x4000
LAST_CHANNEL: Final = 0x7FFF
PADDING: Final = (b"", bytes(3), bytes(2), bytes(1))
"""What follows a message in a stream, by its size modulo 4."""

_STUN_HEADER: Final = struct.Struct("!HHI")
_header: Final = struct.Struct("!HH").unpack_from


class NotFramed(ValueError):
    """A stream holds what is neither STUN nor ChannelData."""


def message_size(stream: bytes | bytearray | memoryview, at: int, end: int) -> int:
    """Return how many bytes the message has that begins at *at*, padding included.

    *stream* ends at *end*. 0 if that is too early to tell. Raises NotFramed.
    """
    if end - at < SHORTEST:
        return 0
    kind, length = _header(stream, at)
    if FIRST_CHANNEL <= kind <= LAST_CHANNEL:
        size: int = CHANNEL_HEADER_SIZE + length + (-length & 3)
        return size
    if kind >= FIRST_CHANNEL:
        raise NotFramed(f"a message begins with {kind:#06x}")
    if length & 3:
        raise NotFramed(f"a STUN message of {length} bytes")
    # A STUN header that lacks the cookie is somebody else's protocol.
    if end - at >= _STUN_HEADER.size and _STUN_HEADER.unpack_from(stream, at)[2] != MAGIC_COOKIE:
        raise NotFramed("a STUN message without the magic cookie")
    return HEADER_SIZE + int(length)
