"""Every attribute that this relay understands: one row each in :class:`Attr`.

A row is the type, the wire name, and how the value is read and written. Values are
plain Python: text, integers, ``(host, port)``. A wrong value raises
:class:`DecodeError`; nothing here knows which message an attribute belongs to.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from relay.stun.address import Address, pack_host, unpack_host
from relay.stun.const import COMPREHENSION_OPTIONAL, MAGIC_COOKIE, Family

T = TypeVar("T")

_COOKIE: Final = MAGIC_COOKIE.to_bytes(4, "big")
_ADDRESS_SIZE: Final = {Family.IPV4: 4, Family.IPV6: 16}
_FAMILIES: Final[dict[int, Family]] = {family.value: family for family in Family}


class DecodeError(ValueError):
    """Bytes from the wire that are not what they claim to be."""


class UndecodableAttribute(DecodeError):
    """A value that makes no sense, in a message that is sound: its sender can be told."""


@dataclass(frozen=True, slots=True)
class Coding(Generic[T]):
    """How a value is read and written. Both ways need the transaction id (to XOR addresses)."""

    decode: Callable[[bytes, bytes], T]  # value, transaction id; raises DecodeError
    encode: Callable[[T, bytes], bytes]  # the same without the padding


@dataclass(frozen=True, slots=True, eq=False)
class Attribute(Generic[T]):
    """One row of the table. RFC 8489 §14: type, length (both 16 bits), value, padding to 4."""

    type: int
    name: str
    coding: Coding[T]
    repeatable: bool = False  # else the first occurrence counts

    def __repr__(self) -> str:
        return self.name


def _text(longest: int) -> Coding[str]:
    """UTF-8 of at most *longest* bytes."""

    def decode(value: bytes, _transaction_id: bytes) -> str:
        if len(value) > longest:
            raise DecodeError(f"{len(value)} bytes, at most {longest} allowed")
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise DecodeError("not UTF-8") from error

    return Coding(decode, lambda text, _transaction_id: text.encode())


def _octets(*sizes: int) -> Coding[bytes]:
    """Bytes as they are, of one of the *sizes* (any, if none is given)."""

    def decode(value: bytes, _transaction_id: bytes) -> bytes:
        if sizes and len(value) not in sizes:
            raise DecodeError(f"{len(value)} bytes instead of {sizes[0]}")
        return value

    return Coding(decode, lambda value, _transaction_id: value)


def _number(layout: str) -> Coding[int]:
    """One unsigned integer; whatever else *layout* skips is reserved and ignored."""
    packer = struct.Struct(layout)

    def decode(value: bytes, _transaction_id: bytes) -> int:
        if len(value) != packer.size:
            raise DecodeError(f"{len(value)} bytes instead of {packer.size}")
        return int(packer.unpack(value)[0])

    return Coding(decode, lambda number, _transaction_id: packer.pack(number))


def _address(*, xored: bool) -> Coding[Address]:
    """Zero (8 bits), family (8), port (16), address (32 or 128). RFC 8489 §14.1, §14.2.

    XORed: the port with the first half of the magic cookie, the address with the
    cookie followed by the transaction id.
    """

    def decode(value: bytes, transaction_id: bytes) -> Address:
        if len(value) < 4:
            raise DecodeError(f"{len(value)} bytes are no address")
        size = _ADDRESS_SIZE[_known_family(value[1])]
        if len(value) != 4 + size:
            raise DecodeError(f"{len(value)} bytes instead of {4 + size}")
        plain = _xor(value[2:], transaction_id) if xored else value[2:]
        return unpack_host(plain[2:]), int.from_bytes(plain[:2], "big")

    def encode(address: Address, transaction_id: bytes) -> bytes:
        host, port = address
        packed = pack_host(host)
        family = b"\0\x01" if len(packed) == 4 else b"\0\x02"
        plain = port.to_bytes(2, "big") + packed
        return family + (_xor(plain, transaction_id) if xored else plain)

    return Coding(decode, encode)


def _error_code() -> Coding[tuple[int, str]]:
    """Reserved (21 bits), class (3), number (8), reason phrase. RFC 8489 §14.8."""

    def decode(value: bytes, _transaction_id: bytes) -> tuple[int, str]:
        return _decode_code(value), _decode_reason(value)

    def encode(error: tuple[int, str], _transaction_id: bytes) -> bytes:
        code, reason = error
        return bytes((0, 0, *divmod(code, 100))) + reason.encode()

    return Coding(decode, encode)


def _address_error_code() -> Coding[tuple[Family, int, str]]:
    """As ERROR-CODE, with the family in the first 8 bits. RFC 8656 §18.12."""

    def decode(value: bytes, _transaction_id: bytes) -> tuple[Family, int, str]:
        code = _decode_code(value)
        return _known_family(value[0]), code, _decode_reason(value)

    def encode(error: tuple[Family, int, str], _transaction_id: bytes) -> bytes:
        family, code, reason = error
        return bytes((family, 0, *divmod(code, 100))) + reason.encode()

    return Coding(decode, encode)


def _types() -> Coding[tuple[int, ...]]:
    """Attribute types, 16 bits each. RFC 8489 §14.13."""

    def decode(value: bytes, _transaction_id: bytes) -> tuple[int, ...]:
        if len(value) % 2:
            raise DecodeError("half an attribute type")
        return struct.unpack(f"!{len(value) // 2}H", value)

    def encode(types: tuple[int, ...], _transaction_id: bytes) -> bytes:
        return struct.pack(f"!{len(types)}H", *types)

    return Coding(decode, encode)


def _icmp() -> Coding[tuple[int, int, int]]:
    """Reserved (16 bits), ICMP type (8), ICMP code (8), error data (32). RFC 8656 §18.13.

    The figure there draws 7 and 9 bits; the fields of ICMP itself, and everyone else, have 8.
    """
    layout = struct.Struct("!xxBBI")

    def decode(value: bytes, _transaction_id: bytes) -> tuple[int, int, int]:
        if len(value) != layout.size:
            raise DecodeError(f"{len(value)} bytes instead of {layout.size}")
        kind, code, data = layout.unpack(value)
        return kind, code, data

    return Coding(decode, lambda icmp, _transaction_id: layout.pack(*icmp))


PasswordAlgorithms = tuple[tuple[int, bytes], ...]
"""Numbers of password algorithms, each with its parameters. Those that there are have none."""


def _password_algorithms(*, many: bool) -> Coding[PasswordAlgorithms]:
    """Algorithm, size of parameters (16 bits each), parameters, padded. RFC 8489 §14.11, §14.12."""
    header = struct.Struct("!HH")

    def decode(value: bytes, _transaction_id: bytes) -> PasswordAlgorithms:
        found = []
        offset = 0
        while offset < len(value):
            if len(value) - offset < header.size:
                raise DecodeError("half a password algorithm")
            number, size = header.unpack_from(value, offset)
            offset += header.size
            parameters = value[offset : offset + size]
            if len(parameters) < size:
                raise DecodeError("half of a password algorithm's parameters")
            found.append((number, parameters))
            offset += size + -size % 4
        if not found or (not many and len(found) > 1):
            raise DecodeError(f"{len(found)} password algorithms")
        return tuple(found)

    def encode(algorithms: PasswordAlgorithms, _transaction_id: bytes) -> bytes:
        return b"".join(
            header.pack(number, len(parameters)) + parameters + bytes(-len(parameters) % 4)
            for number, parameters in algorithms
        )

    return Coding(decode, encode)


class Attr:
    """The attributes, by their wire names."""

    MAPPED_ADDRESS = Attribute(0x0001, "MAPPED-ADDRESS", _address(xored=False))
    USERNAME = Attribute(0x0006, "USERNAME", _text(508))
    MESSAGE_INTEGRITY = Attribute(0x0008, "MESSAGE-INTEGRITY", _octets(20))
    ERROR_CODE = Attribute(0x0009, "ERROR-CODE", _error_code())
    UNKNOWN_ATTRIBUTES = Attribute(0x000A, "UNKNOWN-ATTRIBUTES", _types())
    CHANNEL_NUMBER = Attribute(0x000C, "CHANNEL-NUMBER", _number("!Hxx"))
    LIFETIME = Attribute(0x000D, "LIFETIME", _number("!I"))
    XOR_PEER_ADDRESS = Attribute(0x0012, "XOR-PEER-ADDRESS", _address(xored=True), repeatable=True)
    DATA = Attribute(0x0013, "DATA", _octets())
    REALM = Attribute(0x0014, "REALM", _text(763))
    NONCE = Attribute(0x0015, "NONCE", _octets())
    XOR_RELAYED_ADDRESS = Attribute(
        0x0016, "XOR-RELAYED-ADDRESS", _address(xored=True), repeatable=True
    )
    # A family that nobody knows is refused with a code of its own: so these two are plain numbers.
    REQUESTED_ADDRESS_FAMILY = Attribute(0x0017, "REQUESTED-ADDRESS-FAMILY", _number("!Bxxx"))
    EVEN_PORT = Attribute(0x0018, "EVEN-PORT", _number("!B"))
    REQUESTED_TRANSPORT = Attribute(0x0019, "REQUESTED-TRANSPORT", _number("!Bxxx"))
    DONT_FRAGMENT = Attribute(0x001A, "DONT-FRAGMENT", _octets(0))
    MESSAGE_INTEGRITY_SHA256 = Attribute(
        0x001C, "MESSAGE-INTEGRITY-SHA256", _octets(32, 28, 24, 20, 16)
    )
    PASSWORD_ALGORITHM = Attribute(0x001D, "PASSWORD-ALGORITHM", _password_algorithms(many=False))
    USERHASH = Attribute(0x001E, "USERHASH", _octets(32))
    XOR_MAPPED_ADDRESS = Attribute(0x0020, "XOR-MAPPED-ADDRESS", _address(xored=True))
    RESERVATION_TOKEN = Attribute(0x0022, "RESERVATION-TOKEN", _octets(8))
    ADDITIONAL_ADDRESS_FAMILY = Attribute(0x8000, "ADDITIONAL-ADDRESS-FAMILY", _number("!Bxxx"))
    ADDRESS_ERROR_CODE = Attribute(0x8001, "ADDRESS-ERROR-CODE", _address_error_code())
    PASSWORD_ALGORITHMS = Attribute(0x8002, "PASSWORD-ALGORITHMS", _password_algorithms(many=True))
    ICMP = Attribute(0x8004, "ICMP", _icmp())
    SOFTWARE = Attribute(0x8022, "SOFTWARE", _text(763))
    FINGERPRINT = Attribute(0x8028, "FINGERPRINT", _number("!I"))


BY_TYPE: Final[dict[int, Attribute[object]]] = {
    row.type: row for row in vars(Attr).values() if isinstance(row, Attribute)
}


def comprehension_required(attribute_type: int) -> bool:
    """Tell whether a receiver that does not know the type must refuse. RFC 8489 §14."""
    return attribute_type < COMPREHENSION_OPTIONAL


def _known_family(number: int) -> Family:
    family = _FAMILIES.get(number)  # a fifth of what Family(number) takes
    if family is None:
        raise DecodeError(f"unknown address family {number:#04x}")
    return family


def _decode_code(value: bytes) -> int:
    if len(value) < 4:
        raise DecodeError(f"{len(value)} bytes are no error code")
    return (value[2] & 0x07) * 100 + value[3]


def _decode_reason(value: bytes) -> str:
    try:
        return value[4:].decode()
    except UnicodeDecodeError as error:
        raise DecodeError("reason phrase is not UTF-8") from error


def _xor(port_and_host: bytes, transaction_id: bytes) -> bytes:
    """Mask, or unmask, a port and the address behind it."""
    size = len(port_and_host)
    mask = (_COOKIE[:2] + _COOKIE + transaction_id)[:size]
    mixed = int.from_bytes(port_and_host, "big") ^ int.from_bytes(mask, "big")
    return mixed.to_bytes(size, "big")
