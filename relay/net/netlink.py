"""What rtnetlink says of addresses: bytes to tuples. Pure.

A message is a header of 16 bytes (length with the header, type, flags, sequence number, port),
then for an address ``struct ifaddrmsg`` of 8 (family, prefix length, flags, scope, interface),
then attributes: length with these 4 bytes, type, value. Messages and attributes begin at
multiples of 4 bytes; numbers have the byte order of this machine. See netlink(7), rtnetlink(7).
"""

import struct
from collections.abc import Iterator
from typing import Final

# <linux/netlink.h> and <linux/rtnetlink.h>
NLMSG_ERROR: Final = 2
NLMSG_DONE: Final = 3
RTM_NEWADDR: Final = 20
RTM_DELADDR: Final = 21
_RTM_GETADDR: Final = 22
_DUMP: Final = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
NLM_F_DUMP_INTR: Final = 0x10  # something has changed during the dump, which may lack it
GROUPS: Final = 0x110  # RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR

# <linux/if_addr.h>
_IFA_ADDRESS: Final = 1  # of the other end, where there is one
_IFA_LOCAL: Final = 2
_IFA_FLAGS: Final = 8
IFA_F_TEMPORARY: Final = 0x01  # for IPv6; RFC 8981
IFA_F_UNUSABLE: Final = 0x68  # DADFAILED, DEPRECATED, TENTATIVE: not yet, or not for long

_HEADER: Final = struct.Struct("=IHHII")
_IFADDRMSG: Final = struct.Struct("=BBBBI")
_ATTRIBUTE: Final = struct.Struct("=HH")
_NUMBER: Final = struct.Struct("=I")
_ERROR: Final = struct.Struct("=i")

Entry = tuple[int, int, bytes]
"""An address of an interface: the interface's number, the prefix length, the 4 or 16 bytes.

One address can be at several interfaces, and at one of them with several prefix lengths.
"""


def dump_request(sequence: int, family: int = 0) -> bytes:
    """Return what asks for all addresses, of one family or of any."""
    size = _HEADER.size + _IFADDRMSG.size
    header = _HEADER.pack(size, _RTM_GETADDR, _DUMP, sequence, 0)
    return header + _IFADDRMSG.pack(family, 0, 0, 0, 0)


def messages(data: bytes) -> Iterator[tuple[int, int, int, memoryview]]:
    """Yield type, flags, sequence number and body of each message. Raises ValueError."""
    view, at = memoryview(data), 0
    while at < len(view):
        if len(view) - at < _HEADER.size:
            raise ValueError("a netlink header is cut short")
        length, kind, flags, sequence, _ = _HEADER.unpack_from(view, at)
        if not _HEADER.size <= length <= len(view) - at:
            raise ValueError(f"a netlink message has a length of {length}")
        yield kind, flags, sequence, view[at + _HEADER.size : at + length]
        at += length + 3 & ~3


def address(body: memoryview) -> tuple[Entry, int] | None:
    """Return the address in the body of RTM_NEWADDR or RTM_DELADDR, and its flags.

    None if there is no address of IPv4 or IPv6 in it. Raises ValueError.
    """
    if len(body) < _IFADDRMSG.size:
        raise ValueError("struct ifaddrmsg is cut short")
    _, prefix_length, flags, _, interface = _IFADDRMSG.unpack_from(body)
    packed = local = None
    at = _IFADDRMSG.size
    while at + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, at)
        if not _ATTRIBUTE.size <= length <= len(body) - at:
            raise ValueError(f"a netlink attribute has a length of {length}")
        if kind == _IFA_ADDRESS:
            packed = bytes(body[at + _ATTRIBUTE.size : at + length])
        elif kind == _IFA_LOCAL:
            local = bytes(body[at + _ATTRIBUTE.size : at + length])
        elif kind == _IFA_FLAGS and length == _ATTRIBUTE.size + _NUMBER.size:
            (flags,) = _NUMBER.unpack_from(body, at + _ATTRIBUTE.size)
        at += length + 3 & ~3
    host = local or packed
    if host is None or len(host) not in {4, 16}:
        return None
    return (interface, prefix_length, host), flags


def error(body: memoryview) -> int:
    """Return the errno in the body of NLMSG_ERROR; 0 is none. Raises ValueError."""
    if len(body) < _ERROR.size:
        raise ValueError("a netlink error is cut short")
    number: int = _ERROR.unpack_from(body)[0]
    return -number
