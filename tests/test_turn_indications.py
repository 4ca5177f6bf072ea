"""Send and Data indications, and ICMP errors. RFC 8656 §11."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.stun.address import unpack_host
from relay.stun.attributes import Attr, Attribute
from relay.stun.const import Family, Kind, Method
from relay.stun.message import Message, decode
from relay.turn.indications import DATA_HEADER_SIZES, TransactionIds, address_of, parse_send
from relay.turn.ratelimit import ERROR_BURST, ERROR_RATE
from tests.scenario import (
    LISTEN_PORT,
    PUBLIC_IP4,
    Client,
    Indicated,
    Peer,
    Scenario,
    ToPeer,
    Value,
    channel_data,
    indicated,
    relayed,
    send_indication,
    to,
)

PEER = ("198.51.100.7", 9000)
UNKNOWN: Attribute[bytes] = Attribute(0x7ABC, "unknown", Attr.DATA.coding)
OPTIONAL: Attribute[bytes] = Attribute(0xFABC, "optional", Attr.DATA.coding)


@pytest.mark.parametrize("client", ["192.0.2.10:5000", "[2001:db8::10]:5000"])
@pytest.mark.parametrize("peer", ["198.51.100.7:9000", "[2001:db8::7]:9000"])
def test_data_flows_both_ways_in_every_mix_of_families(
    relay: Scenario, client: str, peer: str
) -> None:
    alice = relay.client(client).allocates((Attr.ADDITIONAL_ADDRESS_FAMILY, Family.IPV6))
    bob = relay.peer(peer)
    alice.permits(bob)

    for _ in range(2):  # before and after the way is known
        alice.indicates(bob, b"ping")
        assert relay.sent() == [relayed(alice, bob, b"ping")]
    bob.sends(b"pong", to=alice.relayed_addresses[peer.startswith("[")])
    assert indicated(relay.sent()) == [Indicated(alice.address, bob.address, b"pong")]


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 1200, 1501, 65000])
def test_any_size_is_relayed_unchanged(relay: Scenario, size: int) -> None:
    alice, bob = permitted(relay)
    payload = bytes(index % 251 for index in range(size))

    alice.indicates(bob, payload)
    assert relay.sent() == [relayed(alice, bob, payload)]
    bob.sends(payload, to=alice.relayed_address)
    assert indicated(relay.sent()) == [Indicated(alice.address, bob.address, payload)]
    assert dict(relay.counters.to_peer) == dict(relay.counters.to_client) == {size: 1}


def test_what_pads_a_data_indication_is_zero(relay: Scenario) -> None:
    """And not what somebody else has sent before."""
    alice, bob = permitted(relay)
    bob.sends(b"secret", to=alice.relayed_address)
    relay.sent()
    bob.sends(b"p", to=alice.relayed_address)

    (sent,) = relay.sent()
    assert to(alice, sent.datagram[:-4] + b"p\0\0\0") == sent  # type: ignore[union-attr]


def test_each_data_indication_has_a_transaction_id_of_its_own(relay: Scenario) -> None:
    alice, bob = permitted(relay)
    for _ in range(3):
        bob.sends(b"pong", to=alice.relayed_address)

    assert len({sent.datagram[8:20] for sent in relay.sent()}) == 3  # type: ignore[union-attr]


def test_a_permission_is_for_every_port_of_the_host(relay: Scenario) -> None:
    alice, _ = permitted(relay)
    carol = relay.peer("198.51.100.7:1")

    alice.indicates(carol, b"ping")
    assert relay.sent() == [relayed(alice, carol, b"ping")]
    carol.sends(b"pong", to=alice.relayed_address)
    assert indicated(relay.sent()) == [Indicated(alice.address, carol.address, b"pong")]


def test_a_host_without_a_permission_is_not_reached_and_does_not_reach(relay: Scenario) -> None:
    alice, _ = permitted(relay)
    mallory = relay.peer("198.51.100.8:9000")

    alice.indicates(mallory, b"ping")
    mallory.sends(b"pong", to=alice.relayed_address)
    assert relay.sent() == []
    assert relay.dropped() == {"no_permission": 1, "unbound_peer": 1}


def test_a_client_without_an_allocation_sends_nothing(relay: Scenario) -> None:
    relay.client("192.0.2.10:5000").indicates(PEER, b"ping")

    assert relay.sent() == []
    assert relay.dropped() == {"no_permission": 1}


def test_what_has_a_channel_comes_on_that(relay: Scenario) -> None:
    """RFC 8656 §12.6. A client may go on to use indications the other way."""
    alice, bob = permitted(relay)
    alice.binds(0x4001, bob)

    bob.sends(b"pong", to=alice.relayed_address)
    assert relay.sent() == [to(alice, channel_data(0x4001, b"pong"))]
    alice.indicates(bob, b"ping")
    assert relay.sent() == [relayed(alice, bob, b"ping")]


def test_when_a_channel_has_expired_the_permission_goes_on(relay: Scenario) -> None:
    alice, bob = permitted(relay)
    alice.binds(0x4001, bob)
    alice.refreshes(3600)
    relay.passes(seconds=400)
    alice.permits(bob)
    relay.passes(seconds=200)

    bob.sends(b"pong", to=alice.relayed_address)
    assert indicated(relay.sent()) == [Indicated(alice.address, bob.address, b"pong")]


@pytest.mark.parametrize(
    ("datagram", "reason"),
    [
        pytest.param([(Attr.DATA, b"x")], "malformed_stun", id="no peer"),
        pytest.param([(Attr.XOR_PEER_ADDRESS, PEER)], "malformed_stun", id="no data"),
        pytest.param(
            [(Attr.XOR_PEER_ADDRESS, PEER), (UNKNOWN, b""), (Attr.DATA, b"x")],
            "malformed_stun",
            id="an unknown attribute that must be understood",
        ),
        pytest.param(
            [(Attr.XOR_PEER_ADDRESS, ("198.51.100.7", 0)), (Attr.DATA, b"x")],
            "forbidden_peer",
            id="port 0",
        ),
        pytest.param(
            [(Attr.XOR_PEER_ADDRESS, ("2001:db8::7", 1)), (Attr.DATA, b"x")],
            "no_permission",
            id="a family without a relayed address",
        ),
        pytest.param(
            [*[(OPTIONAL, b"")] * 48, (Attr.XOR_PEER_ADDRESS, PEER), (Attr.DATA, b"x")],
            "malformed_stun",
            id="too many attributes",
        ),
    ],
)
def test_what_makes_no_sense_is_dropped_and_counted(
    relay: Scenario, datagram: list[Value], reason: str
) -> None:
    alice, _ = permitted(relay)
    alice.sends(Message(Kind.INDICATION, Method.SEND, b"twelve bytes", datagram).encode())

    assert relay.sent() == []
    assert relay.dropped() == {reason: 1}


@pytest.mark.parametrize(
    "attributes",
    [
        pytest.param([(Attr.DATA, b"data"), (Attr.XOR_PEER_ADDRESS, PEER)], id="the other way"),
        pytest.param(
            [(Attr.SOFTWARE, "me"), (Attr.XOR_PEER_ADDRESS, PEER), (Attr.DATA, b"data")],
            id="SOFTWARE first",
        ),
        pytest.param(
            [(Attr.XOR_PEER_ADDRESS, PEER), (Attr.DATA, b"data"), (OPTIONAL, b"odd")],
            id="something unknown last",
        ),
        pytest.param(
            [
                (Attr.XOR_PEER_ADDRESS, PEER),
                (Attr.DATA, b"data"),
                (Attr.XOR_PEER_ADDRESS, ("198.51.100.8", 1)),
                (Attr.DATA, b"other"),
            ],
            id="of each the first counts",
        ),
        pytest.param(
            [
                (Attr.XOR_PEER_ADDRESS, PEER),
                (Attr.DATA, b"data"),
                (Attr.MESSAGE_INTEGRITY, bytes(20)),
                (UNKNOWN, b"x"),
            ],
            id="signed, which nobody verifies",
        ),
    ],
)
@pytest.mark.parametrize("fingerprinted", [False, True])
def test_attributes_may_come_in_any_order(
    relay: Scenario, attributes: list[Value], fingerprinted: bool
) -> None:
    alice, bob = permitted(relay)
    message = Message(Kind.INDICATION, Method.SEND, b"twelve bytes", attributes)
    alice.sends(message.encode(fingerprinted=fingerprinted) + b"junk behind it")

    assert relay.sent() == [relayed(alice, bob, b"data")]


def test_a_wrong_fingerprint_is_dropped(relay: Scenario) -> None:
    alice, bob = permitted(relay)
    values: list[Value] = [(Attr.XOR_PEER_ADDRESS, bob.address), (Attr.DATA, b"data")]
    datagram = Message(Kind.INDICATION, Method.SEND, bytes(12), values).encode(fingerprinted=True)
    alice.sends(datagram[:-1] + bytes([datagram[-1] ^ 1]))

    assert relay.sent() == []
    assert relay.dropped() == {"malformed_stun": 1}


def test_nothing_is_asked_of_the_cookie_but_that_it_is_there(relay: Scenario) -> None:
    alice, bob = permitted(relay)
    datagram = bytearray(send_indication(bob.address, b"data"))
    datagram[4] ^= 1
    alice.sends(bytes(datagram))

    assert relay.dropped() == {"malformed_stun": 1}


@pytest.mark.parametrize("peer", [PEER, ("2001:db8::7", 9000)])
def test_dont_fragment_is_for_that_datagram(relay: Scenario, peer: tuple[str, int]) -> None:
    alice = relay.client("192.0.2.10:5000").allocates((Attr.ADDITIONAL_ADDRESS_FAMILY, Family.IPV6))
    alice.permits(peer)
    alice.indicates(peer, b"whole", (Attr.DONT_FRAGMENT, b""))
    alice.indicates(peer, b"in parts, if need be")

    sent = relay.sent()
    assert len(sent) == 2
    assert relay.network.whole == sent[:1]


# --- Relay to itself -------------------------------------------------------------------------


def test_two_allocations_reach_each_other_inside_the_process(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates()
    bob = relay.client("192.0.2.11:5000").allocates()
    alice.permits(bob.relayed_address)

    alice.indicates(bob.relayed_address, b"too early: bob has permitted nobody")
    assert relay.sent() == []
    assert relay.dropped() == {"unbound_peer": 1}
    bob.permits(alice.relayed_address)
    for attributes in [(), ((Attr.DONT_FRAGMENT, b""),)]:
        alice.indicates(bob.relayed_address, b"ping", *attributes)
        expected = Indicated(bob.address, alice.relayed_address, b"ping")
        assert indicated(relay.sent()) == [expected]
    bob.binds(0x4001, alice.relayed_address)
    alice.indicates(bob.relayed_address, b"ping")
    assert relay.sent() == [to(bob, channel_data(0x4001, b"ping"))]


def test_the_relay_itself_is_not_reached_by_a_permission_for_its_address(relay: Scenario) -> None:
    """A permission for what it lends out is no permission for where it listens."""
    alice = relay.client("192.0.2.10:5000").allocates().permits((PUBLIC_IP4, 1))
    alice.indicates((PUBLIC_IP4, LISTEN_PORT), b"ping")

    assert relay.sent() == []
    assert relay.dropped() == {"forbidden_peer": 1}


def test_a_port_that_is_lent_no_more_is_not_reached_outside() -> None:
    relay = Scenario(allow_peers=["198.51.100.0/24"])
    alice = relay.client("192.0.2.10:5000").allocates()
    bob = relay.client("192.0.2.11:5000").allocates()
    alice.permits(bob.relayed_address)
    bob.permits(alice.relayed_address)
    alice.indicates(bob.relayed_address, b"ping")
    bob.refreshes(0)
    relay.sent()

    alice.indicates(bob.relayed_address, b"gone")
    assert relay.sent() == []
    assert relay.dropped() == {"peer_is_gone": 1}


def test_rules_that_change_count_for_ways_that_are_known() -> None:
    """What is outside at the relay's own address may be reached, or not, from here on."""
    relay = Scenario(allow_peers=["192.0.2.0/24", "198.51.100.0/24"])
    alice = relay.client("192.0.2.10:5000").allocates().permits((PUBLIC_IP4, 1))
    alice.indicates((PUBLIC_IP4, 50000), b"ping")
    assert len(relay.sent()) == 1
    relay.changes_peers(allow=["198.51.100.0/24"])

    alice.indicates((PUBLIC_IP4, 50000), b"ping")
    assert relay.sent() == []


