"""Clients that have a connection: what they send, and what becomes of what they hold."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.datapath.streamside import RUN, SHARE, SINGLE
from relay.net.stream import Broken, Then
from relay.stun.attributes import Attr
from relay.stun.const import UDP_PROTOCOL, Kind, Method
from relay.stun.message import Message
from relay.turn.framing import PADDING
from tests.scenario import (
    Scenario,
    StreamClient,
    ToPeer,
    channel_data,
    indicated,
    relayed,
    send_indication,
    spelled,
    to,
)

ASKS_FOR_UDP = (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL)
BINDING = Message(Kind.REQUEST, Method.BINDING, bytes(12)).encode()


@pytest.fixture
def relay() -> Scenario:
    return Scenario()


@pytest.fixture
def alice(relay: Scenario) -> StreamClient:
    return relay.stream_client("192.0.2.10:5000").allocates()


def padded(message: bytes) -> bytes:
    return message + PADDING[len(message) % 4]


# --- An allocation over a connection ---------------------------------------------------------


@pytest.mark.parametrize("transport", ["tcp", "tls"])
def test_data_flows_both_ways(relay: Scenario, transport: str) -> None:
    alice = relay.stream_client("192.0.2.10:5000", transport=transport).allocates()
    bob = relay.peer("198.51.100.7:9000")
    alice.binds(0x4001, bob)

    alice.sends_data(0x4001, b"hello")
    bob.sends(b"world", to=alice.relayed_address)

    assert relay.sent() == [
        relayed(alice, bob, b"hello"),
        to(alice, channel_data(0x4001, b"world")),
    ]
    counters = relay.counters.by_transport
    assert counters[transport].to_peer == counters[transport].to_client == {5: 1}
    assert counters["udp"].to_peer == counters["udp"].to_client == {}


def test_indications_flow_both_ways(relay: Scenario, alice: StreamClient) -> None:
    bob = relay.peer("198.51.100.7:9000")
    alice.permits(bob)

    alice.indicates(bob, b"hello")
    assert relay.sent() == [relayed(alice, bob, b"hello")]
    bob.sends(b"world", to=alice.relayed_address)
    (heard,) = indicated(relay.sent())
    assert (heard.peer, heard.payload) == (bob.address, b"world")
    assert relay.counters.by_transport["tcp"].to_peer == {5: 1}
    assert relay.counters.by_transport["tcp"].to_client == {5: 1}


def test_over_ipv6_too(relay: Scenario) -> None:
    alice = relay.stream_client("[2001:db8::10]:5000").allocates()
    bob = relay.peer("198.51.100.7:9000")
    alice.binds(0x4001, bob)
    alice.sends_data(0x4001, b"hello")
    assert relay.sent() == [relayed(alice, bob, b"hello")]


def test_one_address_may_speak_over_udp_and_several_connections(relay: Scenario) -> None:
    """A connection is a 5-tuple of its own, and behind a proxy several may look alike."""
    clients = [
        relay.client("192.0.2.10:5000"),
        relay.stream_client("192.0.2.10:5000"),
        relay.stream_client("192.0.2.10:5000", transport="tls"),
        relay.stream_client("192.0.2.10:5000"),
    ]
    ports = {client.allocates().relayed_address[1] for client in clients}
    assert len(ports) == relay.server.allocations == 4


def test_a_nonce_is_good_on_every_connection_from_its_address(relay: Scenario) -> None:
    first = relay.stream_client("192.0.2.10:5000", user="alice").allocates()
    first.disconnects()
    second = relay.stream_client("192.0.2.10:5000", user="alice")
    second.use_nonce(first.nonce)
    assert second.hears(second.signed(Method.ALLOCATE, ASKS_FOR_UDP)).code is None


def test_two_clients_reach_each_other(relay: Scenario, alice: StreamClient) -> None:
    """One over TCP, one over UDP; the relay hands over what they send inside the process."""
    bob = relay.client("192.0.2.11:5000").allocates()
    alice.binds(0x4001, relay.peer(spelled(bob.relayed_address)))
    bob.binds(0x4002, relay.peer(spelled(alice.relayed_address)))

    alice.sends_data(0x4001, b"hello")
    bob.sends_data(0x4002, b"world")

    assert relay.sent() == [
        to(bob, channel_data(0x4002, b"hello")),
        to(alice, channel_data(0x4001, b"world")),
    ]


def test_only_udp_is_relayed(relay: Scenario) -> None:
    """An allocation of TCP (RFC 6062) is refused over TCP, too."""
    alice = relay.stream_client("192.0.2.10:5000")
    answer = alice.asks(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, 6))
    assert answer.code == 442


# --- Its end ---------------------------------------------------------------------------------


def test_an_allocation_ends_with_its_connection(relay: Scenario, alice: StreamClient) -> None:
    bob = relay.peer("198.51.100.7:9000")
    alice.binds(0x4001, bob)
    alice.permits(bob)

    alice.disconnects()

    assert relay.server.allocations == relay.server.channels == relay.server.permissions == 0
    assert relay.network.sockets == {}
    assert relay.datapath.routes.to_peer == {}
    assert relay.datapath.routes.permitted == {}


def test_a_connection_ends_without_an_allocation(relay: Scenario) -> None:
    relay.stream_client("192.0.2.10:5000").disconnects()
    assert relay.sent() == []


def test_a_connection_is_in_use_while_it_has_an_allocation(relay: Scenario) -> None:
    side = relay.datapath.stream_clients
    alice = relay.stream_client("192.0.2.10:5000")
    assert not side.is_in_use(alice.address)
    alice.allocates(lifetime=600)
    assert side.is_in_use(alice.address)
    alice.refreshes(0)
    assert not side.is_in_use(alice.address)
    alice.allocates(lifetime=600)
    relay.passes(601)
    assert not side.is_in_use(alice.address)


def test_who_takes_over_leaves_the_connection_without_an_allocation() -> None:
    relay = Scenario(one_allocation_per_username=True)
    before = relay.stream_client("192.0.2.10:5000", user="alice").allocates()
    relay.passes(1)
    after = relay.stream_client("192.0.2.10:5001", user="alice").allocates()
    side = relay.datapath.stream_clients
    assert (side.is_in_use(before.address), side.is_in_use(after.address)) == (False, True)
    before.disconnects()
    assert relay.server.allocations == 1


# --- Framing ---------------------------------------------------------------------------------


def a_conversation(alice: StreamClient) -> bytes:
    """Return what a client sends in a life, as one stream."""
    messages = [
        alice.signed(Method.REFRESH, (Attr.LIFETIME, 600)),
        channel_data(0x4001, b""),
        channel_data(0x4001, b"a"),
        channel_data(0x4001, b"abc"),
        channel_data(0x4001, b"abcd"),
        channel_data(0x4001, b"efgh"),
        send_indication(("198.51.100.7", 9000), b"indicated"),
        BINDING,
        channel_data(0x4001, bytes(21)),
        channel_data(0x4002, b"nobody's"),
    ]
    return b"".join(map(padded, messages))


def prepared() -> tuple[Scenario, StreamClient]:
    relay = Scenario()
    alice = relay.stream_client("192.0.2.10:5000").allocates()
    bob = relay.peer("198.51.100.7:9000")
    alice.binds(0x4001, bob).permits(bob)
    return relay, alice


def what_came_of(relay: Scenario) -> tuple[object, ...]:
    sent = [one.payload if isinstance(one, ToPeer) else len(one.datagram) for one in relay.sent()]
    return sent, relay.dropped(), dict(relay.counters.by_transport["tcp"].to_peer)


def test_it_does_not_matter_where_reads_are_split() -> None:
    relay, alice = prepared()
    stream = a_conversation(alice)
    alice.streams(stream)
    expected = what_came_of(relay)
    for split in range(1, len(stream)):
        relay, alice = prepared()
        alice.streams(stream[:split])
        alice.streams(stream[split:])
        assert what_came_of(relay) == expected
        assert alice.unserved == 0


@settings(max_examples=50)
@given(st.lists(st.integers(1, 400)))
def test_nor_how_often(sizes: list[int]) -> None:
    relay, alice = prepared()
    stream = a_conversation(alice)
    alice.streams(stream)
    expected = what_came_of(relay)
    relay, alice = prepared()
    for size in sizes:
        alice.streams(stream[:size])
        stream = stream[size:]
    alice.streams(stream)
    assert what_came_of(relay) == expected


def test_byte_by_byte() -> None:
    relay, alice = prepared()
    stream = a_conversation(alice)
    alice.streams(stream)
    expected = what_came_of(relay)
    relay, alice = prepared()
    for at in range(len(stream)):
        alice.streams(stream[at : at + 1])
    assert what_came_of(relay) == expected


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x80\x00\x00\x00", id="neither STUN nor ChannelData"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01", id="TLS"),
        pytest.param(b"GET / HTTP/1.1\r\n", id="HTTP"),
        pytest.param(b"\x00\x01\x00\x02", id="STUN of an odd length"),
        pytest.param(b"\x00\x01\x00\x04\x21\x12\xa4\x43" + bytes(12), id="STUN without the cookie"),
        pytest.param(b"\x00\x03\x10\x00", id="a request of 4 KiB"),
        pytest.param(b"\x40\x01\x08\x00", id="ChannelData of 2 KiB, without an allocation"),
        pytest.param(b"\x40\x01\x08\x00" + bytes(2048), id="the same, and all of it"),
    ],
)
def test_what_has_no_end_ends_the_connection(relay: Scenario, data: bytes) -> None:
    alice = relay.stream_client("192.0.2.10:5000")
    with pytest.raises(Broken):
        alice.streams(data)
    alice = relay.stream_client("192.0.2.10:5000")
    alice.sends(BINDING)
    with pytest.raises(Broken):
        alice.streams(data)


def test_what_no_datagram_could_carry_ends_the_connection(alice: StreamClient) -> None:
    alice.streams(b"\x40\x01\xff\xf8")  # 65,528 bytes, with a header and padding 65,532
    with pytest.raises(Broken):
        alice.streams(bytes(65528) + b"\x40\x01\xff\xff")


def test_what_is_not_bound_is_dropped(relay: Scenario, alice: StreamClient) -> None:
    alice.sends_data(0x4002, b"not bound")
    alice.sends_data(0x5000, b"not a channel of RFC 8656")
    alice.indicates(relay.peer("198.51.100.7:9000"), b"not permitted")
    alice.sends(bytes([0x01, 0x01]) + BINDING[2:])
    assert relay.sent() == []
    assert relay.dropped() == {
        "unbound_channel": 1,
        "unknown_protocol": 1,
        "no_permission": 1,
        "not_a_request": 1,
    }


def test_a_long_message_is_not_served(relay: Scenario, alice: StreamClient) -> None:
    attribute = b"\x80\x22\x08\x00" + bytes(2048)  # SOFTWARE
    alice.streams(b"\x00\x01" + len(attribute).to_bytes(2, "big") + BINDING[4:] + attribute)
    assert relay.sent() == []
    assert relay.dropped() == {"oversized_stun": 1}


# --- Many messages at once -------------------------------------------------------------------


def test_messages_that_are_alike_are_relayed_at_once(relay: Scenario, alice: StreamClient) -> None:
    bob = relay.peer("198.51.100.7:9000")
    alice.binds(0x4001, bob)
    payloads = [bytes([number]) * 101 for number in range(10)]
    stream = b"".join(padded(channel_data(0x4001, payload)) for payload in payloads)
    relay.network.at_once.clear()

    alice.streams(stream + padded(channel_data(0x4001, b"shorter")))

    assert relay.network.at_once == [10]
    assert relay.sent() == [relayed(alice, bob, payload) for payload in [*payloads, b"shorter"]]
    assert relay.counters.by_transport["tcp"].to_peer == {101: 10, 7: 1}
    assert relay.counters.batches == {10: 1}


def test_what_cannot_be_sent_at_once_is_sent_one_by_one(
    relay: Scenario, alice: StreamClient
) -> None:
    bob = relay.peer("198.51.100.7:9000")
    alice.binds(0x4001, bob)
    relay.network.takes = 3
    alice.streams(channel_data(0x4001, b"four") * 10)
    assert relay.sent() == [relayed(alice, bob, b"four")] * 10
    assert relay.counters.by_transport["tcp"].to_peer == {4: 10}


@pytest.mark.parametrize(
    ("message", "most"),
    [
        pytest.param(channel_data(0x4001, b"four") + BINDING, SHARE // SINGLE, id="one by one"),
        pytest.param(channel_data(0x4001, b"four"), SHARE, id="a run"),
        pytest.param(channel_data(0x4001, b""), SHARE // SINGLE, id="nothing at all"),
        pytest.param(channel_data(0x4002, b"four"), SHARE // SINGLE, id="not bound"),
        pytest.param(BINDING, SHARE // SINGLE, id="requests"),
    ],
)
def test_others_have_their_turn_after_so_many(
    relay: Scenario, alice: StreamClient, message: bytes, most: int
) -> None:
    """64 KiB of tiny messages would hold everybody else up."""
    alice.binds(0x4001, relay.peer("198.51.100.7:9000"))
    alice.streams(message * 400)

    served = len(relay.sent()) + sum(relay.dropped().values())
    assert served <= most + RUN
    assert alice.then is Then.AGAIN
    alice.has_its_turns()
    assert (alice.then, alice.unserved) == (Then.MORE, 0)


def test_trains_from_a_peer_reach_the_client(relay: Scenario, alice: StreamClient) -> None:
    bob = relay.peer("198.51.100.7:9000")
    alice.binds(0x4001, bob)
    relay.receives_segments_from_peer(bytes(250), 100, bob.address, alice.relayed_address)
    frames = [channel_data(0x4001, bytes(size)) for size in (100, 100, 50)]
    assert relay.sent() == [to(alice, frame) for frame in frames]
    assert relay.counters.by_transport["tcp"].to_client == {100: 2, 50: 1}


# --- Limits ----------------------------------------------------------------------------------


def test_a_request_waits_while_the_client_does_not_read(
    relay: Scenario, alice: StreamClient
) -> None:
    """Over TCP nobody asks again, so no answer may be lost."""
    bob = relay.peer("198.51.100.7:9000")
    alice.binds(0x4001, bob)
    alice.stream.is_clogged = True
    alice.streams(channel_data(0x4001, b"data") + BINDING + channel_data(0x4001, b"behind it"))
    assert relay.sent() == [relayed(alice, bob, b"data")]
    assert alice.then is Then.LATER

    alice.stream.is_clogged = False
    alice.streams(bytes(3))  # the padding that was still to come
    answer, data = relay.sent()
    assert answer.client == alice.address  # type: ignore[union-attr]
    assert data == relayed(alice, bob, b"behind it")


def test_too_many_requests_wait(relay: Scenario, alice: StreamClient) -> None:
    alice.streams(BINDING * 600)
    alice.has_its_turns()
    answered = len(relay.sent())
    assert alice.then is Then.LATER
    assert 490 < answered < 600
    relay.passes(seconds=2)
    alice.streams(b"")
    alice.has_its_turns()
    assert answered + len(relay.sent()) == 600
    assert relay.dropped() == {}


def test_connections_are_work_that_is_bounded() -> None:
    """A handshake is worth many requests."""
    relay = Scenario(unauthenticated_rate=1000)
    opened = {"tcp": 0, "tls": 0}
    for transport in opened:
        for number in range(1000):
            client = relay.stream_client(f"198.51.100.{number % 250}:{number}", transport=transport)
            if client.is_refused:
                break
            opened[transport] += 1
        relay.passes(seconds=10)
    assert 100 < opened["tcp"] < 500
    assert opened["tls"] == pytest.approx(opened["tcp"] / 10, abs=2)


def test_a_connection_proves_its_address() -> None:
    """So requests over it are counted with those that hold a nonce."""
    relay = Scenario(unauthenticated_rate_per_prefix=1)
    for number in range(5):  # of the prefix, forged: all that it may ask for
        relay.client(f"192.0.2.{number}:5000").sends(BINDING)
    relay.sent()
    relay.client("192.0.2.9:5000").sends(BINDING)
    relay.client("192.0.2.9:5000").sends(BINDING)
    assert len(relay.sent()) < 2
    alice = relay.stream_client("192.0.2.10:5000")
    alice.sends(BINDING)
    assert len(relay.sent()) == 1


def test_a_forged_source_port_is_no_source_of_the_relay(relay: Scenario) -> None:
    """A datagram from a relay port is the relay's own; a connection from that number is not."""
    bob = relay.client("192.0.2.11:5000").allocates()
    host, port = bob.relayed_address
    local = relay.stream_client(f"{host}:{port}")
    local.asks(Method.ALLOCATE, ASKS_FOR_UDP)
    assert relay.dropped() == {}


def test_draining_refuses_new_allocations(relay: Scenario, alice: StreamClient) -> None:
    relay.drain()
    answer = alice.asks(Method.REFRESH)
    assert answer.code is None
    bob = relay.stream_client("192.0.2.11:5000")
    answer = bob.asks(Method.ALLOCATE, ASKS_FOR_UDP)
    assert answer.code == 508


@given(st.lists(st.binary(max_size=60)))
def test_any_bytes_are_served_or_end_the_connection(parts: list[bytes]) -> None:
    relay = Scenario()
    alice = relay.stream_client("192.0.2.10:5000")
    try:
        for part in parts:
            alice.streams(part)
    except Broken:
        pass
    alice.disconnects()
