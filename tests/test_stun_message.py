"""STUN messages: bytes to messages and back. RFC 8489 §5, §6, §14.

Malformed messages are written by hand here, so that encoder and decoder cannot agree on an error.
"""

import struct
import zlib
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.stun.address import Address, unpack_host
from relay.stun.attributes import (
    BY_TYPE,
    Attr,
    Attribute,
    DecodeError,
    UndecodableAttribute,
    comprehension_required,
)
from relay.stun.const import Family, Kind, Method
from relay.stun.integrity import verify
from relay.stun.message import Message, decode
from relay.stun.raw import MAX_ATTRIBUTES, TooManyAttributes, WrongFingerprint, read

COOKIE: Final = 0x2112A442
TRANSACTION_ID: Final = bytes(range(12))
KEY: Final = b"0123456789abcdef"

Pairs = list[tuple[int, bytes]]  # attributes as they are written: type and value


# --- The header. RFC 8489 §5 ---------------------------------------------------------------

TYPES = [
    pytest.param(0x0001, Kind.REQUEST, Method.BINDING, id="Binding request"),
    pytest.param(0x0011, Kind.INDICATION, Method.BINDING, id="Binding indication"),
    pytest.param(0x0101, Kind.SUCCESS, Method.BINDING, id="Binding success"),
    pytest.param(0x0111, Kind.ERROR, Method.BINDING, id="Binding error"),
    pytest.param(0x0003, Kind.REQUEST, Method.ALLOCATE, id="Allocate request"),
    pytest.param(0x0103, Kind.SUCCESS, Method.ALLOCATE, id="Allocate success"),
    pytest.param(0x0113, Kind.ERROR, Method.ALLOCATE, id="Allocate error"),
    pytest.param(0x0004, Kind.REQUEST, Method.REFRESH, id="Refresh request"),
    pytest.param(0x0104, Kind.SUCCESS, Method.REFRESH, id="Refresh success"),
    pytest.param(0x0114, Kind.ERROR, Method.REFRESH, id="Refresh error"),
    pytest.param(0x0016, Kind.INDICATION, Method.SEND, id="Send indication"),
    pytest.param(0x0017, Kind.INDICATION, Method.DATA, id="Data indication"),
    pytest.param(0x0008, Kind.REQUEST, Method.CREATE_PERMISSION, id="CreatePermission request"),
    pytest.param(0x0118, Kind.ERROR, Method.CREATE_PERMISSION, id="CreatePermission error"),
    pytest.param(0x0009, Kind.REQUEST, Method.CHANNEL_BIND, id="ChannelBind request"),
    pytest.param(0x0109, Kind.SUCCESS, Method.CHANNEL_BIND, id="ChannelBind success"),
    pytest.param(0x0119, Kind.ERROR, Method.CHANNEL_BIND, id="ChannelBind error"),
    pytest.param(0x000F, Kind.REQUEST, 0x00F, id="M3 to M0"),
    pytest.param(0x0020, Kind.REQUEST, 0x010, id="M4, above C0"),
    pytest.param(0x0080, Kind.REQUEST, 0x040, id="M6, below C1"),
    pytest.param(0x0200, Kind.REQUEST, 0x080, id="M7, above C1"),
    pytest.param(0x2000, Kind.REQUEST, 0x800, id="M11"),
    pytest.param(0x3EEF, Kind.REQUEST, 0xFFF, id="the whole method"),
    pytest.param(0x3FFF, Kind.ERROR, 0xFFF, id="the whole type"),
]


@pytest.mark.parametrize(("message_type", "kind", "method"), TYPES)
def test_class_bits_lie_between_the_bits_of_the_method(
    message_type: int, kind: Kind, method: int
) -> None:
    """M11 to M7, C1, M6 to M4, C0, M3 to M0: RFC 8489 §5, Figure 3."""
    datagram = header(message_type=message_type)
    message = decode(datagram).message

    assert message.kind is kind
    assert message.method == method
    assert message.transaction_id == TRANSACTION_ID
    assert Message(kind, method, TRANSACTION_ID).encode() == datagram


