"""Segments of one read (GRO) are relayed as if they had come one by one.

Two relays are in the same state. One is handed segments, the other the same datagrams one by one;
then both must have sent the same bytes to the same places in the same order, and counted the
same.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.stun.attributes import Attr
from relay.stun.const import Family, Kind, Method
from relay.stun.message import Message
from relay.turn.channeldata import HEADER, HEADER_SIZE
from tests.scenario import Client, Peer, Scenario, channel_data, parse, relayed, to

TO_BOB, TO_SIX, TO_CAROL, UNBOUND, TO_LATER = 0x4000, 0x4001, 0x4002, 0x4003, 0x4004
NUMBERS = (TO_BOB, TO_SIX, TO_CAROL, UNBOUND)
LARGEST = 65507  # payload of the largest UDP datagram over IPv4


class Setting:
    """A relay, clients alice and carol, and peers bob and six; alice has channels to all."""

    def __init__(self) -> None:
        self.relay = Scenario()
        self.carol = self.relay.client("192.0.2.11:5000").allocates()
        self.bob = self.relay.peer("198.51.100.7:9000")
        self.six = self.relay.peer("[2001:db8::7]:9000")
        self.alice = self.relay.client("192.0.2.10:5000").allocates(
            (Attr.ADDITIONAL_ADDRESS_FAMILY, Family.IPV6)
        )
        self.alice.binds(TO_BOB, self.bob)
        self.alice.binds(TO_SIX, self.six)
        self.alice.binds(TO_CAROL, self.carol.relayed_address)
        self.carol.binds(0x4FFF, self.alice.relayed_address)
        self.relay.sent()
        self.relay.dropped()

    def outcome(self) -> object:
        counters = self.relay.counters
        return self.relay.sent(), counters.to_peer, counters.to_client, self.relay.dropped()


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, list[int]]:
    """The size of a segment, and of each datagram: the last may be shorter."""
    size = draw(
        st.one_of(st.integers(1, 40), st.integers(41, 1500), st.sampled_from([511, 9000, 40_000]))
    )
    most = min(128, LARGEST // size)
    count = draw(st.one_of(st.integers(1, most), st.sampled_from([most, min(64, most)])))
    last = draw(st.one_of(st.just(size), st.integers(1, size)))
    if size * (count - 1) + last > LARGEST:
        last = size
    return size, [size] * (count - 1) + [last]


@st.composite
def segments_from_client(draw: st.DrawFn) -> tuple[int, list[bytes]]:
    """Mostly runs of ChannelData of one channel and length, with all kinds of things between."""
    size, lengths = draw(sizes())
    datagrams: list[bytes] = []
    while len(datagrams) < len(lengths):
        number = draw(st.sampled_from(NUMBERS))
        padding = draw(st.sampled_from([0, 0, 0, 1, 3, size]))
        kind = draw(st.sampled_from(["data", "data", "data", "stun", "garbage", "malformed"]))
        for _ in range(draw(st.integers(1, 128))):
            if len(datagrams) == len(lengths):
                break
            filler = bytes([len(datagrams)])
            length = lengths[len(datagrams)]
            if kind == "data" and length >= HEADER_SIZE:
                payload = max(0, length - HEADER_SIZE - padding)
                datagram = HEADER.pack(number, payload).ljust(length, filler)
            elif kind == "stun" and length >= 24 and length % 4 == 0:
                datagram = binding_request(length, len(datagrams))
            elif kind == "malformed" and length >= HEADER_SIZE:
                datagram = HEADER.pack(number, length).ljust(length, filler)
            else:
                datagram = bytes([draw(st.sampled_from([0, 3, 0x20, 0x50, 0xFF]))]) * length
            datagrams.append(datagram)
    return size, datagrams


@settings(deadline=None)
@given(segments_from_client(), st.sampled_from([1000, 64, 5, 1, 0]))
def test_from_a_client(segments: tuple[int, list[bytes]], takes: int) -> None:
    """Also where the kernel takes only the first few of the segments."""
    size, datagrams = segments
    at_once, one_by_one = Setting(), Setting()
    at_once.relay.network.takes = takes

    arrives_from_client(at_once, size, datagrams)
    for datagram in datagrams:
        one_by_one.alice.sends(datagram)

    assert at_once.outcome() == one_by_one.outcome()


@pytest.mark.parametrize("number", NUMBERS)
def test_a_read_that_is_shorter_than_one_segment(number: int) -> None:
    """No kernel hands over such a thing."""
    at_once, one_by_one = Setting(), Setting()

    arrives_from_client(at_once, 1000, [channel_data(number, b"hi")])
    one_by_one.alice.sends(channel_data(number, b"hi"))

    assert at_once.outcome() == one_by_one.outcome()


@settings(deadline=None)
@given(sizes(), st.sampled_from([1000, 64, 5, 1, 0]), st.sampled_from(["bob", "six", "mallory"]))
def test_from_a_peer(segments: tuple[int, list[int]], takes: int, name: str) -> None:
    size, lengths = segments
    datagrams = [bytes([index]) * length for index, length in enumerate(lengths)]
    at_once, one_by_one = Setting(), Setting()
    at_once.relay.network.takes = takes

    setting = at_once
    for setting in (at_once, one_by_one):
        peers = {"bob": setting.bob, "six": setting.six}
        peer = peers.get(name) or setting.relay.peer("198.51.100.99:9000")
        relayed_address = setting.alice.relayed_addresses[1 if peer is setting.six else 0]
        if setting is at_once:
            setting.relay.receives_segments_from_peer(
                b"".join(datagrams), size, peer.address, relayed_address
            )
        else:
            for datagram in datagrams:
                peer.sends(datagram, to=relayed_address)

    assert at_once.outcome() == one_by_one.outcome()


@settings(deadline=None, max_examples=30)
@given(st.randoms(use_true_random=False), st.integers(0, 1))
def test_a_command_among_segments_counts_for_what_comes_after_it(
    dice: random.Random, ends: int
) -> None:
    """A channel is bound, or the whole allocation ends, between data of the same size."""
    at_once, one_by_one = Setting(), Setting()
    alice = at_once.alice
    if ends:
        request = alice.signed(Method.REFRESH, (Attr.LIFETIME, 0))
    else:
        request = alice.signed(
            Method.CHANNEL_BIND,
            (Attr.CHANNEL_NUMBER, TO_LATER),
            (Attr.XOR_PEER_ADDRESS, parse("198.51.100.8:9000")),
        )
    datagrams = [
        channel_data(number, b"%d" % index).ljust(len(request))
        for index, number in enumerate(dice.choices((TO_BOB, TO_LATER), k=20))
    ]
    datagrams.insert(dice.randrange(20), request)

    arrives_from_client(at_once, len(request), datagrams)
    for datagram in datagrams:
        one_by_one.alice.sends(datagram)

    assert at_once.outcome() == one_by_one.outcome()


ODD = [
    pytest.param((TO_BOB + 1, 300), id="number"),
    pytest.param((TO_BOB + 0x100, 300), id="number, first byte"),
    pytest.param((TO_BOB & 0xFF, 300), id="STUN"),
    pytest.param((TO_BOB, 301), id="length"),
    pytest.param((TO_BOB, 300 + 0x100), id="length, first byte"),
    pytest.param((TO_BOB, 0), id="empty"),
    pytest.param((TO_BOB, 0xFFFF), id="malformed"),
]


@pytest.mark.parametrize("place", [0, 3, 7])
@pytest.mark.parametrize("odd", ODD)
def test_one_odd_header_among_others(odd: tuple[int, int], place: int) -> None:
    """The datagrams are longer than their payloads, so all of these are in order but the last."""
    at_once, one_by_one = Setting(), Setting()
    datagrams = [HEADER.pack(TO_BOB, 300) + bytes([index]) * 600 for index in range(8)]
    datagrams[place] = HEADER.pack(*odd) + bytes([place]) * 600

    arrives_from_client(at_once, 604, datagrams)
    for datagram in datagrams:
        one_by_one.alice.sends(datagram)

    assert at_once.outcome() == one_by_one.outcome()


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_header_at_the_end_of_a_shorter_datagram(odd: tuple[int, int]) -> None:
    at_once, one_by_one = Setting(), Setting()
    datagrams = [HEADER.pack(TO_BOB, 300) + bytes([index]) * 700 for index in range(8)]
    datagrams[-1] = HEADER.pack(*odd) + b"x" * 600

    arrives_from_client(at_once, 704, datagrams)
    for datagram in datagrams:
        one_by_one.alice.sends(datagram)

    assert at_once.outcome() == one_by_one.outcome()


# --- What is sent at once, and counted once ------------------------------------------------


@pytest.fixture
def setting() -> Setting:
    return Setting()


def test_segments_to_a_peer_are_sent_at_once(setting: Setting) -> None:
    """The last payload is shorter; all are padded."""
    payloads = [bytes([number]) * 160 for number in range(31)] + [b"last"]
    datagrams = [channel_data(TO_BOB, payload) for payload in payloads]
    datagrams = [datagram + bytes(4) for datagram in datagrams]

    arrives_from_client(setting, 168, datagrams)

    assert setting.relay.sent() == [
        relayed(setting.alice, setting.bob, payload) for payload in payloads
    ]
    assert setting.relay.network.at_once == [32]
    assert setting.relay.counters.batches == {32: 1}
    assert setting.relay.counters.to_peer == {160: 31, 4: 1}


def test_segments_to_a_client_are_sent_at_once(setting: Setting) -> None:
    payloads = [bytes([number]) * 1200 for number in range(31)] + [b"last"]

    arrives_from_peer(setting.relay, 1200, payloads, setting.bob, setting.alice)

    assert setting.relay.sent() == [
        to(setting.alice, channel_data(TO_BOB, payload)) for payload in payloads
    ]
    assert setting.relay.network.at_once == [32]
    assert setting.relay.counters.batches == {32: 1}
    assert setting.relay.counters.to_client == {1200: 31, 4: 1}


def test_segments_between_two_clients_of_this_relay_are_sent_at_once(setting: Setting) -> None:
    payloads = [bytes([number]) * 100 for number in range(10)]

    arrives_from_client(setting, 104, [channel_data(TO_CAROL, payload) for payload in payloads])

    assert setting.relay.sent() == [
        to(setting.carol, channel_data(0x4FFF, payload)) for payload in payloads
    ]
    assert setting.relay.network.at_once == [10]
    assert setting.relay.counters.to_peer == {100: 10}
    assert setting.relay.counters.to_client == {100: 10}


def test_segments_that_the_kernel_refuses_are_sent_one_by_one(setting: Setting) -> None:
    payloads = [bytes([number]) * 100 for number in range(10)]
    setting.relay.network.takes = 4

    arrives_from_client(setting, 104, [channel_data(TO_BOB, payload) for payload in payloads])

    assert setting.relay.sent() == [
        relayed(setting.alice, setting.bob, payload) for payload in payloads
    ]
    assert setting.relay.counters.batches == {4: 1}
    assert setting.relay.counters.to_peer == {100: 10}


def test_segments_that_are_lost_are_not_counted_as_relayed(setting: Setting) -> None:
    setting.relay.network.is_full = True

    arrives_from_client(setting, 104, [channel_data(TO_BOB, bytes(100))] * 10)
    arrives_from_peer(setting.relay, 100, [bytes(100)] * 10, setting.bob, setting.alice)

    assert setting.relay.counters.batches == {}
    assert setting.relay.counters.to_peer == {}
    assert setting.relay.counters.to_client == {}


def arrives_from_client(setting: Setting, size: int, datagrams: list[bytes]) -> None:
    setting.relay.receives_segments_from_client(b"".join(datagrams), size, setting.alice.address)


def arrives_from_peer(
    relay: Scenario, size: int, payloads: list[bytes], peer: Peer, client: Client
) -> None:
    relay.receives_segments_from_peer(
        b"".join(payloads), size, peer.address, client.relayed_address
    )


def binding_request(length: int, number: int) -> bytes:
    """A Binding request of *length* bytes, filled up with SOFTWARE."""
    software = "x" * (length - 24)
    message = Message(
        Kind.REQUEST, Method.BINDING, number.to_bytes(12, "big"), [(Attr.SOFTWARE, software)]
    )
    encoded = message.encode()
    assert len(encoded) == length
    return encoded
