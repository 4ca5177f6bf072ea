"""STUN messages: the header, the walk over the attributes, and back to bytes. RFC 8489 §5, §6."""

import struct
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from relay.stun.attributes import BY_TYPE, Attr, Attribute, DecodeError, comprehension_required
from relay.stun.const import HEADER_SIZE, MAGIC_COOKIE, Kind
from relay.stun.integrity import FINGERPRINT_SIZE, INTEGRITY_SIZE, fingerprint, integrity

T = TypeVar("T")

_HEADER: Final = struct.Struct("!HHI12s")  # type, length, magic cookie, transaction id
_TLV: Final = struct.Struct("!HH")  # type, length without padding
_KIND_BITS: Final = 0x0110


class WrongFingerprint(DecodeError):
    """FINGERPRINT does not match: not STUN, or damaged on its way."""


@dataclass(slots=True)
class Message:
    """One STUN message. *attributes* keep the order in which they are written."""

    kind: Kind
    method: int  # 12 bits; Method names those in use
    transaction_id: bytes  # 12 bytes
    attributes: list[tuple[Attribute[Any], Any]] = field(default_factory=list)

    def get(self, attribute: Attribute[T]) -> T | None:
        """Return the first value of *attribute*, or None if the message has none."""
        for present, value in self.attributes:
            if present is attribute:
                found: T = value
                return found
        return None

    def get_all(self, attribute: Attribute[T]) -> list[T]:
        """Return every value of *attribute*, in their order."""
        return [value for present, value in self.attributes if present is attribute]

    def encode(self, key: bytes | None = None, *, fingerprinted: bool = False) -> bytes:
        """Return the datagram: signed if *key* is given, then closed by a FINGERPRINT if asked."""
        body = bytearray()
        for attribute, value in self.attributes:
            body += _tlv(attribute.type, attribute.coding.encode(value, self.transaction_id))
        trailer = fingerprinted * FINGERPRINT_SIZE
        if key is not None:
            trailer += INTEGRITY_SIZE
        header = _HEADER.pack(
            _message_type(self.kind, self.method),
            len(body) + trailer,
            MAGIC_COOKIE,
            self.transaction_id,
        )
        datagram = header + body
        if key is not None:
            datagram += _tlv(Attr.MESSAGE_INTEGRITY.type, integrity(datagram, key))
        if fingerprinted:
            datagram += _tlv(Attr.FINGERPRINT.type, struct.pack("!I", fingerprint(datagram)))
        return datagram


@dataclass(slots=True)
class Received:
    """A message from the wire, with what its answer depends on besides its content."""

    message: Message
    raw: bytes  # the message as received, without what followed it in the datagram
    integrity_offset: int | None  # where MESSAGE-INTEGRITY begins in *raw*
    fingerprinted: bool
    unknown: tuple[int, ...]  # comprehension-required types that are not in the table
    undecodable: str | None  # the first attribute whose value makes no sense, and why


def decode(datagram: bytes) -> Received:
    """Read a datagram that should be STUN. Bytes after the message are ignored.

    The first occurrence of an attribute counts, unless its row says that it is repeatable;
    what follows MESSAGE-INTEGRITY is ignored, FINGERPRINT aside (RFC 8489 §14, §14.5).

    Raises DecodeError if it is no STUN message, WrongFingerprint if its FINGERPRINT
    does not match. A bad value within a sound frame raises nothing: the sender of such
    a request is told, so it is reported as *undecodable*.
    """
    if len(datagram) < HEADER_SIZE:
        raise DecodeError("shorter than a STUN header")
    message_type, length, cookie, transaction_id = _HEADER.unpack_from(datagram)
    if message_type & 0xC000 or cookie != MAGIC_COOKIE:
        raise DecodeError("not STUN")
    if length % 4 or length > len(datagram) - HEADER_SIZE:
        raise DecodeError("length does not match")
    end = HEADER_SIZE + length
    received = Received(
        Message(_kind(message_type), _method(message_type), transaction_id),
        raw=datagram[:end],
        integrity_offset=None,
        fingerprinted=False,
        unknown=(),
        undecodable=None,
    )
    _read_attributes(received)
    return received


def _read_attributes(received: Received) -> None:
    raw, attributes = received.raw, received.message.attributes
    transaction_id = received.message.transaction_id
    unknown: dict[int, None] = {}  # an ordered set: there may be thousands
    seen: set[Attribute[Any]] = set()
    offset, end = HEADER_SIZE, len(raw)
    while offset < end:  # at least four bytes are left: everything is a multiple of four
        attribute_type, size = _TLV.unpack_from(raw, offset)
        value = raw[offset + 4 : offset + 4 + size]
        attribute = BY_TYPE.get(attribute_type)
        if len(value) < size:
            if received.integrity_offset is None:
                received.undecodable = received.undecodable or "an attribute runs past the end"
            break
        if attribute is Attr.FINGERPRINT:
            _check_fingerprint(raw[:offset], value)
            received.fingerprinted = True
            break  # it is the last attribute, RFC 8489 §14.7
        if received.integrity_offset is not None or attribute in seen:
            pass
        elif attribute is not None:
            if not attribute.repeatable:
                seen.add(attribute)
            try:
                attributes.append((attribute, attribute.coding.decode(value, transaction_id)))
            except DecodeError as error:
                received.undecodable = received.undecodable or f"{attribute}: {error}"
            else:
                if attribute is Attr.MESSAGE_INTEGRITY:
                    received.integrity_offset = offset
        elif comprehension_required(attribute_type):
            unknown[attribute_type] = None
        offset += 4 + size + -size % 4
    received.unknown = tuple(unknown)


def _check_fingerprint(covered: bytes, value: bytes) -> None:
    if value != struct.pack("!I", fingerprint(covered)):
        raise WrongFingerprint("FINGERPRINT does not match")


def _message_type(kind: Kind, method: int) -> int:
    """Interleave class and method: M11-M7, C1, M6-M4, C0, M3-M0. RFC 8489 §5, Figure 3."""
    return kind | (method & 0x00F) | (method & 0x070) << 1 | (method & 0xF80) << 2


def _kind(message_type: int) -> Kind:
    return Kind(message_type & _KIND_BITS)


def _method(message_type: int) -> int:
    return (message_type & 0x000F) | (message_type & 0x00E0) >> 1 | (message_type & 0x3E00) >> 2


def _tlv(attribute_type: int, value: bytes) -> bytes:
    return _TLV.pack(attribute_type, len(value)) + value + bytes(-len(value) % 4)