def test_every_type_is_one_method_and_one_class() -> None:
    seen = set()
    for message_type in range(0x4000):
        datagram = header(message_type=message_type)
        message = decode(datagram).message
        seen.add((message.kind, message.method))
        assert Message(message.kind, message.method, TRANSACTION_ID).encode() == datagram
    assert len(seen) == 0x4000


REFUSED = [
    pytest.param("", id="empty"),
    pytest.param("00", id="one byte"),
    pytest.param("0001 0000 2112a442 000102030405060708090a", id="19 bytes"),
    pytest.param("0001 0000 2112a443 000102030405060708090a0b", id="cookie wrong"),
    pytest.param("0001 0000 a1b2c3d4 000102030405060708090a0b", id="no cookie, as in RFC 3489"),
    pytest.param("0100 0000 42a41221 000102030405060708090a0b", id="little-endian"),
    pytest.param("0001 0001 2112a442 000102030405060708090a0b 00", id="length 1"),
    pytest.param("0001 0002 2112a442 000102030405060708090a0b 0000", id="length 2"),
    pytest.param("0001 0003 2112a442 000102030405060708090a0b 000000", id="length 3"),
    pytest.param(
        "0001 0006 2112a442 000102030405060708090a0b 8022000200000000", id="length 6 of 8"
    ),
    pytest.param("0001 0004 2112a442 000102030405060708090a0b", id="length beyond the datagram"),
    pytest.param(
        "0001 0008 2112a442 000102030405060708090a0b 80220003 414243", id="last byte missing"
    ),
    pytest.param("0001 fffc 2112a442 000102030405060708090a0b", id="greatest length"),
    pytest.param("4001 0000 2112a442 000102030405060708090a0b", id="second bit set"),
    pytest.param("8001 0000 2112a442 000102030405060708090a0b", id="first bit set"),
    pytest.param("c001 0000 2112a442 000102030405060708090a0b", id="both bits set"),
]


@pytest.mark.parametrize("datagram", REFUSED)
def test_what_is_not_stun_is_refused(datagram: str) -> None:
    with pytest.raises(DecodeError) as refusal:
        decode(bytes.fromhex(datagram))

    assert refusal.type is DecodeError  # and not WrongFingerprint: it is counted elsewhere


def test_bytes_after_the_message_are_ignored() -> None:
    """Even those that look like an attribute, or like a wrong FINGERPRINT."""
    datagram = stun((0x0006, b"alice"))
    received = decode(datagram + tlv(0x0014, b"firezone") + tlv(0x8028, bytes(4)) + b"\xff")

    assert received.message.attributes == [(Attr.USERNAME, "alice")]
    assert received.raw == datagram
    assert not received.fingerprinted


# --- The walk over the attributes. RFC 8489 §14 --------------------------------------------

