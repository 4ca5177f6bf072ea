"""What a datagram is, and the Binding method. RFC 8489 §6.3, RFC 8656 §12."""

from collections import defaultdict

import pytest

from relay.stun.attributes import Attr, Attribute, Coding
from relay.stun.const import UDP_PROTOCOL, Kind, Method
from relay.stun.message import Message
from relay.stun.raw import MAX_ATTRIBUTES
from relay.turn.channeldata import RFC5766_NUMBERS
from relay.turn.commands import ClientAddress
from relay.turn.users import DEFAULT_REALM
from tests.scenario import (
    PUBLIC_IP4,
    PUBLIC_IP6,
    Client,
    Scenario,
    Value,
    channel_data,
    request,
)


def test_binding_tells_the_client_its_own_address(relay: Scenario) -> None:
    answer = relay.client("192.0.2.10:5000").hears(request(Method.BINDING).encode())

    assert answer.code is None
    assert answer.get(Attr.XOR_MAPPED_ADDRESS) == ("192.0.2.10", 5000)
    assert answer.attributes == {Attr.XOR_MAPPED_ADDRESS}
    assert not answer.signed


def test_binding_over_ipv6(relay: Scenario) -> None:
    answer = relay.client("[2001:db8::10]:5000").hears(request(Method.BINDING).encode())

    assert answer.get(Attr.XOR_MAPPED_ADDRESS) == ("2001:db8::10", 5000)


def test_the_answer_repeats_method_and_transaction_id(relay: Scenario) -> None:
    answer = relay.client("192.0.2.10:5000").hears(
        request(Method.BINDING, transaction_id=b"twelve bytes").encode()
    )

    assert answer.received.message.method == Method.BINDING
    assert answer.received.message.transaction_id == b"twelve bytes"


def test_binding_needs_no_valid_credentials(relay: Scenario) -> None:
    message = request(Method.BINDING, (Attr.USERNAME, "someone"), (Attr.REALM, "elsewhere"))
    answer = relay.client("192.0.2.10:5000").hears(message.encode(b"not the key"))

    assert answer.code is None
    assert not answer.signed


