"""A STUN message as it arrived: one pass over it, and nothing decoded that nobody reads.

A server looks at a few attributes of each request and at none of most that it refuses. So
:func:`read_attributes` only takes the message apart, into one mapping from attribute types to
bytes; :meth:`RawMessage.get` decodes what a handler asks for. How much work that is does not depend
on who sends it: the number of attributes is bounded, and :func:`read_header` looks at none of them.
"""

import struct
from dataclasses import dataclass
from typing import Final, TypeVar

from relay.stun.attributes import (
    BY_TYPE,
    Attr,
    Attribute,
    DecodeError,
    UndecodableAttribute,
    comprehension_required,
)
from relay.stun.const import HEADER_SIZE, MAGIC_COOKIE
from relay.stun.integrity import fingerprint

T = TypeVar("T")

HEADER: Final = struct.Struct("!HHI12s")  # type, length, magic cookie, transaction id
TLV: Final = struct.Struct("!HH")  # type, length without padding
_unpack_header = HEADER.unpack_from
_unpack_tlv = TLV.unpack_from

_CLASS_BITS: Final = 0x0110
# No request that anybody needs has more. 2,048 bytes hold 507 empty attributes, and to look at each
# costs a third of a microsecond: that is what the bound is for.
MAX_PEERS: Final = 16  # XOR-PEER-ADDRESS
MAX_ATTRIBUTES: Final = 32 + MAX_PEERS
_REPEATABLE: Final = frozenset(row.type for row in BY_TYPE.values() if row.repeatable)
_AGAIN: Final = 1 << 16  # what is added to the key of an attribute each time that it comes again
_FINGERPRINT: Final = Attr.FINGERPRINT.type
_INTEGRITY: Final = Attr.MESSAGE_INTEGRITY.type
_INTEGRITY_VALUE_SIZE: Final = 20
_INTEGRITY_SHA256: Final = Attr.MESSAGE_INTEGRITY_SHA256.type
_SHA256_VALUE_SIZES: Final = frozenset(range(16, 33, 4))


class WrongFingerprint(DecodeError):
    """FINGERPRINT does not match: not STUN, or damaged on its way."""


class TooManyAttributes(DecodeError):
    """There are more than :data:`MAX_ATTRIBUTES`. *message* has the first of them."""

    def __init__(self, message: "RawMessage") -> None:
        super().__init__(f"more than {MAX_ATTRIBUTES} attributes")
        self.message = message


@dataclass(slots=True)
class RawMessage:
    """A message from the wire whose frame is sound. What its attributes say may still be nonsense.

    *values* holds the value of each attribute by its type, in the order of their coming, up to
    MESSAGE-INTEGRITY: what follows that is ignored (RFC 8489 §14.5), MESSAGE-INTEGRITY-SHA256 and
    FINGERPRINT aside; of what follows the former only FINGERPRINT counts (§14.6). The first
    occurrence counts (§14); of those that may be repeated the n-th further one lies under the
    type + n * 0x10000.
    """

    type: int  # 16 bits: method and class, interleaved
    transaction_id: bytes  # 12 bytes
    raw: bytes  # the message as received, without what followed it in the datagram
    values: dict[int, bytes]
    integrity_offset: int | None = None  # where MESSAGE-INTEGRITY begins in *raw*
    sha256_offset: int | None = None  # where MESSAGE-INTEGRITY-SHA256 does
    fingerprinted: bool = False
    truncated: bool = False  # an attribute runs past the end of the message

    @property
    def is_signed(self) -> bool:
        """Whether there is a signature of either kind."""
        return self.integrity_offset is not None or self.sha256_offset is not None

    @property
    def message_class(self) -> int:
        """The class: bits C1 (0x100) and C0 (0x010), as :class:`~relay.stun.const.Kind` has it."""
        return self.type & _CLASS_BITS

    @property
    def method(self) -> int:
        """The method, 12 bits: all but C1 and C0. RFC 8489 §5, Figure 3."""
        bits = self.type
        return (bits & 0x000F) | (bits & 0x00E0) >> 1 | (bits & 0x3E00) >> 2

    @property
    def unknown(self) -> tuple[int, ...]:
        """The types that must be understood and are not in the table, each once.

        The keys of repeated attributes are above all of these.
        """
        return tuple(
            kind for kind in self.values if comprehension_required(kind) and kind not in BY_TYPE
        )

    def get(self, attribute: Attribute[T]) -> T | None:
        """Return the first value of *attribute*, or None if the message has none.

        Raises UndecodableAttribute.
        """
        value = self.values.get(attribute.type)
        return None if value is None else self.decoded(attribute, value)

    def get_all(self, attribute: Attribute[T]) -> list[T]:
        """Return every value of *attribute*, in their order. Raises UndecodableAttribute."""
        found: list[T] = []
        key = attribute.type
        while (value := self.values.get(key)) is not None:
            found.append(self.decoded(attribute, value))
            key += _AGAIN
        return found

    def decoded(self, attribute: Attribute[T], value: bytes) -> T:
        """Return what *value* says as one of *attribute*. Raises UndecodableAttribute."""
        try:
            return attribute.coding.decode(value, self.transaction_id)
        except DecodeError as error:
            raise UndecodableAttribute(f"{attribute}: {error}") from None