ACCEPTED = [
    pytest.param([], [], id="none"),
    pytest.param([(0x0006, b"")], [(Attr.USERNAME, "")], id="empty value"),
    pytest.param([(0x0006, b"a" * 508)], [(Attr.USERNAME, "a" * 508)], id="longest USERNAME"),
    pytest.param([(0x0014, b"a" * 763)], [(Attr.REALM, "a" * 763)], id="longest REALM"),
    pytest.param([(0x8022, b"a" * 763)], [(Attr.SOFTWARE, "a" * 763)], id="longest SOFTWARE"),
    pytest.param([(0x0015, b"\xff\xfe")], [(Attr.NONCE, b"\xff\xfe")], id="NONCE is not text"),
    pytest.param(
        [(0x000C, b"\x40\x01\xff\xff")],
        [(Attr.CHANNEL_NUMBER, 0x4001)],
        id="reserved bits of CHANNEL-NUMBER ignored",
    ),
    pytest.param(
        [(0x0019, b"\x11\xff\xff\xff")],
        [(Attr.REQUESTED_TRANSPORT, 17)],
        id="reserved bits of REQUESTED-TRANSPORT ignored",
    ),
    pytest.param(
        [(0x0017, b"\x02\xff\xff\xff")],
        [(Attr.REQUESTED_ADDRESS_FAMILY, Family.IPV6)],
        id="reserved bits of REQUESTED-ADDRESS-FAMILY ignored",
    ),
    pytest.param(
        [(0x8000, b"\x02\xff\xff\xff")],
        [(Attr.ADDITIONAL_ADDRESS_FAMILY, Family.IPV6)],
        id="reserved bits of ADDITIONAL-ADDRESS-FAMILY ignored",
    ),
    pytest.param(
        [(0x0001, b"\xff\x01\x0d\x96\xc0\x00\x02\x01")],
        [(Attr.MAPPED_ADDRESS, ("192.0.2.1", 3478))],
        id="first byte of an address ignored",
    ),
    pytest.param(
        # Port ^ 0x2112, address ^ 0x2112a442.
        [(0x0012, b"\x00\x01\x2c\x84\xe1\x12\xa6\x43")],
        [(Attr.XOR_PEER_ADDRESS, ("192.0.2.1", 3478))],
        id="IPv4 address XORed with the cookie",
    ),
    pytest.param(
        # 2001:db8::1 ^ the cookie and the transaction id.
        [(0x0012, bytes.fromhex("0002 2c84 0113a9fa 00010203 04050607 08090a0a"))],
        [(Attr.XOR_PEER_ADDRESS, ("2001:db8::1", 3478))],
        id="IPv6 address XORed with cookie and transaction id",
    ),
    pytest.param(
        [(0x0009, b"\xff\xff\xfc\x26Stale Nonce")],
        [(Attr.ERROR_CODE, (438, "Stale Nonce"))],
        id="reserved bits of ERROR-CODE ignored",
    ),
    pytest.param(
        [(0x8001, b"\x02\xff\xfc\x28")],
        [(Attr.ADDRESS_ERROR_CODE, (Family.IPV6, 440, ""))],
        id="reserved bits of ADDRESS-ERROR-CODE ignored",
    ),
    pytest.param(
        [(0x000A, b"\x00\x18\x7f\xff")],
        [(Attr.UNKNOWN_ATTRIBUTES, (0x0018, 0x7FFF))],
        id="UNKNOWN-ATTRIBUTES",
    ),
    pytest.param(
        [(0x000D, b"\x00\x00\x00\x01"), (0x0006, b"alice"), (0x000D, b"\x00\x00\x00\x02")],
        [(Attr.LIFETIME, 1), (Attr.USERNAME, "alice")],
        id="first occurrence counts",
    ),
    pytest.param(
        [(0x000D, b"\x00\x00\x00\x01"), (0x000D, b"?")],
        [(Attr.LIFETIME, 1)],
        id="second occurrence may be nonsense",
    ),
    pytest.param(
        [(0x8023, b"?"), (0x0006, b"alice"), (0xFFFF, b"")],
        [(Attr.USERNAME, "alice")],
        id="unknown, but optional, ones are skipped",
    ),
]


@pytest.mark.parametrize(("pairs", "attributes"), ACCEPTED)
def test_attributes_are_read(pairs: Pairs, attributes: list[Any]) -> None:
    received = decode(stun(*pairs))

    assert received.message.attributes == attributes
    assert received.undecodable is None
    assert received.unknown == ()


def test_padding_may_hold_anything() -> None:
    """RFC 8489 §14: "The padding bits ... MUST be ignored by the receiver"."""
    body = b"\x00\x06\x00\x05alice\xff\xff\xff" + tlv(0x0014, b"firezone")

    assert decode(header(body)).message.attributes == [
        (Attr.USERNAME, "alice"),
        (Attr.REALM, "firezone"),
    ]


REPEATABLE = [
    # One CreatePermission installs several permissions. RFC 8656 §10.1.
    pytest.param(Attr.XOR_PEER_ADDRESS, id="peers"),
    # A dual allocation has one in each family. RFC 8656 §7.2.
    pytest.param(Attr.XOR_RELAYED_ADDRESS, id="relayed addresses"),
]


