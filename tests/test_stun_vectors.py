"""The published test vectors: RFC 5769, and RFC 8489 appendix B."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from relay.stun.attributes import Attr, Attribute, DecodeError
from relay.stun.const import Kind, Method, PasswordAlgorithm
from relay.stun.integrity import (
    INTEGRITY_SIZE,
    long_term_key,
    userhash,
    verify,
    verify_sha256,
)
from relay.stun.message import Message, Received, decode

USERNAME_2_4 = "\u30de\u30c8\u30ea\u30c3\u30af\u30b9"
ICE_KEY = b"VOkJxbRl1RmTxUk/WvJxBt"  # a short-term password is the key itself
# The RFC's password is prepared by SASLprep, with this result.
LONG_TERM_KEY = long_term_key(USERNAME_2_4, "example.org", "TheMatrIX")


@dataclass(frozen=True)
class Vector:
    """What the RFC says that its bytes mean."""

    file: str
    key: bytes
    kind: Kind
    transaction_id: str
    attributes: list[tuple[Attribute[Any], Any]]  # without MESSAGE-INTEGRITY
    fingerprinted: bool
    unknown: tuple[int, ...] = ()


REQUEST = Vector(
    file="rfc5769_2_1_request.hex",
    key=ICE_KEY,
    kind=Kind.REQUEST,
    transaction_id="b7e7a701bc34d686fa87dfae",
    attributes=[
        (Attr.SOFTWARE, "STUN test client"),
        (Attr.USERNAME, "evtj:h6vY"),
    ],
    fingerprinted=True,
    unknown=(0x0024,),  # PRIORITY; ICE-CONTROLLED, 0x8029, is optional
)
IPV4_RESPONSE = Vector(
    file="rfc5769_2_2_ipv4_response.hex",
    key=ICE_KEY,
    kind=Kind.SUCCESS,
    transaction_id="b7e7a701bc34d686fa87dfae",
    attributes=[
        (Attr.SOFTWARE, "test vector"),
        (Attr.XOR_MAPPED_ADDRESS, ("192.0.2.1", 32853)),
    ],
    fingerprinted=True,
)
IPV6_RESPONSE = Vector(
    file="rfc5769_2_3_ipv6_response.hex",
    key=ICE_KEY,
    kind=Kind.SUCCESS,
    transaction_id="b7e7a701bc34d686fa87dfae",
    attributes=[
        (Attr.SOFTWARE, "test vector"),
        (Attr.XOR_MAPPED_ADDRESS, ("2001:db8:1234:5678:11:2233:4455:6677", 32853)),
    ],
    fingerprinted=True,
)
LONG_TERM_REQUEST = Vector(
    file="rfc5769_2_4_long_term_request.hex",
    key=LONG_TERM_KEY,
    kind=Kind.REQUEST,
    transaction_id="78ad3433c6ad72c029da412e",
    attributes=[
        (Attr.USERNAME, USERNAME_2_4),
        (Attr.NONCE, b"f//499k954d6OL34oL9FSTvy64sA"),
        (Attr.REALM, "example.org"),
    ],
    fingerprinted=False,
)

FINGERPRINTED = [
    pytest.param(REQUEST, id="RFC 5769 2.1 request"),
    pytest.param(IPV4_RESPONSE, id="RFC 5769 2.2 IPv4 response"),
    pytest.param(IPV6_RESPONSE, id="RFC 5769 2.3 IPv6 response"),
]
SIGNED = [
    *FINGERPRINTED,
    pytest.param(LONG_TERM_REQUEST, id="RFC 5769 2.4 long-term request"),
]


@pytest.mark.parametrize("vector", SIGNED)
def test_decodes_to_what_the_rfc_says(vector: Vector) -> None:
    received = decode(datagram_of(vector))

    message = received.message
    assert message.kind is vector.kind
    assert message.method == Method.BINDING
    assert message.transaction_id.hex() == vector.transaction_id
    # Of the last one, MESSAGE-INTEGRITY, the value is checked by verifying it.
    assert message.attributes[:-1] == vector.attributes
    assert message.attributes[-1][0] is Attr.MESSAGE_INTEGRITY
    assert received.fingerprinted is vector.fingerprinted
    assert received.unknown == vector.unknown
    assert received.undecodable is None


@pytest.mark.parametrize("vector", SIGNED)
def test_integrity_verifies_under_the_right_key_only(vector: Vector) -> None:
    datagram = datagram_of(vector)

    assert is_signed_with(vector.key, datagram)
    assert not is_signed_with(vector.key + b"?", datagram)


def test_encoding_yields_the_very_bytes_of_the_rfc() -> None:
    """RFC 5769 §2.4, the one that pads with zeros and holds nothing that we cannot write."""
    vector = LONG_TERM_REQUEST
    message = Message(
        vector.kind, Method.BINDING, bytes.fromhex(vector.transaction_id), vector.attributes
    )

    assert message.encode(vector.key) == datagram_of(vector)


@pytest.mark.parametrize("vector", SIGNED)
def test_no_bit_can_be_flipped_under_the_integrity(vector: Vector) -> None:
    """The padding and the attributes that we do not know are covered too. RFC 8489 §14.5."""
    signed = without_fingerprint(datagram_of(vector))
    assert is_signed_with(vector.key, signed)

    accepted = [bit for bit in bits_of(signed) if is_signed_with(vector.key, flipped(signed, bit))]

    assert accepted == []


@pytest.mark.parametrize("vector", FINGERPRINTED)
def test_no_bit_can_be_flipped_under_the_fingerprint(vector: Vector) -> None:
    """RFC 8489 §14.7."""
    datagram = datagram_of(vector)
    assert has_sound_fingerprint(datagram)

    accepted = [bit for bit in bits_of(datagram) if has_sound_fingerprint(flipped(datagram, bit))]

    assert accepted == []


USERNAME_B_1 = "\u30de\u30c8\u30ea\u30c3\u30af\u30b9"
REALM_B_1 = "example.org"
KEY_B_1 = long_term_key(USERNAME_B_1, REALM_B_1, "TheMatrIX", PasswordAlgorithm.SHA_256)


def test_the_request_of_rfc_8489() -> None:
    """RFC 8489 §B.1: MESSAGE-INTEGRITY-SHA256, USERHASH and a key by SHA-256."""
    datagram = read("rfc8489_b_1_sha256_request.hex")
    received = decode(datagram)

    attributes: list[tuple[Attribute[Any], Any]] = [
        (Attr.USERHASH, userhash(USERNAME_B_1, REALM_B_1)),
        (Attr.NONCE, b"obMatJos2AAACf//499k954d6OL34oL9FSTvy64sA"),
        (Attr.REALM, REALM_B_1),
        (Attr.PASSWORD_ALGORITHM, ((PasswordAlgorithm.SHA_256, b""),)),
    ]
    assert received.message.kind is Kind.REQUEST
    assert received.message.method == Method.BINDING
    assert received.message.attributes[:-1] == attributes
    assert received.message.attributes[-1][0] is Attr.MESSAGE_INTEGRITY_SHA256
    assert (received.unknown, received.undecodable) == ((), None)
    assert (received.integrity_offset, received.fingerprinted) == (None, False)
    assert received.sha256_offset is not None
    assert verify_sha256(datagram, received.sha256_offset, KEY_B_1)
    assert not verify_sha256(datagram, received.sha256_offset, KEY_B_1 + b"?")
    message = Message(Kind.REQUEST, Method.BINDING, received.message.transaction_id, attributes)
    assert message.encode(KEY_B_1, sha256=True) == datagram


def test_no_bit_can_be_flipped_under_the_sha256_integrity() -> None:
    def is_signed(datagram: bytes) -> bool:
        received = decoded(datagram)
        if received is None or received.sha256_offset is None:
            return False
        return verify_sha256(received.raw, received.sha256_offset, KEY_B_1)

    datagram = read("rfc8489_b_1_sha256_request.hex")
    assert is_signed(datagram)

    assert [bit for bit in bits_of(datagram) if is_signed(flipped(datagram, bit))] == []


def read(file: str) -> bytes:
    """Return the bytes of a vector: hexadecimal digits, with comments after ``#``."""
    text = (Path(__file__).parent / "vectors" / file).read_text()
    return bytes.fromhex(" ".join(line.partition("#")[0] for line in text.splitlines()))


def datagram_of(vector: Vector) -> bytes:
    return read(vector.file)


def decoded(datagram: bytes) -> Received | None:
    try:
        return decode(datagram)
    except DecodeError:
        return None


def is_signed_with(key: bytes, datagram: bytes) -> bool:
    received = decoded(datagram)
    if received is None or received.integrity_offset is None:
        return False
    return verify(received.raw, received.integrity_offset, key)


def has_sound_fingerprint(datagram: bytes) -> bool:
    received = decoded(datagram)
    return received is not None and received.fingerprinted


def without_fingerprint(datagram: bytes) -> bytes:
    """Cut the message after its MESSAGE-INTEGRITY, so that only the integrity protects it."""
    offset = decode(datagram).integrity_offset
    assert offset is not None
    end = offset + INTEGRITY_SIZE
    return datagram[:2] + (end - 20).to_bytes(2, "big") + datagram[4:end]


def bits_of(datagram: bytes) -> range:
    return range(8 * len(datagram))


def flipped(datagram: bytes, bit: int) -> bytes:
    mask = 1 << bit
    return (int.from_bytes(datagram, "little") ^ mask).to_bytes(len(datagram), "little")
