"""STUN messages: written to bytes, and read with all that they hold. RFC 8489 §5, §6."""

from dataclasses import dataclass, field
from typing import Any, TypeVar

from relay.stun.attributes import BY_TYPE, Attr, Attribute, UndecodableAttribute
from relay.stun.const import MAGIC_COOKIE, Kind
from relay.stun.integrity import (
    FINGERPRINT_SIZE,
    INTEGRITY_SHA256_SIZE,
    INTEGRITY_SIZE,
    fingerprint,
    integrity,
    integrity_sha256,
)
from relay.stun.raw import HEADER, TLV, RawMessage, read, type_of

T = TypeVar("T")
_PADDING = (b"", bytes(3), bytes(2), bytes(1))  # by size modulo 4
_INTEGRITY_HEADER = TLV.pack(Attr.MESSAGE_INTEGRITY.type, INTEGRITY_SIZE - 4)
_SHA256_HEADER = TLV.pack(Attr.MESSAGE_INTEGRITY_SHA256.type, INTEGRITY_SHA256_SIZE - 4)
_FINGERPRINT_HEADER = TLV.pack(Attr.FINGERPRINT.type, FINGERPRINT_SIZE - 4)


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

    def encode(
        self, key: bytes | None = None, *, sha256: bool = False, fingerprinted: bool = False
    ) -> bytes:
        """Return the datagram: signed if *key* is given, then closed by a FINGERPRINT if asked.

        *sha256*: by MESSAGE-INTEGRITY-SHA256 instead of MESSAGE-INTEGRITY.
        """
        transaction_id = self.transaction_id
        message_type = _message_type(self.kind, self.method)
        datagram = bytearray(HEADER.pack(message_type, 0, MAGIC_COOKIE, transaction_id))
        for attribute, value in self.attributes:
            encoded = attribute.coding.encode(value, transaction_id)
            size = len(encoded)
            datagram += TLV.pack(attribute.type, size) + encoded + _PADDING[size % 4]
        length = len(datagram) - HEADER.size
        if key is not None and sha256:
            datagram += _SHA256_HEADER + integrity_sha256(datagram, key)
            length += INTEGRITY_SHA256_SIZE
        elif key is not None:
            datagram += _INTEGRITY_HEADER + integrity(datagram, key)
            length += INTEGRITY_SIZE
        if fingerprinted:
            length += FINGERPRINT_SIZE
        datagram[2:4] = length.to_bytes(2, "big")
        if fingerprinted:
            datagram += _FINGERPRINT_HEADER + fingerprint(datagram).to_bytes(4, "big")
        return bytes(datagram)


@dataclass(slots=True)
class Received:
    """A message from the wire with every attribute decoded, for a client that reads an answer."""

    message: Message
    raw: bytes  # the message as received, without what followed it in the datagram
    integrity_offset: int | None  # where MESSAGE-INTEGRITY begins in *raw*
    sha256_offset: int | None  # where MESSAGE-INTEGRITY-SHA256 does
    fingerprinted: bool
    unknown: tuple[int, ...]  # comprehension-required types that are not in the table
    undecodable: str | None  # the first attribute whose value makes no sense, and why


def decode(datagram: bytes) -> Received:
    """Read a datagram that should be STUN, and decode all attributes that are in the table.

    For clients. A server decodes what it needs: :func:`relay.stun.raw.read`.

    Raises what :func:`~relay.stun.raw.read` does. A bad value within a sound frame raises
    nothing: it is left out of the message, and reported as *undecodable*.
    """
    raw = read(datagram)
    message = Message(Kind(raw.message_class), raw.method, raw.transaction_id)
    undecodable = _decode_attributes(raw, message)
    if raw.truncated:
        undecodable = undecodable or "an attribute runs past the end"
    return Received(
        message,
        raw.raw,
        raw.integrity_offset,
        raw.sha256_offset,
        raw.fingerprinted,
        raw.unknown,
        undecodable,
    )


def _decode_attributes(raw: RawMessage, message: Message) -> str | None:
    """Decode what is in the table; return what is wrong with the first that makes no sense."""
    undecodable = None
    for key, value in raw.values.items():
        attribute = BY_TYPE.get(type_of(key))
        if attribute is not None:
            try:
                message.attributes.append((attribute, raw.decoded(attribute, value)))
            except UndecodableAttribute as error:
                undecodable = undecodable or str(error)
    return undecodable


def _message_type(kind: Kind, method: int) -> int:
    """Interleave class and method: M11-M7, C1, M6-M4, C0, M3-M0. RFC 8489 §5, Figure 3."""
    return kind | (method & 0x00F) | (method & 0x070) << 1 | (method & 0xF80) << 2