@pytest.mark.parametrize("attribute", REPEATABLE)
def test_some_attributes_may_repeat(attribute: Attribute[Address]) -> None:
    values = [("192.0.2.1", 1), ("2001:db8::1", 2), ("192.0.2.1", 1)]
    pairs = [(attribute, value) for value in values]
    datagram = Message(Kind.REQUEST, Method.CREATE_PERMISSION, TRANSACTION_ID, pairs).encode()
    message = decode(datagram).message

    assert message.get_all(attribute) == values
    assert message.get(attribute) == values[0]
    assert message.get(Attr.LIFETIME) is None
    assert message.get_all(Attr.LIFETIME) == []


def test_repeated_attributes_keep_their_order() -> None:
    values = [("192.0.2.1", port) for port in range(MAX_ATTRIBUTES)]
    pairs = [(Attr.XOR_PEER_ADDRESS, value) for value in values]
    datagram = Message(Kind.REQUEST, Method.CREATE_PERMISSION, TRANSACTION_ID, pairs).encode()

    assert read(datagram).get_all(Attr.XOR_PEER_ADDRESS) == values


@pytest.mark.parametrize("attribute_type", [0x0012, 0x8022, 0x7FFF, 0x0008], ids=hex)
def test_no_more_attributes_are_looked_at_than_anybody_needs(attribute_type: int) -> None:
    """Wherever they stand, and whether or not they count: each is work."""
    read(stun(*[(attribute_type, b"")] * MAX_ATTRIBUTES))
    with pytest.raises(TooManyAttributes):
        read(stun(*[(attribute_type, b"")] * (MAX_ATTRIBUTES + 1)))


def test_only_what_is_asked_for_is_decoded() -> None:
    """A server refuses most of what it gets before it looks at the attributes."""
    raw = read(stun((0x000D, b"?"), (0x0006, b"alice"), (0x0008, bytes(19))))

    assert raw.get(Attr.USERNAME) == "alice"
    assert raw.get(Attr.REALM) is None
    with pytest.raises(UndecodableAttribute, match=r"^LIFETIME: 1 bytes instead of 4$"):
        raw.get(Attr.LIFETIME)
    with pytest.raises(UndecodableAttribute, match=r"^MESSAGE-INTEGRITY: 19 bytes"):
        raw.get(Attr.MESSAGE_INTEGRITY)
    assert raw.integrity_offset is None


UNKNOWN = [
    pytest.param([(0x7FFF, b"")], (0x7FFF,), id="greatest type that must be understood"),
    pytest.param([(0x8FFF, b"")], (), id="a type that need not be"),
    pytest.param([(0x0000, b"")], (0x0000,), id="type 0"),
    pytest.param(
        [(0x002A, bytes(4)), (0x0002, bytes(8)), (0x0024, bytes(4))],
        (0x002A, 0x0002, 0x0024),
        id="CONNECTION-ID, RESPONSE-ADDRESS, PRIORITY, as they come",
    ),
    pytest.param([(0x7001, b""), (0x7000, b""), (0x7001, b"")], (0x7001, 0x7000), id="each once"),
]


@pytest.mark.parametrize(("pairs", "unknown"), UNKNOWN)
def test_unknown_attributes_are_listed(pairs: Pairs, unknown: tuple[int, ...]) -> None:
    """RFC 8489 §6.3.1."""
    received = decode(stun(*pairs, (0x0006, b"alice")))

    assert received.unknown == unknown
    assert received.undecodable is None
    assert received.message.attributes == [(Attr.USERNAME, "alice")]