# --- Many at once ----------------------------------------------------------------------------


def test_segments_that_are_alike_are_relayed_at_once(relay: Scenario) -> None:
    alice, bob = permitted(relay)
    alice.indicates(bob, b"the way is known now")
    relay.sent()
    parts = [bytes([n]) * 100 for n in range(5)] + [b"short"]
    datagrams = [send_indication(bob.address, part) for part in parts]
    relay.receives_segments_from_client(b"".join(datagrams), len(datagrams[0]), alice.address)

    assert relay.sent() == [relayed(alice, bob, part) for part in parts]
    assert relay.network.at_once == [6]


def test_segments_that_are_not_alike_are_all_relayed(relay: Scenario) -> None:
    alice, bob = permitted(relay)
    alice.permits(("198.51.100.8", 1))
    carol = relay.peer("198.51.100.8:9000")
    peers = [bob, bob, carol, bob, carol]
    parts = [bytes([n]) * 100 for n in range(5)]
    datagrams = [
        send_indication(peer.address, part) for peer, part in zip(peers, parts, strict=True)
    ]
    for _ in range(2):
        relay.receives_segments_from_client(b"".join(datagrams), len(datagrams[0]), alice.address)
        expected = [relayed(alice, p, part) for p, part in zip(peers, parts, strict=True)]
        assert relay.sent() == expected


