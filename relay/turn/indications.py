"""Send and Data indications: relayed data without a channel. RFC 8656 §11.

Each carries a peer and a payload. They come once per datagram, so nothing of the general decoder is
used: what most clients send, an IPv4 peer and then the payload, is read in one go, and what is sent
to clients is written in front of the payload, where that lies::

    type, length           16 bits each
    magic cookie           32
    transaction id         96
    XOR-PEER-ADDRESS       32 + 64, or 32 + 160 for IPv6
    DATA                   32, then the payload, padded to 4 bytes
"""

import struct
from itertools import count
from typing import Any, ClassVar, Final

from relay.stun.address import Address, pack_host, unpack_host
from relay.stun.attributes import BY_TYPE, Attr, Attribute, comprehension_required
from relay.stun.const import HEADER_SIZE, MAGIC_COOKIE, Kind, Method
from relay.stun.integrity import fingerprint
from relay.stun.message import Message
from relay.stun.raw import MAX_ATTRIBUTES, TLV

SEND: Final = Kind.INDICATION | Method.SEND  # the first 16 bits. RFC 8489 §5
DATA: Final = Kind.INDICATION | Method.DATA

Peer = bytes
"""A peer as Send indications name it: the value of XOR-PEER-ADDRESS.

Of IPv4 as it came, since its mask is the same in every message; of IPv6 without its mask.
"""

Send = tuple[Peer, int, int, bool]
"""A Send indication: its peer, where the payload begins and how long it is, and DONT-FRAGMENT."""

Icmp = tuple[int, int, int]
"""Type and code of an ICMP error in its family, and the MTU if a datagram was too big, else 0."""

_PEER: Final = Attr.XOR_PEER_ADDRESS.type
_DATA: Final = Attr.DATA.type
_DONT_FRAGMENT: Final = Attr.DONT_FRAGMENT.type
_FINGERPRINT: Final = Attr.FINGERPRINT.type
_INTEGRITIES: Final = frozenset({Attr.MESSAGE_INTEGRITY.type, Attr.MESSAGE_INTEGRITY_SHA256.type})
_IPV4, _IPV6 = 1, 2  # the second byte of an address
_IPV4_SIZE, _IPV6_SIZE = 8, 20  # of the value of XOR-PEER-ADDRESS
_IPV4_PEER: Final = _PEER << 16 | _IPV4_SIZE
_IPV6_PEER: Final = _PEER << 16 | _IPV6_SIZE

# What most clients send: header, XOR-PEER-ADDRESS of IPv4, and DATA up to the end.
_USUAL: Final = struct.Struct("!HHI12sI8sHH")
USUAL_START: Final = _USUAL.size
"""Where the payload begins in what most clients send."""
_unpack_usual = _USUAL.unpack_from
_unpack_header = struct.Struct("!HHI12s").unpack_from
_unpack_tlv = TLV.unpack_from

_PORT_MASK: Final = MAGIC_COOKIE >> 16
_IPV4_MASK: Final = _PORT_MASK << 32 | MAGIC_COOKIE


def parse_send(datagram: bytes | memoryview, size: int) -> Send | None:
    """Read a Send indication, or return None if it makes no sense. RFC 8656 §11.2.

    *datagram* is a buffer whose first *size* bytes are the datagram. What must be understood and is
    not makes no sense either.
    """
    if size >= USUAL_START:
        message_type, length, cookie, _, peer_header, peer, kind, data_size = _unpack_usual(
            datagram
        )
        if (
            peer_header == _IPV4_PEER
            and kind == _DATA
            and length == USUAL_START - HEADER_SIZE + data_size + -data_size % 4
            and length + HEADER_SIZE <= size
            and cookie == MAGIC_COOKIE
            and message_type == SEND
        ):
            return peer, USUAL_START, data_size, False
    return _parse_any(datagram, size)


def _parse_any(datagram: bytes | memoryview, size: int) -> Send | None:
    """Read one whose attributes are others, or in another order. The first of each counts."""
    if size < HEADER_SIZE:
        return None
    message_type, length, cookie, transaction_id = _unpack_header(datagram)
    end = HEADER_SIZE + length
    if message_type != SEND or cookie != MAGIC_COOKIE or length % 4 or end > size:
        return None
    peer: Peer | None = None
    start = data_size = 0
    dont_fragment = is_signed = False
    offset = HEADER_SIZE
    for _ in range(MAX_ATTRIBUTES):
        if offset == end:
            break
        kind, value_size = _unpack_tlv(datagram, offset)
        offset += 4
        if offset + value_size > end:
            return None
        if kind == _FINGERPRINT:
            expected = fingerprint(datagram[: offset - 4]).to_bytes(4, "big")
            if datagram[offset : offset + value_size] != expected:
                return None
            break  # it is the last attribute. RFC 8489 §14.7
        if is_signed:  # what follows a signature is ignored. RFC 8489 §14.5
            pass
        elif kind == _PEER:
            if peer is None:
                peer = bytes(datagram[offset : offset + value_size])
        elif kind == _DATA:
            if not start:
                start, data_size = offset, value_size
        elif kind == _DONT_FRAGMENT:
            dont_fragment = True
        elif kind in _INTEGRITIES:
            is_signed = True
        elif kind not in BY_TYPE and comprehension_required(kind):
            return None
        offset += value_size + -value_size % 4
    else:
        return None  # more than there can be any reason for
    if peer is None or not start:
        return None
    if len(peer) == _IPV6_SIZE:
        peer = _unmask(peer, transaction_id)
    return peer, start, data_size, dont_fragment