ADDRESSES = (
    Attr.MAPPED_ADDRESS,
    Attr.XOR_PEER_ADDRESS,
    Attr.XOR_RELAYED_ADDRESS,
    Attr.XOR_MAPPED_ADDRESS,
)
UNDECODABLE = [
    *(
        pytest.param(row, (b"\x00\x01" + bytes(18))[:size], id=f"{row} IPv4 of {size} bytes")
        for row in ADDRESSES
        for size in (0, 1, 2, 3, 4, 7, 9, 12, 20)
    ),
    *(
        pytest.param(row, (b"\x00\x02" + bytes(22))[:size], id=f"{row} IPv6 of {size} bytes")
        for row in ADDRESSES
        for size in (4, 8, 19, 21, 24)
    ),
    *(
        pytest.param(row, bytes((0, family)) + bytes(size), id=f"{row} of family {family}")
        for row in ADDRESSES
        for family, size in ((0, 6), (3, 6), (0, 18), (255, 18))
    ),
    *(
        pytest.param(row, b"\x01" * size, id=f"{row} of {size} bytes")
        for row in (
            Attr.LIFETIME,
            Attr.CHANNEL_NUMBER,
            Attr.REQUESTED_TRANSPORT,
            Attr.REQUESTED_ADDRESS_FAMILY,
            Attr.ADDITIONAL_ADDRESS_FAMILY,
        )
        for size in (0, 1, 2, 3, 5, 8)
    ),
    *(
        pytest.param(Attr.MESSAGE_INTEGRITY, bytes(size), id=f"MESSAGE-INTEGRITY of {size} bytes")
        for size in (0, 19, 21, 32)
    ),
    *(
        pytest.param(row, value, id=f"{row} {what}")
        for row in (Attr.USERNAME, Attr.REALM, Attr.SOFTWARE)
        for value, what in (
            (b"\xff", "not UTF-8"),
            (b"caf\xc3", "cut within a character"),
            (b"\xed\xa0\x80", "with a surrogate"),
        )
    ),
    pytest.param(Attr.USERNAME, b"a" * 509, id="USERNAME too long"),
    pytest.param(Attr.REALM, b"a" * 764, id="REALM too long"),
    pytest.param(Attr.SOFTWARE, b"a" * 764, id="SOFTWARE too long"),
    *(
        pytest.param(row, bytes(size), id=f"{row} of {size} bytes")
        for row in (Attr.ERROR_CODE, Attr.ADDRESS_ERROR_CODE)
        for size in (0, 3)
    ),
    pytest.param(Attr.ERROR_CODE, b"\x00\x00\x04\x01\xff", id="reason phrase not UTF-8"),
    pytest.param(Attr.ADDRESS_ERROR_CODE, b"\x00\x00\x04\x28", id="ADDRESS-ERROR-CODE family"),
    pytest.param(Attr.ADDRESS_ERROR_CODE, b"\x01\x00\x04\x28\xff", id="its phrase not UTF-8"),
    pytest.param(Attr.UNKNOWN_ATTRIBUTES, b"\x00\x18\x00", id="half an unknown attribute"),
]


@pytest.mark.parametrize(("attribute", "value"), UNDECODABLE)
def test_a_value_without_sense_is_reported(attribute: Attribute[Any], value: bytes) -> None:
    """By name, so that the sender can be answered; the rest of the message is there."""
    received = decode(
        stun((0x7FFF, b""), (attribute.type, value), (0x0015, b"nonce"), (0x000D, b"?"))
    )

    assert received.undecodable is not None
    assert received.undecodable.startswith(f"{attribute.name}: ")
    assert received.message.attributes == [(Attr.NONCE, b"nonce")]
    assert received.unknown == (0x7FFF,)
    assert received.integrity_offset is None


PAST_THE_END = [
    pytest.param("0006 0001", id="nothing left"),
    pytest.param("0006 0005 616c6963", id="one byte missing"),
    pytest.param("0006 ffff 616c6963", id="greatest size"),
    pytest.param("7fff 0005 00000000", id="an unknown one"),
    pytest.param("8028 0005 00000000", id="FINGERPRINT"),
    pytest.param("0008 0014 00000000", id="MESSAGE-INTEGRITY"),
]


@pytest.mark.parametrize("attribute", PAST_THE_END)
def test_an_attribute_that_runs_past_the_end_is_reported(attribute: str) -> None:
    received = decode(header(tlv(0x0015, b"nonce") + bytes.fromhex(attribute)))

    assert received.undecodable == "an attribute runs past the end"
    assert received.message.attributes == [(Attr.NONCE, b"nonce")]
    assert received.integrity_offset is None
    assert not received.fingerprinted


