r"""The PROXY protocol: a proxy says, before anything else, from where a connection came.

The header is that of HAProxy's "The PROXY protocol, versions 1 and 2". Version 1 is one line::

    PROXY TCP4 192.0.2.7 198.51.100.1 50000 443\r\n

Version 2 is binary::

    0   12 bytes   "\r\n\r\n\0\r\nQUIT\n"
    12   1 byte    version (2) and command: 0 the proxy itself, 1 on behalf of a client
    13   1 byte    family (1 IPv4, 2 IPv6, else unknown) and transport (1 stream)
    14   2 bytes   how many bytes follow
    16             source, destination, source port, destination port, and then more about it
"""

import re
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
LONGEST_LINE: Final = 107  # bytes of version 1, as its text has it
LONGEST: Final = 2048  # bytes of version 2: certificates' names and the like may follow

_FIXED: Final = struct.Struct("!12sBBH")
_KINDS: Final[dict[str, type[IPv4Address] | type[IPv6Address]]] = {
    "TCP4": IPv4Address,
    "TCP6": IPv6Address,
}
_ADDRESSES: Final = {1: struct.Struct("!4s4sHH"), 2: struct.Struct("!16s16sHH")}
_LOCAL, _PROXY = 0x20, 0x21  # version and command
_STREAM: Final = 1


class NoHeader(ValueError):
    """A connection from a proxy does not begin with a header of the PROXY protocol."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says."""

    size: int  # bytes that it had
    source: tuple[str, int] | None  # host and port of the client; None: the proxy speaks for itself


def read_header(received: bytes) -> Header | None:
    """Read the header at the start of what was received; None if it is not complete.

    Raises NoHeader if it is none, or one that is not for a stream of TCP.
    """
    if received[:1] == SIGNATURE[:1]:
        return _read_binary(received)
    return _read_line(received)


def _read_line(received: bytes) -> Header | None:
    begin = b"PROXY "
    if not begin.startswith(received[: len(begin)]):
        raise NoHeader("no PROXY header")
    line, end, _ = received[:LONGEST_LINE].partition(b"\r\n")
    if not end:
        if len(received) >= LONGEST_LINE:
            raise NoHeader("a PROXY header without an end")
        return None
    size = len(line) + len(end)
    words = line.decode("ascii", "replace").split(" ")
    if words[1] == "UNKNOWN":
        return Header(size, None)
    if len(words) != 6 or words[1] not in _KINDS:
        raise NoHeader("a PROXY header of another form")
    try:
        host = _KINDS[words[1]](words[2])
    except ValueError:
        raise NoHeader("a PROXY header without an address") from None
    port = words[4]
    if "%" in words[2] or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 0xFFFF:
        raise NoHeader("a PROXY header without a port")
    return Header(size, (_spelled(host), int(port)))


def _read_binary(received: bytes) -> Header | None:
    if not SIGNATURE.startswith(received[: len(SIGNATURE)]):
        raise NoHeader("no PROXY header")
    if len(received) < _FIXED.size:
        return None
    _, command, kind, length = _FIXED.unpack_from(received)
    size = _FIXED.size + length
    if command not in {_LOCAL, _PROXY} or size > LONGEST:
        raise NoHeader("a PROXY header of another version, or too long")
    if len(received) < size:
        return None
    if command == _LOCAL or kind == 0:
        return Header(size, None)
    addresses = _ADDRESSES.get(kind >> 4)
    if addresses is None or kind & 0xF != _STREAM or length < addresses.size:
        raise NoHeader("a PROXY header that is not for TCP")
    source, _, port, _ = addresses.unpack_from(received, _FIXED.size)
    return Header(size, (_spelled(ip_address(source)), port))


def _spelled(host: IPv4Address | IPv6Address) -> str:
    """Spell a host as the kernel does; an IPv4 one as that, however the proxy has it."""
    mapped = host.ipv4_mapped if isinstance(host, IPv6Address) else None
    return str(mapped or host)