def _unmask(peer: bytes, transaction_id: bytes) -> Peer:
    """Take the mask of its message from an IPv6 peer: two reserved bytes, port, host."""
    mask = int.from_bytes(MAGIC_COOKIE.to_bytes(4, "big") + transaction_id, "big")
    plain = int.from_bytes(peer, "big") ^ (_PORT_MASK << 128 | mask)
    return plain.to_bytes(_IPV6_SIZE, "big")


def address_of(peer: Peer) -> Address | None:
    """Return the host and port of a peer that :func:`parse_send` has read; None if it has none."""
    if len(peer) == _IPV4_SIZE and peer[1] == _IPV4:
        peer = (int.from_bytes(peer, "big") ^ _IPV4_MASK).to_bytes(_IPV4_SIZE, "big")
    elif len(peer) != _IPV6_SIZE or peer[1] != _IPV6:
        return None
    return unpack_host(peer[4:]), int.from_bytes(peer[2:4], "big")


class TransactionIds:
    """Transaction ids for indications: nobody answers to them, so they only have to differ."""

    def __init__(self, start: int) -> None:
        """Count up from *start*, a random number of 96 bits."""
        self._first = start >> 64
        self._others = count(start & (1 << 64) - 1)

    def next(self) -> tuple[int, int]:
        """Return the first 32 bits and the other 64."""
        return self._first, next(self._others) & (1 << 64) - 1


DATA_HEADER_SIZES: Final = (36, 48)  # bytes, with a peer of IPv4 and of IPv6


class DataHeader:
    """What is written in front of the payload in a Data indication, for one peer's host."""

    __slots__ = ()

    _layout: ClassVar[struct.Struct]
    size: ClassVar[int]

    def pack_into(
        self, buffer: bytearray, at: int, port: int, length: int, ids: TransactionIds
    ) -> None:
        """Write it at *at*, for a payload of *length* bytes that comes from *port*."""
        self._layout.pack_into(buffer, at, *self._fields(port, length, ids))

    def pack(self, port: int, length: int, ids: TransactionIds) -> bytes:
        """Return the same."""
        return self._layout.pack(*self._fields(port, length, ids))

    def _fields(self, port: int, length: int, ids: TransactionIds) -> tuple[int, ...]:
        raise NotImplementedError


def data_header(host: str) -> DataHeader:
    """Return what writes the headers of Data indications from a host."""
    return _Ipv6DataHeader(host) if ":" in host else _Ipv4DataHeader(host)


class _Ipv4DataHeader(DataHeader):
    __slots__ = ("_host",)

    _layout = struct.Struct("!HHIIQIHHIHH")
    size = _layout.size

    def __init__(self, host: str) -> None:
        self._host = int.from_bytes(pack_host(host), "big") ^ MAGIC_COOKIE

    def _fields(self, port: int, length: int, ids: TransactionIds) -> tuple[int, ...]:
        return (
            DATA,
            self.size - HEADER_SIZE + length + -length % 4,
            MAGIC_COOKIE,
            *ids.next(),
            _IPV4_PEER,
            _IPV4,
            port ^ _PORT_MASK,
            self._host,
            _DATA,
            length,
        )


class _Ipv6DataHeader(DataHeader):
    __slots__ = ("_high", "_low")

    _layout = struct.Struct("!HHIIQIHHQQHH")
    size = _layout.size

    def __init__(self, host: str) -> None:
        high, low = struct.unpack("!QQ", pack_host(host))
        self._high = high ^ MAGIC_COOKIE << 32
        self._low = low

    def _fields(self, port: int, length: int, ids: TransactionIds) -> tuple[int, ...]:
        first, others = ids.next()
        return (
            DATA,
            self.size - HEADER_SIZE + length + -length % 4,
            MAGIC_COOKIE,
            first,
            others,
            _IPV6_PEER,
            _IPV6,
            port ^ _PORT_MASK,
            self._high ^ first,
            self._low ^ others,
            _DATA,
            length,
        )


def icmp_error(peer: Address, icmp: Icmp, ids: TransactionIds) -> bytes:
    """Return a Data indication of an ICMP error, which has no DATA. RFC 8656 §11.5."""
    first, others = ids.next()
    transaction_id = first.to_bytes(4, "big") + others.to_bytes(8, "big")
    attributes: list[tuple[Attribute[Any], Any]] = [
        (Attr.XOR_PEER_ADDRESS, peer),
        (Attr.ICMP, icmp),
    ]
    return Message(Kind.INDICATION, Method.DATA, transaction_id, attributes).encode()