def test_types_from_0x8000_need_not_be_understood() -> None:
    """RFC 8489 §14."""
    assert comprehension_required(0x0000)
    assert comprehension_required(0x7FFF)
    assert not comprehension_required(0x8000)
    assert not comprehension_required(0xFFFF)


WRITTEN = [
    pytest.param(Attr.USERNAME, "alice", b"alice", id="text"),
    pytest.param(Attr.CHANNEL_NUMBER, 0x4001, b"\x40\x01\x00\x00", id="CHANNEL-NUMBER"),
    pytest.param(Attr.LIFETIME, 600, b"\x00\x00\x02\x58", id="LIFETIME"),
    pytest.param(Attr.REQUESTED_TRANSPORT, 17, b"\x11\x00\x00\x00", id="REQUESTED-TRANSPORT"),
    pytest.param(
        Attr.REQUESTED_ADDRESS_FAMILY, Family.IPV6, b"\x02\x00\x00\x00", id="address family"
    ),
    pytest.param(
        Attr.MAPPED_ADDRESS,
        ("192.0.2.1", 3478),
        b"\x00\x01\x0d\x96\xc0\x00\x02\x01",
        id="address",
    ),
    pytest.param(
        Attr.XOR_MAPPED_ADDRESS,
        ("192.0.2.1", 3478),
        b"\x00\x01\x2c\x84\xe1\x12\xa6\x43",
        id="XORed address",
    ),
    pytest.param(Attr.ERROR_CODE, (438, "Stale"), b"\x00\x00\x04\x26Stale", id="ERROR-CODE"),
    pytest.param(
        Attr.ADDRESS_ERROR_CODE,
        (Family.IPV6, 440, "None"),
        b"\x02\x00\x04\x28None",
        id="ADDRESS-ERROR-CODE",
    ),
    pytest.param(
        Attr.UNKNOWN_ATTRIBUTES, (0x0018, 0x7FFF), b"\x00\x18\x7f\xff", id="UNKNOWN-ATTRIBUTES"
    ),
]


@pytest.mark.parametrize(("attribute", "value", "written"), WRITTEN)
def test_attributes_are_written(attribute: Attribute[Any], value: Any, written: bytes) -> None:
    """Reserved bits and padding are zero."""
    message = Message(Kind.REQUEST, Method.BINDING, TRANSACTION_ID, [(attribute, value)])

    assert message.encode() == stun((attribute.type, written))


# --- MESSAGE-INTEGRITY and FINGERPRINT. RFC 8489 §14.5, §14.7 --------------------------------

AFTER_INTEGRITY = [
    pytest.param([(0x000D, b"\x00\x00\x00\x01")], id="a known attribute"),
    pytest.param([(0x0012, b"\x00\x01\x2c\x84\xe1\x12\xa6\x43")], id="a repeatable one"),
    pytest.param([(0x7FFF, b"")], id="an unknown one that must be understood"),
    pytest.param([(0x000D, b"?")], id="an undecodable one"),
    pytest.param([(0x0008, bytes(20))], id="a second MESSAGE-INTEGRITY"),
]


@pytest.mark.parametrize("pairs", AFTER_INTEGRITY)
def test_what_follows_the_integrity_is_ignored(pairs: Pairs) -> None:
    """RFC 8489 §14.5: all but MESSAGE-INTEGRITY-SHA256 and FINGERPRINT."""
    signed = Message(Kind.REQUEST, Method.BINDING, TRANSACTION_ID, [(Attr.USERNAME, "alice")])
    body = signed.encode(KEY)[20:] + b"".join(tlv(*pair) for pair in pairs)
    received = decode(fingerprinted(body))

    assert received.message.get(Attr.USERNAME) == "alice"
    assert len(received.message.attributes) == 2
    assert received.unknown == ()
    assert received.undecodable is None
    assert received.fingerprinted
    assert received.integrity_offset == 20 + len(tlv(0x0006, b"alice"))
    # Whatever length the header gives by now, the integrity was made with its own.
    assert verify(received.raw, received.integrity_offset, KEY)


