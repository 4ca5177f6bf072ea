"""The program in the kernel relays what is plain, byte for byte, and hands up all else as it came.

Each frame is run through the program by the kernel, with every compiler's build there is.
"""

import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contrib.program import OBJECT
from relay.observe.counters import PACKET_SIZES
from relay.stun.const import Family
from tests import xdpbed
from tests.frames import ARP, DO_NOT_FRAGMENT, MORE_FRAGMENTS, Datagram
from tests.scenario import channel_data
from tests.xdpbed import (
    CLIENTS,
    MTU,
    NOBODY,
    PEERS,
    RELAYED,
    VERDICTS,
    Bed,
    Channel,
)

ALL_FAMILIES = [
    pytest.param(client, peer, id=f"{client.name} client, {peer.name} peer")
    for client in Family
    for peer in Family
]
SIZES = (*range(40), 100, 511, 512, 1024, 1199, 1200, 1280, 1400, 1428)
IP_HEADER = {Family.IPV4: 20, Family.IPV6: 40}
NUMBER = 0x4001


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    xdpbed.needs_bpf()
    with xdpbed.network() as name:
        yield name


@pytest.fixture(scope="module", params=["committed", "clang", "gcc"])
def path(
    request: pytest.FixtureRequest,
    namespace: str,  # noqa: ARG001 - in which it is run
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The object that is committed, and those that the compilers on this machine make."""
    if request.param == "committed":
        return OBJECT
    return xdpbed.compiled(request.param, tmp_path_factory.mktemp("object"))


@pytest.fixture
def bed(path: Path) -> Iterator[Bed]:
    with Bed(path) as bed:
        yield bed


def channel(
    client: Family = Family.IPV4,
    peer: Family = Family.IPV4,
    number: int = NUMBER,
    port: int = 50000,
) -> Channel:
    return Channel(CLIENTS[client], number, port, PEERS[peer])


def up(channel: Channel, payload: bytes, **fields: object) -> Datagram:
    """What the client sends to the relay."""
    return Datagram(source=channel.client, to=channel.listening, payload=payload).but(**fields)


def down(channel: Channel, payload: bytes, **fields: object) -> Datagram:
    """What the peer sends to the relay."""
    return Datagram(source=channel.peer, to=channel.relayed, payload=payload).but(**fields)


# --- What is relayed ------------------------------------------------------------------------


@pytest.mark.parametrize(("client", "peer"), ALL_FAMILIES)
def test_relays_both_ways(bed: Bed, client: Family, peer: Family) -> None:
    bound = bed.bind(channel(client, peer))
    rng = random.Random(1)
    for size in SIZES:
        payload = rng.randbytes(size)
        to_peer = bed.relays(up(bound, channel_data(NUMBER, payload), tos=0x2E).frame())
        assert to_peer == Datagram(
            source=bound.relayed, to=bound.peer, payload=payload, ttl=63, tos=0x2E
        )
        to_client = bed.relays(down(bound, payload, tos=0xB9, ttl=2).frame())
        assert to_client == Datagram(
            source=bound.listening,
            to=bound.client,
            payload=channel_data(NUMBER, payload),
            ttl=1,
            tos=0xB9,
        )


def test_frame_goes_to_the_next_hop(bed: Bed) -> None:
    bound = bed.bind(channel())
    for datagram, device, mac in (
        (up(bound, channel_data(NUMBER, b"x")), "towards1", xdpbed.MAC_OF_PEERS),
        (down(bound, b"x"), "towards0", xdpbed.MAC_OF_CLIENTS),
    ):
        _, left, _ = bed.program.run(datagram.frame())
        assert left[:6] == bytes.fromhex(mac.replace(":", ""))
        assert left[6:12] == xdpbed.mac_of(device)


@pytest.mark.parametrize(("client", "peer"), ALL_FAMILIES)
@pytest.mark.parametrize("padding", [1, 2, 3])
def test_padding_is_not_relayed(bed: Bed, client: Family, peer: Family, padding: int) -> None:
    """RFC 8656 §12.5: over UDP it may be there. Here it may be of any kind."""
    bound = bed.bind(channel(client, peer))
    rng = random.Random(padding)
    for size in (*range(12), 1199, 1200):
        payload = rng.randbytes(size)
        padded = channel_data(NUMBER, payload) + rng.randbytes(padding)
        assert bed.relays(up(bound, padded).frame()).payload == payload


def test_datagrams_without_a_checksum_go_on_without_one(bed: Bed) -> None:
    bound = bed.bind(channel())
    unchecked = up(bound, channel_data(NUMBER, b"x"), has_checksum=False)
    assert not bed.relays(unchecked.frame()).has_checksum
    assert not bed.relays(down(bound, b"x", has_checksum=False).frame()).has_checksum


@pytest.mark.parametrize(("client", "peer"), ALL_FAMILIES)
def test_a_wrong_checksum_stays_wrong(bed: Bed, client: Family, peer: Family) -> None:
    """Else what was damaged on its way here would look good to its receiver."""
    bound = bed.bind(channel(client, peer))
    for datagram in (up(bound, channel_data(NUMBER, b"abcdef")), down(bound, b"abcdef")):
        frame = bytearray(datagram.frame())
        frame[-1] ^= 0x10
        verdict, left, _ = bed.program.run(bytes(frame))
        assert VERDICTS[verdict] == "redirect"
        with pytest.raises(AssertionError, match="checksum of UDP"):
            Datagram.of(left)


def test_a_checksum_that_comes_to_zero_is_written_as_ones(bed: Bed) -> None:
    """RFC 768: zero would say that there is none."""
    for peer in Family:
        bound = bed.bind(channel(Family.IPV4, peer))
        relayed = Datagram(source=bound.relayed, to=bound.peer, payload=bytes(2))
        size = 14 + IP_HEADER[peer] + 8
        check_at = size - 2
        payload = relayed.frame()[check_at:size]  # as its own payload, it makes the sum come out
        frame = bed.program.run(up(bound, channel_data(NUMBER, payload)).frame())[1]
        assert frame[check_at:size] == b"\xff\xff"
        assert Datagram.of(frame).payload == payload
        bed.unbind(bound)


@pytest.mark.parametrize("number", [0x4000, 0x4FFF, 0x5000, 0x7FFF])
def test_all_channel_numbers(bed: Bed, number: int) -> None:
    bound = bed.bind(channel(number=number))
    assert bed.relays(up(bound, channel_data(number, b"x")).frame()).payload == b"x"
    assert bed.relays(down(bound, b"x").frame()).payload == channel_data(number, b"x")


def test_what_a_peer_sends_may_look_like_channel_data(bed: Bed) -> None:
    bound = bed.bind(channel())
    payload = channel_data(NUMBER, b"x")
    assert bed.relays(down(bound, payload).frame()).payload == channel_data(NUMBER, payload)


def test_ethernet_may_pad_the_frame(bed: Bed) -> None:
    bound = bed.bind(channel())
    frame = up(bound, channel_data(NUMBER, b"x")).frame(behind=bytes(13))
    assert bed.relays(frame).payload == b"x"
    assert bed.relays(down(bound, b"x").frame(behind=bytes(17))).payload == channel_data(
        NUMBER, b"x"
    )


def test_df_and_a_flow_label_are_not_relayed(bed: Bed) -> None:
    """The sockets send neither: RFC 8656 §14 wants DF clear. Datagram.of() looks."""
    for family in Family:
        bound = bed.bind(channel(family, family))
        for datagram in (up(bound, channel_data(NUMBER, b"x")), down(bound, b"x")):
            bed.relays(datagram.frame(fragment=DO_NOT_FRAGMENT, flow_label=0xFFFFF))
        bed.unbind(bound)


def test_without_copying_dscp_and_ecn_there_are_none(path: Path) -> None:
    with Bed(path, copies_tos=False) as bed:
        for family in Family:
            bound = bed.bind(channel(family, family))
            assert bed.relays(up(bound, channel_data(NUMBER, b"x"), tos=0xB9).frame()).tos == 0
            assert bed.relays(down(bound, b"x", tos=0xB9).frame()).tos == 0
            bed.unbind(bound)


def test_clients_are_told_apart(bed: Bed) -> None:
    """The same number, and the same peer, in two clients' channels. RFC 8656 §12."""
    alice = bed.bind(Channel(("192.0.2.10", 5000), NUMBER, 50000, PEERS[Family.IPV4]))
    bob = bed.bind(Channel(("192.0.2.10", 5001), NUMBER, 50001, PEERS[Family.IPV4]))
    carol = bed.bind(Channel(("192.0.2.11", 5000), NUMBER, 50002, ("198.51.100.8", 9000)))
    for each in (alice, bob, carol):
        assert bed.relays(up(each, channel_data(NUMBER, b"x")).frame()).source == each.relayed
        assert bed.relays(down(each, b"x").frame()).to == each.client

    bed.unbind(alice)
    for datagram in (up(alice, channel_data(NUMBER, b"x")), down(alice, b"x")):
        bed.passes(datagram.frame())
    for each in (bob, carol):
        assert bed.relays(up(each, channel_data(NUMBER, b"x")).frame()).source == each.relayed
        assert bed.relays(down(each, b"x").frame()).to == each.client


def test_a_port_has_nothing_of_who_had_it_before(bed: Bed) -> None:
    alice = bed.bind(channel())
    bed.relays(down(alice, b"x").frame())
    bed.unbind(alice)
    bob = Channel(("192.0.2.11", 5000), 0x4002, alice.port, ("198.51.100.8", 9000))
    bed.bind(bob)

    bed.passes(down(alice, b"for alice").frame())
    bed.passes(up(alice, channel_data(NUMBER, b"x")).frame())
    assert bed.relays(down(bob, b"x").frame()).to == bob.client


def test_counts_payload_by_direction_and_size(bed: Bed) -> None:
    """In the classes of the metrics: up to each bound, and beyond the last one."""
    bound = bed.bind(channel())
    sizes = sorted({0, *PACKET_SIZES, *(size + 1 for size in PACKET_SIZES)} - {1500, 1501})
    for size in sizes:
        bed.relays(up(bound, channel_data(NUMBER, bytes(size))).frame())
    bed.relays(down(bound, bytes(100)).frame())
    bed.passes(down(bound, bytes(1472)).frame())

    expected = [
        [size for size in sizes if low < size <= high]
        for low, high in zip((-1, *PACKET_SIZES), (*PACKET_SIZES, 65535), strict=True)
    ]
    counts = bed.counts()
    assert counts[:8] == [(len(each), sum(each)) for each in expected]
    assert counts[8:] == [(0, 0), (1, 100), *[(0, 0)] * 6]


# --- To another allocation of this relay ----------------------------------------------------


def between_two(bed: Bed, other: Family = Family.IPV6) -> tuple[Channel, Channel]:
    """Bind two clients of this relay, each to the other's relayed address."""
    hosts = {Family.IPV4: "192.0.2.11", Family.IPV6: "2001:db8:1::11"}
    public = RELAYED[Family.IPV4]
    alice = Channel(CLIENTS[Family.IPV4], 0x4100, 50001, (public, 50002))
    bob = Channel((hosts[other], 7000), 0x4200, 50002, (public, 50001))
    return bed.bind(alice), bed.bind(bob)


@pytest.mark.parametrize("other", Family, ids=lambda family: family.name)
def test_from_one_allocation_to_another(bed: Bed, other: Family) -> None:
    alice, bob = between_two(bed, other)
    for size in (0, 1, 5, 1200):
        payload = random.Random(size).randbytes(size)
        for here, there in ((alice, bob), (bob, alice)):
            relayed = bed.relays(up(here, channel_data(here.number, payload), tos=0x2E).frame())
            assert relayed == Datagram(
                source=there.listening,
                to=there.client,
                payload=channel_data(there.number, payload),
                ttl=63,
                tos=0x2E,
            )


def test_whether_the_other_one_is_there_is_for_the_sockets_to_say(bed: Bed) -> None:
    alice, bob = between_two(bed)
    bed.unbind(bob)
    bed.passes(up(alice, channel_data(alice.number, b"x")).frame())


def test_nobody_is_relayed_to_itself_without_end(bed: Bed) -> None:
    """A client that binds its own relayed address reaches itself, once."""
    itself = Channel(CLIENTS[Family.IPV4], NUMBER, 50001, (RELAYED[Family.IPV4], 50001))
    bed.bind(itself)
    relayed = bed.relays(up(itself, channel_data(NUMBER, b"x")).frame())
    assert (relayed.to, relayed.payload) == (itself.client, channel_data(NUMBER, b"x"))


# --- What is handed up ----------------------------------------------------------------------

BOUND = channel()
SIX = channel(Family.IPV6, Family.IPV6)
ACROSS = channel(Family.IPV4, Family.IPV6, 0x4002, 50001)
DATA = channel_data(NUMBER, b"abcdefgh")
UP, DOWN, UP_SIX = up(BOUND, DATA), down(BOUND, b"abcdefgh"), up(SIX, DATA)
DOWN_SIX = down(SIX, b"abcdefgh")
HANDED_UP = {
    "unfinished checksum": UP.frame(partial_checksum=True),
    "unfinished checksum from a peer": DOWN.frame(partial_checksum=True),
    "unfinished checksum of IPv6": UP_SIX.frame(partial_checksum=True),
    "no checksum, from IPv4 to IPv6": up(
        ACROSS, channel_data(0x4002, b"a"), has_checksum=False
    ).frame(),
    "no checksum of IPv6": UP_SIX.but(has_checksum=False).frame(),
    "TTL 1": UP.but(ttl=1).frame(),
    "TTL 0": UP.but(ttl=0).frame(),
    "hop limit 1": UP_SIX.but(ttl=1).frame(),
    "first fragment": UP.frame(fragment=MORE_FRAGMENTS),
    "later fragment": UP.frame(fragment=5),
    "last fragment": UP.frame(fragment=0x1FFF),
    "first fragment from a peer": DOWN.frame(fragment=MORE_FRAGMENTS),
    "IPv4 options": UP.frame(options=b"\1\1\1\1"),
    "most IPv4 options": UP.frame(options=b"\1" * 40),
    "wrong checksum of the IPv4 header": UP.frame(header_checksum=0x1234),
    "no checksum of the IPv4 header": UP.frame(header_checksum=0),
    "IPv6 extension header": UP_SIX.frame().replace(b"\x11\x40 \x01", b"\x3c\x40 \x01", 1),
    "VLAN tag": UP.frame(vlan=b"\x81\0\0\5"),
    "VLAN tag of priority only": UP.frame(vlan=b"\x81\0\x20\0"),
    "two VLAN tags": UP.frame(vlan=b"\x88\xa8\0\5\x81\0\0\6"),
    "another channel": up(BOUND, channel_data(0x4003, b"a")).frame(),
    "no channel number": up(BOUND, channel_data(0x8001, b"a")).frame(),
    "another port of the client": UP.but(source=("192.0.2.10", 5001)).frame(),
    "another host": UP.but(source=("192.0.2.11", 5000)).frame(),
    "another address of ours": UP.but(to=("198.51.100.1", 3478)).frame(),
    "another port of ours": UP.but(to=("192.0.2.1", 3479)).frame(),
    "source port 0": UP.but(source=("192.0.2.10", 0)).frame(),
    "length beyond the datagram": up(BOUND, struct.pack("!HH", NUMBER, 9) + b"a" * 8).frame(),
    "length of 0xFFFF": up(BOUND, struct.pack("!HH", NUMBER, 0xFFFF) + b"a" * 8).frame(),
    "length that wraps": up(BOUND, struct.pack("!HH", NUMBER, 0xFFFD) + b"a" * 8).frame(),
    "length of 0x8008": up(BOUND, struct.pack("!HH", NUMBER, 0x8008) + b"a" * 8).frame(),
    "four bytes behind the payload": up(BOUND, DATA + bytes(4)).frame(),
    "many bytes behind the payload": up(BOUND, DATA + bytes(400)).frame(),
    "bytes behind a long datagram": up(BOUND, channel_data(NUMBER, bytes(100))).frame() + bytes(9),
    "no whole header": up(BOUND, b"\x40\x01\0").frame(),
    "empty datagram": up(BOUND, b"").frame(),
    "STUN": up(BOUND, b"\0\1\0\0" + bytes(16)).frame(),
    "STUN from an unbound peer": DOWN.but(source=("198.51.100.7", 9001), payload=b"\0\1").frame(),
    "UDP length shorter than IP's": UP.frame(udp_length=12),
    "UDP length of 7": UP.frame(udp_length=7),
    "UDP length of 0": UP.frame(udp_length=0),
    "UDP length beyond IP's": UP.frame(udp_length=90),
    "UDP length beyond IPv6's": UP_SIX.frame(udp_length=90),
    "truncated frame": UP.frame()[:-1],
    "truncated frame of IPv6": UP_SIX.frame()[:-1],
    "no whole UDP header": UP.frame()[: 14 + 20 + 7],
    "no whole IPv4 header": UP.frame()[: 14 + 19],
    "no whole IPv6 header": UP_SIX.frame()[: 14 + 39],
    "nothing but Ethernet": UP.frame()[:14],
    "multicast": UP.frame(destination=bytes.fromhex("01005e000001")),
    "broadcast": UP.frame(destination=b"\xff" * 6),
    "ARP": UP.frame()[:12] + ARP.to_bytes(2) + bytes(46),
    "TCP": UP.frame()[:23] + b"\6" + UP.frame()[24:],
    "ICMP": UP.frame()[:23] + b"\1" + UP.frame()[24:],
    "ICMPv6": UP_SIX.frame()[:20] + b"\x3a" + UP_SIX.frame()[21:],
    "IPv6 under the type of IPv4": UP_SIX.frame()[:12] + b"\x08\0" + UP_SIX.frame()[14:],
    "IPv4 under the type of IPv6": UP.frame()[:12] + b"\x86\xdd" + UP.frame()[14:],
    "another port of the peer": DOWN.but(source=("198.51.100.7", 9001)).frame(),
    "another relay port": DOWN.but(to=("198.51.100.1", 50009)).frame(),
    "DNS answer at a relay port": DOWN.but(source=("198.51.100.53", 53)).frame(),
    "peer's datagram that fits no more, framed": down(BOUND, bytes(1472)).frame(),
    "peer's datagram that fits no more over IPv6": down(SIX, bytes(1452)).frame(),
    "too large for IPv6": up(ACROSS, channel_data(0x4002, bytes(1456))).frame(),
    "IPv6 from a mapped address": up(
        BOUND, DATA, source=("::ffff:192.0.2.10", 5000), to=("::ffff:192.0.2.1", 3478)
    ).frame(),
}


@pytest.mark.parametrize("frame", HANDED_UP.values(), ids=HANDED_UP)
def test_is_handed_up_as_it_came(bed: Bed, frame: bytes) -> None:
    for bound in (BOUND, SIX, ACROSS):
        bed.bind(bound)
    bed.relays(UP.frame())
    bed.relays(DOWN_SIX.frame())
    before = bed.counts()

    bed.passes(frame)

    assert bed.counts() == before


@pytest.mark.parametrize(("client", "peer"), ALL_FAMILIES)
def test_what_just_fits_is_relayed(bed: Bed, client: Family, peer: Family) -> None:
    bound = bed.bind(channel(client, peer))
    most_up = MTU - IP_HEADER[peer] - 8
    assert (
        len(bed.relays(up(bound, channel_data(NUMBER, bytes(most_up))).frame()).payload) == most_up
    )
    bed.passes(up(bound, channel_data(NUMBER, bytes(most_up + 1))).frame())
    most_down = MTU - IP_HEADER[client] - 8 - 4
    assert len(bed.relays(down(bound, bytes(most_down)).frame()).payload) == most_down + 4
    bed.passes(down(bound, bytes(most_down + 1)).frame())


def test_a_peer_whose_neighbour_is_unknown(bed: Bed) -> None:
    """The sockets send then, and that makes the kernel ask for it."""
    bound = bed.bind(Channel(CLIENTS[Family.IPV4], NUMBER, 50000, (NOBODY, 9000)))
    bed.passes(up(bound, channel_data(NUMBER, b"x")).frame())


def test_a_peer_to_whom_there_is_no_way(bed: Bed) -> None:
    bound = bed.bind(Channel(CLIENTS[Family.IPV4], NUMBER, 50000, ("203.0.113.9", 9000)))
    bed.passes(up(bound, channel_data(NUMBER, b"x")).frame())


def test_a_peer_on_this_host(bed: Bed) -> None:
    bound = bed.bind(Channel(CLIENTS[Family.IPV4], NUMBER, 50000, ("192.0.2.1", 9000)))
    bed.passes(up(bound, channel_data(NUMBER, b"x")).frame())


def test_a_device_that_is_not_ours(path: Path) -> None:
    """Nothing leaves by a device at which the program is not."""
    with Bed(path, devices=("towards0",)) as bed:
        bound = bed.bind(channel())
        bed.passes(up(bound, channel_data(NUMBER, b"x")).frame())
        assert bed.relays(down(bound, b"x").frame()).to == bound.client


def test_an_address_that_this_host_has_no_longer(bed: Bed, namespace: str) -> None:
    """It is looked at together with the next hop, once a second."""
    bound = bed.bind(channel())
    with xdpbed.without_address(namespace, "198.51.100.1/24", "towards1", then="198.51.100.2/24"):
        bed.passes(up(bound, channel_data(NUMBER, b"x")).frame())
    assert bed.relays(up(bound, channel_data(NUMBER, b"x")).frame()).source == bound.relayed


@pytest.mark.parametrize("is_own", [True, False])
def test_what_comes_from_another_client_of_the_relay(path: Path, is_own: bool) -> None:
    """Inside the program it is relayed; in at a device it comes only where a NAT turns it around.

    Where the relayed address is the host's own, such a frame is forged.
    """
    with Bed(path, are_relayed_own=is_own) as bed:
        host = RELAYED[Family.IPV4]
        other = ("192.0.2.11", 5001)
        alice = bed.bind(Channel(CLIENTS[Family.IPV4], NUMBER, 50000, (host, 50001)))
        bed.bind(Channel(other, 0x4002, 50001, (host, 50000)))
        heard = bed.relays(up(alice, channel_data(NUMBER, b"inside")).frame())
        assert (heard.to, heard.payload) == (other, channel_data(0x4002, b"inside"))
        forged = down(alice, b"from outside").frame()
        if is_own:
            bed.passes(forged)
        else:
            assert bed.relays(forged).to == alice.client


# --- Anything at all ------------------------------------------------------------------------


def seeds(bed: Bed) -> list[bytes]:
    for bound in (BOUND, SIX, ACROSS):
        bed.bind(bound)
    return [
        UP.frame(),
        UP_SIX.frame(),
        DOWN.frame(),
        DOWN_SIX.frame(),
        up(ACROSS, channel_data(0x4002, b"zz")).frame(),
        up(ACROSS, channel_data(0x4002, bytes(1452))).frame(),
        UP.but(has_checksum=False).frame(),
    ]


def test_whatever_becomes_of_a_frame_it_is_relayed_or_handed_up(bed: Bed) -> None:
    """30,000 of them: never dropped, never changed and handed up, never of inconsistent lengths."""
    frames, rng, verdicts = seeds(bed), random.Random(7), set()
    for _ in range(30_000):
        frame = bytearray(rng.choice(frames))
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            at = rng.randrange(min(len(frame), 80))
            frame[at] = rng.choice((0, 1, 255, rng.randrange(256)))
        if rng.random() < 0.2:
            frame = frame[: rng.randrange(14, len(frame) + 1)]
        verdict, left, _ = bed.program.run(bytes(frame))
        verdicts.add(VERDICTS[verdict])
        if VERDICTS[verdict] == "pass":
            assert left == bytes(frame)
        else:
            xdpbed.assert_consistent(left)
    assert verdicts == {"pass", "redirect"}


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frame=st.binary(min_size=14, max_size=200))
def test_random_bytes_are_handed_up(bed: Bed, frame: bytes) -> None:
    bed.passes(frame)