def test_a_request_with_a_fingerprint_gets_one_in_its_answer(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000")

    assert alice.hears(request(Method.BINDING).encode(fingerprinted=True)).received.fingerprinted
    assert alice.hears(request(Method.REFRESH).encode(fingerprinted=True)).received.fingerprinted
    assert not alice.hears(request(Method.BINDING).encode()).received.fingerprinted


def test_software_is_named_only_when_configured(relay: Scenario) -> None:
    proud = Scenario(software="a relay")
    for method in (Method.BINDING, Method.ALLOCATE):
        long_enough = request(method, (Attr.SOFTWARE, "a client with much to say")).encode()
        assert relay.client("192.0.2.10:5000").hears(long_enough).get(Attr.SOFTWARE) is None
        assert proud.client("192.0.2.10:5000").hears(long_enough).get(Attr.SOFTWARE) == "a relay"


_NO_STUN = request(Method.BINDING).encode()


@pytest.mark.parametrize(
    ("datagram", "reason"),
    [
        pytest.param(b"", "unknown_protocol", id="empty"),
        pytest.param(b"\x04" + bytes(40), "unknown_protocol", id="first byte 0x04"),
        pytest.param(b"\x3f" + bytes(40), "unknown_protocol", id="first byte 0x3f"),
        pytest.param(b"\x50" + bytes(40), "unknown_protocol", id="first byte 0x50"),
        pytest.param(b"\x7f" + bytes(40), "unknown_protocol", id="first byte 0x7f"),
        pytest.param(b"\x80" + bytes(40), "unknown_protocol", id="first byte 0x80"),
        pytest.param(b"\xff" * 40, "unknown_protocol", id="first byte 0xff"),
        pytest.param(b"\x00", "malformed_stun", id="one byte of STUN"),
        pytest.param(_NO_STUN[:19], "malformed_stun", id="no whole header"),
        pytest.param(b"\x00\x01" + bytes(18), "malformed_stun", id="no magic cookie"),
        pytest.param(
            _NO_STUN[:2] + b"\x00\x04" + _NO_STUN[4:], "malformed_stun", id="length beyond the end"
        ),
        pytest.param(
            _NO_STUN[:2] + b"\x00\x02" + _NO_STUN[4:] + b"??",
            "malformed_stun",
            id="length not a multiple of four",
        ),
        pytest.param(
            request(Method.BINDING).encode(fingerprinted=True)[:-1] + b"?",
            "wrong_fingerprint",
            id="wrong fingerprint",
        ),
        pytest.param(b"\x40", "malformed_channel_data", id="one byte of ChannelData"),
        pytest.param(b"\x40\x00\x00", "malformed_channel_data", id="three bytes of ChannelData"),
        pytest.param(b"\x40\x00\x00\x03hi", "malformed_channel_data", id="truncated payload"),
        pytest.param(channel_data(0x4000, b"hi"), "unbound_channel", id="channel not bound"),
    ],
)
def test_what_is_no_request_is_dropped_and_counted(
    relay: Scenario, datagram: bytes, reason: str
) -> None:
    relay.client("192.0.2.10:5000").sends(datagram)

    assert relay.sent() == []
    assert relay.dropped() == {reason: 1}


@pytest.mark.parametrize("kind", [Kind.INDICATION, Kind.SUCCESS, Kind.ERROR], ids=str)
@pytest.mark.parametrize("method", [*Method, 0x00A, 0x0FF])
def test_only_requests_are_answered(relay: Scenario, kind: Kind, method: int) -> None:
    message = Message(kind, method, b"twelve bytes", [(Attr.CHANNEL_NUMBER, 1)])
    relay.client("192.0.2.10:5000").sends(message.encode())

    assert relay.sent() == []
    is_send = (kind, method) == (Kind.INDICATION, Method.SEND)
    assert relay.dropped() == {"no_permission" if is_send else "not_a_request": 1}


def test_bytes_after_the_message_are_ignored(relay: Scenario) -> None:
    answer = relay.client("192.0.2.10:5000").hears(request(Method.BINDING).encode() + b"junk!")

    assert answer.code is None


def test_a_message_larger_than_any_real_one_is_dropped(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000")
    filler = request(Method.BINDING, (_raw(0x8FFF), bytes(2048 - 24))).encode()
    assert len(filler) == 2048
    assert alice.hears(filler).code is None

    alice.sends(filler + b"\0")
    assert relay.sent() == []
    assert relay.dropped() == {"oversized_stun": 1}


def test_a_request_that_comes_through_the_relay_itself_is_dropped(relay: Scenario) -> None:
    """Otherwise allocations could be stacked into a loop. RFC 8656 §21.1.7."""
    alice = relay.client("192.0.2.10:5000").allocates()
    inside = relay.client(f"{PUBLIC_IP4}:{alice.relayed_address[1]}")
    inside.sends(request(Method.BINDING).encode())
    assert relay.sent() == []
    assert relay.dropped() == {"from_itself": 1}

    port = alice.relayed_address[1]
    for elsewhere in (f"192.0.2.99:{port}", f"[{PUBLIC_IP6}]:{port}"):  # it has no IPv6 address
        assert relay.client(elsewhere).hears(request(Method.BINDING).encode()).code is None


def test_nothing_is_answered_to_source_port_zero(relay: Scenario) -> None:
    nobody = ClientAddress((("192.0.2.10", 0), b""))
    relay.receives_from_client(request(Method.BINDING).encode(), nobody)

    assert relay.sent() == []
    assert relay.dropped() == {"source_port_zero": 1}


@pytest.mark.parametrize("method", [0x002, Method.SEND, Method.DATA, 0x00A, 0x0FF])
def test_another_method_is_a_bad_request_to_anyone(relay: Scenario, method: int) -> None:
    answer = relay.client("192.0.2.10:5000").hears(request(method).encode())

    assert answer.code == 400
    assert answer.attributes == {Attr.ERROR_CODE}


def raw_attributes(body: bytes) -> list[tuple[Attribute[bytes], bytes]]:
    """One attribute, or none, of its bytes."""
    return [(_raw(int.from_bytes(body[:2], "big")), body[4:])] if body else []


def _raw(attribute_type: int) -> Attribute[bytes]:
    """An attribute with any bytes as its value."""
    return Attribute(attribute_type, "raw", Coding(lambda v, _: v, lambda v, _: v))


# Each makes no sense, wherever it is read.
NONSENSE = {
    "USERNAME is not UTF-8": (0x0006, b"\xff"),
    "USERNAME too long": (0x0006, bytes(509)),
    "CHANNEL-NUMBER below the range": (0x000C, b"\x3f\xff\0\0"),
    "CHANNEL-NUMBER above the range": (0x000C, b"\x50\x00\0\0"),
    "CHANNEL-NUMBER of two bytes": (0x000C, b"\x40\x00"),
    "LIFETIME of two bytes": (0x000D, b"\0\0"),
    "XOR-PEER-ADDRESS of unknown family": (0x0012, b"\0\x03\0\0\0\0\0\0"),
    "XOR-PEER-ADDRESS of seven bytes": (0x0012, b"\0\x01\0\0\0\0\0"),
    "IPv6 in four bytes": (0x0012, b"\0\x02\0\0\0\0\0\0"),
    "REALM is not UTF-8": (0x0014, b"\xff"),
    "REQUESTED-ADDRESS-FAMILY unknown": (0x0017, b"\x03\0\0\0"),
    "REQUESTED-TRANSPORT of one byte": (0x0019, b"\x11"),
    "ADDITIONAL-ADDRESS-FAMILY unknown": (0x8000, b"\x00\0\0\0"),
    "MESSAGE-INTEGRITY of 19 bytes": (0x0008, bytes(19)),
    "SOFTWARE is not UTF-8": (0x8022, b"\xff"),
    "SOFTWARE too long": (0x8022, bytes(764)),
}
READ_BY: dict[int, set[int]] = {
    Method.BINDING: set(),
    Method.ALLOCATE: {0x000D, 0x0017, 0x0019, 0x8000},
    Method.REFRESH: {0x000D, 0x0017},
    Method.CREATE_PERMISSION: {0x0012},
    Method.CHANNEL_BIND: {0x000C, 0x0012},
}
UNKNOWN_FAMILY: defaultdict[int, int | None] = defaultdict(
    lambda: None, {Method.ALLOCATE: 440, Method.REFRESH: 443}
)
READ_TO_AUTHENTICATE = {0x0006, 0x0008, 0x0014}

every_method = pytest.mark.parametrize("method", READ_BY)
every_nonsense = pytest.mark.parametrize(
    ("attribute_type", "value"), NONSENSE.values(), ids=NONSENSE
)


@every_method
@every_nonsense
def test_what_a_method_reads_must_make_sense(
    relay: Scenario, method: Method, attribute_type: int, value: bytes
) -> None:
    """400, once it is known who asks. What is not read decides nothing, whatever is in it."""
    alice = relay.client("192.0.2.10:5000")
    if method is not Method.ALLOCATE:
        alice.allocates()
    answer = alice.hears(
        signed_with(alice, method, (_raw(attribute_type), value), USEFUL_TO[method])
    )

    is_read = attribute_type in READ_BY[method]
    if method is not Method.BINDING:
        is_read |= attribute_type in READ_TO_AUTHENTICATE
    code = UNKNOWN_FAMILY[method] if attribute_type in {0x0017, 0x8000} else 400
    assert answer.code == (code if is_read else None)


@every_method
@every_nonsense
def test_before_a_client_is_known_its_attributes_decide_nothing(
    relay: Scenario, method: Method, attribute_type: int, value: bytes
) -> None:
    """Without a signature it is 401 before anything else is looked at. RFC 8489 §9.2.4."""
    answer = relay.client("192.0.2.10:5000").hears(
        request(method, (_raw(attribute_type), value)).encode()
    )

    if method is Method.BINDING:
        assert answer.code is None
    else:
        assert answer.code == (400 if attribute_type == Attr.MESSAGE_INTEGRITY.type else 401)


USEFUL_TO: dict[int, list[Value]] = {
    Method.BINDING: [],
    Method.ALLOCATE: [(Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL)],
    Method.REFRESH: [],
    Method.CREATE_PERMISSION: [(Attr.XOR_PEER_ADDRESS, ("198.51.100.7", 9000))],
    Method.CHANNEL_BIND: [
        (Attr.CHANNEL_NUMBER, 0x4000),
        (Attr.XOR_PEER_ADDRESS, ("198.51.100.7", 9000)),
    ],
}


def signed_with(client: Client, method: Method, first: Value, others: list[Value]) -> bytes:
    """A request that would succeed but for its *first* attribute, if that is read."""
    credentials: list[Value] = [
        (Attr.USERNAME, client.username),
        (Attr.REALM, DEFAULT_REALM),
        (Attr.NONCE, client.nonce),
    ]
    return request(method, first, *others, *credentials).encode(client.key)


def test_unknown_attributes_of_a_binding_are_named(relay: Scenario) -> None:
    message = request(
        Method.BINDING, (_raw(0x0003), b""), (_raw(0x7FFF), b"x"), (_raw(0x8FFF), b"optional")
    )
    answer = relay.client("192.0.2.10:5000").hears(message.encode())

    assert answer.code == 420
    assert answer.get(Attr.UNKNOWN_ATTRIBUTES) == (0x0003, 0x7FFF)


def test_the_older_channel_range_widens_what_counts_as_channel_data() -> None:
    relay = Scenario(channel_numbers=RFC5766_NUMBERS)
    relay.client("192.0.2.10:5000").sends(channel_data(0x7FFF, b"hi"))
    assert relay.dropped() == {"unbound_channel": 1}

    relay.client("192.0.2.10:5000").sends(b"\x80\x00\x00\x00")
    assert relay.dropped() == {"unknown_protocol": 1}


def test_many_unknown_attributes_are_not_all_named(relay: Scenario) -> None:
    many = [(_raw(0x4000 + number), b"") for number in range(MAX_ATTRIBUTES)]
    answer = relay.client("192.0.2.10:5000").hears(request(Method.BINDING, *many).encode())

    assert answer.get(Attr.UNKNOWN_ATTRIBUTES) == tuple(range(0x4000, 0x4000 + 32))


@pytest.mark.parametrize("method", [Method.BINDING, Method.ALLOCATE])
def test_more_attributes_than_anybody_needs_are_malformed(relay: Scenario, method: int) -> None:
    """One unauthenticated datagram must not keep the relay busy."""
    many = [(_raw(0xC000 + number), b"") for number in range(MAX_ATTRIBUTES + 1)]
    relay.client("192.0.2.10:5000").sends(request(method, *many).encode())

    assert relay.sent() == []
    assert relay.dropped() == {"malformed_stun": 1}


@pytest.mark.parametrize("software", [None, "a relay whose name is longer than any answer may be"])
@pytest.mark.parametrize("fingerprinted", [False, True])
@pytest.mark.parametrize("body", [b"", b"\x80\x22\0\0", b"\x00\x19\0\x04\x11\0\0\0"])
@pytest.mark.parametrize("address", ["192.0.2.10:5000", "[2001:db8::10]:5000"])
@pytest.mark.parametrize("method", [*Method, 0x0FF])
def test_no_answer_has_more_than_three_times_the_size_of_a_request_that_proves_nothing(
    method: int, address: str, body: bytes, fingerprinted: bool, software: str | None
) -> None:
    relay = Scenario(software=software)
    asked = request(method, *raw_attributes(body)).encode(fingerprinted=fingerprinted)
    answer = relay.client(address).hears(asked)

    assert len(answer.datagram) <= 3 * len(asked)
    assert answer.received.fingerprinted is fingerprinted


def test_even_a_bare_header_gets_realm_and_nonce(relay: Scenario) -> None:
    asked = request(Method.ALLOCATE).encode()
    answer = relay.client("192.0.2.10:5000").hears(asked)

    assert len(asked) == 20
    assert len(answer.datagram) == 60
    assert answer.attributes == {Attr.ERROR_CODE, Attr.REALM, Attr.NONCE}