def test_a_fingerprint_is_reported() -> None:
    assert decode(fingerprinted(tlv(0x0006, b"alice"))).fingerprinted
    assert not decode(stun((0x0006, b"alice"))).fingerprinted


WRONG_FINGERPRINTS = [
    pytest.param(bytes(4), id="zero"),
    pytest.param(b"", id="empty"),
    pytest.param(bytes(8), id="8 bytes"),
    pytest.param(
        # crc32 of the header below, without the XOR with "STUN"
        struct.pack("!I", zlib.crc32(struct.pack("!HHI12s", 1, 8, COOKIE, TRANSACTION_ID))),
        id="not XORed",
    ),
]


@pytest.mark.parametrize("value", WRONG_FINGERPRINTS)
def test_a_wrong_fingerprint_is_refused(value: bytes) -> None:
    with pytest.raises(WrongFingerprint):
        decode(stun((0x8028, value)))


def test_a_wrong_fingerprint_is_refused_behind_anything() -> None:
    """Behind an integrity, an undecodable value and a message that was changed on its way."""
    datagram = fingerprinted(tlv(0x0008, bytes(20)) + tlv(0x0006, b"alice"))
    assert decode(datagram).fingerprinted
    with pytest.raises(WrongFingerprint):
        decode(datagram.replace(b"alice", b"alicf"))
    with pytest.raises(WrongFingerprint):
        decode(stun((0x000D, b"?"), (0x8028, bytes(4))))


# --- Round trip -----------------------------------------------------------------------------
password_algorithms = st.tuples(st.integers(0, 0xFFFF), st.binary(max_size=6))

texts = st.text(max_size=127)  # 508 bytes at most
hosts = st.builds(
    unpack_host, st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16)
)
addresses = st.tuples(hosts, st.integers(0, 0xFFFF))
families = st.sampled_from(Family)
codes = st.integers(300, 699)
VALUES: Final[dict[Attribute[Any], st.SearchStrategy[Any]]] = {
    Attr.MAPPED_ADDRESS: addresses,
    Attr.USERNAME: texts,
    Attr.ERROR_CODE: st.tuples(codes, texts),
    Attr.UNKNOWN_ATTRIBUTES: st.lists(st.integers(0, 0xFFFF), max_size=8).map(tuple),
    Attr.CHANNEL_NUMBER: st.integers(0, 0xFFFF),
    Attr.LIFETIME: st.integers(0, 0xFFFFFFFF),
    Attr.XOR_PEER_ADDRESS: addresses,
    Attr.DATA: st.binary(max_size=64),
    Attr.REALM: texts,
    Attr.NONCE: st.binary(max_size=64),
    Attr.XOR_RELAYED_ADDRESS: addresses,
    Attr.REQUESTED_ADDRESS_FAMILY: families,
    Attr.EVEN_PORT: st.integers(0, 0xFF),
    Attr.REQUESTED_TRANSPORT: st.integers(0, 0xFF),
    Attr.DONT_FRAGMENT: st.just(b""),
    Attr.PASSWORD_ALGORITHM: st.tuples(password_algorithms),
    Attr.PASSWORD_ALGORITHMS: st.lists(password_algorithms, min_size=1, max_size=3).map(tuple),
    Attr.USERHASH: st.binary(min_size=32, max_size=32),
    Attr.RESERVATION_TOKEN: st.binary(min_size=8, max_size=8),
    Attr.ICMP: st.tuples(st.integers(0, 255), st.integers(0, 255), st.integers(0, 0xFFFFFFFF)),
    Attr.XOR_MAPPED_ADDRESS: addresses,
    Attr.ADDITIONAL_ADDRESS_FAMILY: families,
    Attr.ADDRESS_ERROR_CODE: st.tuples(families, codes, texts),
    Attr.SOFTWARE: texts,
}