@pytest.mark.parametrize("peer", ["198.51.100.7:9000", "[2001:db8::7]:9000"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 100])
def test_segments_from_a_peer_are_indicated_at_once(relay: Scenario, peer: str, size: int) -> None:
    alice = relay.client("192.0.2.10:5000").allocates((Attr.ADDITIONAL_ADDRESS_FAMILY, Family.IPV6))
    bob = relay.peer(peer)
    alice.permits(bob)
    parts = [bytes([n]) * size for n in range(5)] + [b"s"]
    own = alice.relayed_addresses[":" in bob.address[0]]
    relay.receives_segments_from_peer(b"".join(parts), size, bob.address, own)

    expected = [Indicated(alice.address, bob.address, part) for part in parts]
    assert indicated(relay.sent()) == expected
    assert relay.network.at_once == [6]


def test_segments_without_a_permission_are_counted_each(relay: Scenario) -> None:
    alice, _ = permitted(relay)
    mallory = relay.peer("198.51.100.8:9000")
    relay.receives_segments_from_peer(bytes(300), 100, mallory.address, alice.relayed_address)
    datagram = send_indication(mallory.address, b"data")
    relay.receives_segments_from_client(3 * datagram, len(datagram), alice.address)

    assert relay.sent() == []
    assert relay.dropped() == {"unbound_peer": 3, "no_permission": 3}


