"""Our STUN codec against another one, that of aioice: each must read what the other wrote.

Two codecs that were written independently are unlikely to share a mistake.
"""

from ipaddress import ip_address
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.stun.address import unpack_host
from relay.stun.attributes import BY_TYPE, Attr, Attribute
from relay.stun.const import Kind
from relay.stun.integrity import verify
from relay.stun.message import Message, Received, decode

pytest.importorskip("aioice", reason="aioice is the oracle of these tests")

from aioice import stun as oracle

texts = st.text(max_size=127)
hosts = st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16)
addresses = st.tuples(hosts.map(unpack_host), st.integers(0, 0xFFFF))
VALUES: Final[dict[Attribute[Any], st.SearchStrategy[Any]]] = {
    Attr.MAPPED_ADDRESS: addresses,
    Attr.USERNAME: texts,
    Attr.ERROR_CODE: st.tuples(st.integers(300, 699), texts),
    Attr.CHANNEL_NUMBER: st.integers(0, 0xFFFF),
    Attr.LIFETIME: st.integers(0, 0xFFFFFFFF),
    Attr.XOR_PEER_ADDRESS: addresses,
    Attr.DATA: st.binary(max_size=64),
    Attr.REALM: texts,
    Attr.NONCE: st.binary(max_size=64),
    Attr.XOR_RELAYED_ADDRESS: addresses,
    Attr.REQUESTED_TRANSPORT: st.integers(0, 0xFF),
    Attr.XOR_MAPPED_ADDRESS: addresses,
    Attr.SOFTWARE: texts,
}
attributes_with_values = [st.tuples(st.just(row), values) for row, values in VALUES.items()]
attributes = st.lists(
    st.one_of(attributes_with_values), max_size=8, unique_by=lambda pair: pair[0].type
)
kinds = st.sampled_from(Kind)
methods = st.sampled_from(oracle.Method)
transaction_ids = st.binary(min_size=12, max_size=12)
keys = st.none() | st.binary(min_size=1, max_size=32)


@settings(deadline=None)
@given(kinds, methods, transaction_ids, attributes, keys, st.booleans())
def test_aioice_reads_what_we_write(
    kind: Kind,
    method: oracle.Method,
    transaction_id: bytes,
    pairs: list[tuple[Attribute[Any], Any]],
    key: bytes | None,
    fingerprinted: bool,
) -> None:
    ours = Message(kind, method, transaction_id, pairs)
    theirs = oracle.parse_message(ours.encode(key, fingerprinted=fingerprinted))

    assert theirs.message_class == oracle.Class(kind)
    assert theirs.message_method == method
    assert theirs.transaction_id == transaction_id
    # parse_message() has verified the FINGERPRINT, if there is one.
    assert (theirs.attributes.pop("FINGERPRINT", None) is not None) is fingerprinted
    if key is not None:
        assert theirs.check_message_integrity(key)
        assert not theirs.check_message_integrity(key + b"?")
    assert (theirs.attributes.pop("MESSAGE-INTEGRITY", None) is not None) is (key is not None)
    assert theirs.attributes == {
        attribute.name: in_their_words(attribute, value) for attribute, value in pairs
    }


@settings(deadline=None)
@given(kinds, methods, transaction_ids, attributes, keys, st.booleans())
def test_we_read_what_aioice_writes(
    kind: Kind,
    method: oracle.Method,
    transaction_id: bytes,
    pairs: list[tuple[Attribute[Any], Any]],
    key: bytes | None,
    fingerprinted: bool,
) -> None:
    theirs = oracle.Message(method, oracle.Class(kind), transaction_id)
    for attribute, value in pairs:
        theirs.attributes[attribute.name] = in_their_words(attribute, value)
    if key is not None:
        theirs.add_message_integrity(key)  # and a FINGERPRINT
    elif fingerprinted:
        theirs.add_fingerprint()
    received = decode(bytes(theirs))

    assert received.message.kind is kind
    assert received.message.method == method
    assert received.message.transaction_id == transaction_id
    assert received.fingerprinted is (fingerprinted or key is not None)
    assert received.undecodable is None
    assert received.unknown == ()
    if key is not None:
        assert is_signed_with(key, received)
        assert not is_signed_with(key + b"?", received)
        assert received.message.attributes.pop()[0] is Attr.MESSAGE_INTEGRITY
    assert received.integrity_offset is None or key is not None
    assert received.message.attributes == pairs


@settings(deadline=None)
@given(kinds, methods, transaction_ids, attributes, keys, st.booleans())
def test_both_write_the_same_bytes(
    kind: Kind,
    method: oracle.Method,
    transaction_id: bytes,
    pairs: list[tuple[Attribute[Any], Any]],
    key: bytes | None,
    fingerprinted: bool,
) -> None:
    """Even MESSAGE-INTEGRITY and FINGERPRINT, since both pad with zeros."""
    ours = Message(kind, method, transaction_id, pairs)
    theirs = oracle.Message(method, oracle.Class(kind), transaction_id)
    for attribute, value in pairs:
        theirs.attributes[attribute.name] = in_their_words(attribute, value)
    if key is not None:
        theirs.attributes["MESSAGE-INTEGRITY"] = oracle.message_integrity(bytes(theirs), key)
    if fingerprinted:
        theirs.add_fingerprint()

    assert ours.encode(key, fingerprinted=fingerprinted) == bytes(theirs)


def test_every_attribute_that_both_know_is_compared() -> None:
    """The integrity and the fingerprint are written by whoever encodes."""
    common = {row for row in BY_TYPE.values() if row.name in oracle.ATTRIBUTES_BY_NAME}

    assert common - set(VALUES) == {Attr.MESSAGE_INTEGRITY, Attr.FINGERPRINT}
    assert {row.type for row in common} == {
        oracle.ATTRIBUTES_BY_NAME[row.name][0] for row in common
    }


def in_their_words(attribute: Attribute[Any], value: Any) -> Any:
    """Return our value of an attribute as aioice has it."""
    if attribute is Attr.REQUESTED_TRANSPORT:
        return value << 24  # they read all 32 bits as one number
    if isinstance(value, tuple) and isinstance(value[0], str):
        host, port = value
        return str(ip_address(host)), port  # where we spell as inet_ntop does
    return value


def is_signed_with(key: bytes, received: Received) -> bool:
    assert received.integrity_offset is not None
    return verify(received.raw, received.integrity_offset, key)