def without_repetitions(
    attributes: list[tuple[Attribute[Any], Any]],
) -> list[tuple[Attribute[Any], Any]]:
    """Keep the first of each attribute, and every one of those that may be repeated."""
    kept: list[tuple[Attribute[Any], Any]] = []
    for attribute, value in attributes:
        if attribute.repeatable or all(attribute is not other for other, _ in kept):
            kept.append((attribute, value))
    return kept


attributes_with_values = [st.tuples(st.just(row), values) for row, values in VALUES.items()]
messages = st.builds(
    Message,
    st.sampled_from(Kind),
    st.integers(0, 0xFFF),
    st.binary(min_size=12, max_size=12),
    st.lists(st.one_of(attributes_with_values), max_size=8).map(without_repetitions),
)
keys = st.none() | st.binary(min_size=1, max_size=32)


def test_every_attribute_goes_round() -> None:
    """Those that are not drawn are written by encode() itself."""
    assert set(BY_TYPE.values()) - set(VALUES) == {
        Attr.MESSAGE_INTEGRITY,
        Attr.MESSAGE_INTEGRITY_SHA256,
        Attr.FINGERPRINT,
    }


@settings(deadline=None)
@given(messages, keys, st.booleans())
def test_decoding_undoes_encoding(message: Message, key: bytes | None, fingerprint: bool) -> None:
    datagram = message.encode(key, fingerprinted=fingerprint)
    received = decode(datagram)

    assert received.raw == datagram
    assert received.unknown == ()
    assert received.undecodable is None
    assert received.fingerprinted is fingerprint
    if key is None:
        assert received.integrity_offset is None
    else:
        assert received.integrity_offset is not None
        assert verify(datagram, received.integrity_offset, key)
        assert not verify(datagram, received.integrity_offset, key + b"?")
        mac = datagram[received.integrity_offset + 4 :][:20]
        assert received.message.attributes.pop() == (Attr.MESSAGE_INTEGRITY, mac)
    assert received.message == message


# --- Any bytes at all -----------------------------------------------------------------------


@st.composite
def almost_messages(draw: st.DrawFn) -> bytes:
    """Draw a sound message, then damage it."""
    datagram = bytearray(draw(messages).encode(draw(keys), fingerprinted=draw(st.booleans())))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(datagram) - 1))
        datagram[at] = draw(st.integers(0, 0xFF))
    start = draw(st.integers(0, len(datagram)))
    datagram[start : start + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(datagram)


framed = st.binary(max_size=200).map(lambda body: header(body[: len(body) // 4 * 4]))


@settings(deadline=None)
@given(st.binary() | framed | almost_messages())
def test_whatever_arrives_nothing_but_decode_error_is_raised(datagram: bytes) -> None:
    try:
        received = decode(datagram)
    except DecodeError:
        return

    assert datagram.startswith(received.raw)
    assert all(attribute_type < 0x8000 for attribute_type in received.unknown)
    if received.integrity_offset is not None:
        assert received.raw[received.integrity_offset :].startswith(b"\x00\x08\x00\x14")
        verify(received.raw, received.integrity_offset, KEY)


# --- Helpers --------------------------------------------------------------------------------


def stun(*pairs: tuple[int, bytes]) -> bytes:
    """Return a Binding request with those attributes, written by hand."""
    return header(b"".join(tlv(*pair) for pair in pairs))


def header(body: bytes = b"", message_type: int = 0x0001) -> bytes:
    return struct.pack("!HHI12s", message_type, len(body), COOKIE, TRANSACTION_ID) + body


def tlv(attribute_type: int, value: bytes) -> bytes:
    return struct.pack("!HH", attribute_type, len(value)) + value + bytes(-len(value) % 4)


def fingerprinted(body: bytes) -> bytes:
    """Return a Binding request with that body, closed by the right FINGERPRINT."""
    covered = header(body + tlv(0x8028, bytes(4)))[:-8]
    return covered + tlv(0x8028, struct.pack("!I", zlib.crc32(covered) ^ 0x5354554E))