def test_segments_that_are_no_send_indications_are_none(relay: Scenario) -> None:
    """Whatever else is in them."""
    alice, bob = permitted(relay)
    alice.indicates(bob, b"the way is known now")
    relay.sent()
    values: list[Value] = [(Attr.XOR_PEER_ADDRESS, bob.address), (Attr.DATA, b"data")]
    for kind in (Kind.REQUEST, Kind.SUCCESS):
        datagram = Message(kind, Method.SEND, bytes(12), values).encode()
        relay.receives_segments_from_client(3 * datagram, len(datagram), alice.address)

    assert not any(isinstance(sent, ToPeer) for sent in relay.sent())


def test_dscp_and_ecn_are_kept_both_ways(relay: Scenario) -> None:
    alice, bob = permitted(relay)
    relay.receives_from_client(send_indication(bob.address, b"ping"), alice.address, tos=0xB9)
    relay.receives_from_peer(b"pong", bob.address, alice.relayed_address, tos=0x2A)
    relay.receives_segments_from_peer(b"pong" * 3, 4, bob.address, alice.relayed_address, tos=1)

    assert relay.network.tos[-5:] == [0xB9, 0x2A, 1, 1, 1]


# --- ICMP ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peer", "icmp"),
    [
        pytest.param(PEER, (3, 3, 0), id="port unreachable"),
        pytest.param(PEER, (3, 4, 1280), id="too big"),
        pytest.param(("2001:db8::7", 9000), (2, 0, 1280), id="too big for IPv6"),
    ],
)
def test_an_error_reaches_the_client(
    relay: Scenario, peer: tuple[str, int], icmp: tuple[int, int, int]
) -> None:
    alice = relay.client("192.0.2.10:5000").allocates((Attr.ADDITIONAL_ADDRESS_FAMILY, Family.IPV6))
    bob = relay.peer(f"[{peer[0]}]:{peer[1]}")
    alice.permits(bob)
    relay.hears_of_error(icmp, bob.address, alice.relayed_addresses[":" in peer[0]])

    assert indicated(relay.sent()) == [Indicated(alice.address, peer, None, icmp)]


def test_an_error_about_somebody_else_is_nobodys_business(relay: Scenario) -> None:
    alice, bob = permitted(relay)
    other = relay.peer("198.51.100.8:9000")
    relay.hears_of_error((3, 3, 0), other.address, alice.relayed_address)
    relay.passes(seconds=300)
    relay.hears_of_error((3, 3, 0), bob.address, alice.relayed_address)

    assert relay.sent() == []