Header = tuple[int, int, bytes]
"""What a STUN header says: type, length of the message with its header, transaction id."""


def read_header(datagram: bytes) -> Header | None:
    """Read the header of a datagram that should be STUN, or return None if it is not."""
    size = len(datagram)
    if size < HEADER_SIZE:
        return None
    message_type, length, cookie, transaction_id = _unpack_header(datagram)
    if message_type & 0xC000 or cookie != MAGIC_COOKIE or length % 4 or length > size - HEADER_SIZE:
        return None
    return message_type, HEADER_SIZE + length, transaction_id


def is_request(header: Header) -> bool:
    """Tell if a message is a request: bits C1 (0x100) and C0 (0x010) are clear. RFC 8489 §5."""
    return not header[0] & _CLASS_BITS


def read(datagram: bytes) -> RawMessage:
    """Take a datagram apart that should be STUN. Bytes after the message are ignored.

    Raises DecodeError if it is no STUN message, and what :func:`read_attributes` does.
    """
    header = read_header(datagram)
    if header is None:
        raise DecodeError("not STUN: too short, no magic cookie, or a wrong length")
    return read_attributes(datagram, header)


def read_attributes(datagram: bytes, header: Header) -> RawMessage:
    """Take a datagram apart that has a sound *header*. Bytes after the message are ignored.

    Raises WrongFingerprint or TooManyAttributes.
    """
    message_type, size, transaction_id = header
    message = RawMessage(message_type, transaction_id, datagram[:size], {})
    _read_attributes(message)
    return message


def type_of(key: int) -> int:
    """Return the attribute type of a key of :attr:`RawMessage.values`."""
    return key % _AGAIN


def _read_attributes(message: RawMessage) -> None:
    raw, values = message.raw, message.values
    repeated: dict[int, int] = {}  # how often, by type
    offset, end, left = HEADER_SIZE, len(raw), MAX_ATTRIBUTES
    is_signed = False
    while offset < end:  # at least four bytes are left: everything is a multiple of four
        if not left:
            raise TooManyAttributes(message)
        left -= 1
        key, size = _unpack_tlv(raw, offset)
        value_end = offset + 4 + size
        if value_end > end:
            message.truncated = not message.is_signed
            return
        value = raw[offset + 4 : value_end]
        if key == _FINGERPRINT:
            if value != fingerprint(raw[:offset]).to_bytes(4, "big"):
                raise WrongFingerprint("FINGERPRINT does not match")
            message.fingerprinted = True
            return  # it is the last attribute, RFC 8489 §14.7
        if key == _INTEGRITY_SHA256:
            if message.sha256_offset is None and key not in values:
                values[key] = value
                if size in _SHA256_VALUE_SIZES:
                    message.sha256_offset = offset
                    is_signed = True
        elif not is_signed:
            if key not in values:
                values[key] = value
                if key == _INTEGRITY and size == _INTEGRITY_VALUE_SIZE:
                    message.integrity_offset = offset
                    is_signed = True
            elif key in _REPEATABLE:
                times = repeated[key] = repeated.get(key, 0) + 1
                values[key + times * _AGAIN] = value
        offset = value_end + -size % 4