def test_a_client_hears_of_so_many_errors_per_second(relay: Scenario) -> None:
    alice, bob = permitted(relay)

    def hear(count: int) -> int:
        for _ in range(count):
            relay.hears_of_error((3, 3, 0), bob.address, alice.relayed_address)
        return len(relay.sent())

    assert hear(1000) == ERROR_BURST
    relay.passes(seconds=1)
    assert hear(1000) == ERROR_RATE


def test_a_client_with_channels_only_asks_for_no_errors(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates()
    bob = relay.peer("198.51.100.7:9000")
    alice.binds(0x4001, bob)
    relay.hears_of_error((3, 3, 0), bob.address, alice.relayed_address)

    assert relay.sent() == []
    alice.permits(bob)
    relay.hears_of_error((3, 3, 0), bob.address, alice.relayed_address)
    assert indicated(relay.sent()) == [Indicated(alice.address, bob.address, None, (3, 3, 0))]


# --- The codec -------------------------------------------------------------------------------

hosts = st.ip_addresses().map(lambda host: unpack_host(host.packed))  # as the kernel spells them
ports = st.integers(0, 65535)
others: st.SearchStrategy[list[Value]] = st.lists(
    st.sampled_from(
        [(Attr.SOFTWARE, "x"), (Attr.DONT_FRAGMENT, b""), (OPTIONAL, b"abc"), (Attr.LIFETIME, 1)]
    ),
    max_size=3,
)


@settings(deadline=None)
@given(hosts, ports, st.binary(max_size=40), others, st.randoms(), st.booleans())
def test_it_is_read_as_the_general_decoder_reads_it(
    host: str, port: int, payload: bytes, more: list[Value], random: object, fingerprint: bool
) -> None:
    values: list[Value] = [(Attr.XOR_PEER_ADDRESS, (host, port)), (Attr.DATA, payload), *more]
    random.shuffle(values)  # type: ignore[attr-defined]
    datagram = Message(Kind.INDICATION, Method.SEND, b"transaction!", values).encode(
        fingerprinted=fingerprint
    )
    send = parse_send(datagram + b"behind", len(datagram) + 6)

    assert send is not None
    peer, start, length, dont_fragment = send
    assert address_of(peer) == (host, port)
    assert datagram[start : start + length] == payload
    assert dont_fragment is any(attribute is Attr.DONT_FRAGMENT for attribute, _ in more)


@settings(deadline=None)
@given(st.binary(max_size=120), st.data())
def test_any_bytes_at_all_are_read_or_refused(noise: bytes, data: st.DataObject) -> None:
    good = send_indication(PEER, b"payload")
    at = data.draw(st.integers(0, len(good)))
    for datagram in (noise, good[:at] + noise, good[:at], good[:at] + noise + good[at:]):
        buffer = datagram + bytes(100)  # what lies behind it is nobody's
        send = parse_send(buffer, len(datagram))
        if send is not None:
            peer, start, length, _ = send
            assert start + length <= len(datagram)
            address_of(peer)


def test_transaction_ids_wrap_around() -> None:
    ids = TransactionIds((1 << 96) - 1)

    assert [ids.next() for _ in range(2)] == [(0xFFFFFFFF, (1 << 64) - 1), (0xFFFFFFFF, 0)]


def test_the_headers_have_the_sizes_that_room_is_kept_for(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates((Attr.ADDITIONAL_ADDRESS_FAMILY, Family.IPV6))
    sizes = []
    for host, own in zip(("198.51.100.7", "2001:db8::7"), alice.relayed_addresses, strict=True):
        alice.permits((host, 1))
        relay.receives_from_peer(b"", relay.peer(f"[{host}]:1").address, own)
        (sent,) = relay.sent()
        assert not isinstance(sent, ToPeer)
        sizes.append(len(sent.datagram))
        assert decode(sent.datagram).message.get(Attr.DATA) == b""

    assert tuple(sizes) == DATA_HEADER_SIZES


# --- Helpers ---------------------------------------------------------------------------------


def permitted(relay: Scenario) -> tuple[Client, Peer]:
    """A client, and a peer that it has a permission for."""
    alice = relay.client("192.0.2.10:5000").allocates()
    bob = relay.peer("198.51.100.7:9000")
    return alice.permits(bob), bob
