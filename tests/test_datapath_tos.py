"""DSCP and ECN go on with what is relayed, and with nothing else. RFC 8656 §14."""

import pytest

from relay.stun.const import Method
from tests.scenario import Client, Peer, Scenario, channel_data, request

TO_BOB, TO_CAROL = 0x4000, 0x4001
MARK = 0b101110_11  # expedited forwarding, and congestion experienced


@pytest.fixture
def relay() -> Scenario:
    return Scenario()


@pytest.fixture
def alice(relay: Scenario) -> Client:
    return relay.client("192.0.2.10:5000").allocates()


@pytest.fixture
def bob(relay: Scenario, alice: Client) -> Peer:
    bob = relay.peer("198.51.100.7:9000")
    alice.binds(TO_BOB, bob)
    return bob


@pytest.fixture
def carol(relay: Scenario, alice: Client) -> Client:
    """Another allocation of this relay, which is alice's peer."""
    carol = relay.client("192.0.2.11:5000").allocates()
    alice.binds(TO_CAROL, carol.relayed_address)
    carol.binds(TO_BOB, alice.relayed_address)
    return carol


def octets(relay: Scenario) -> list[int]:
    """Those of what the relay sent since the last time this was asked."""
    sent, relay.network.tos = relay.network.tos, []
    return sent


@pytest.mark.usefixtures("bob")
def test_to_the_peer(relay: Scenario, alice: Client) -> None:
    octets(relay)
    for octet in (0, MARK, 0):
        relay.receives_from_client(channel_data(TO_BOB, b"hi"), alice.address, octet)

    assert octets(relay) == [0, MARK, 0]


def test_to_the_client(relay: Scenario, alice: Client, bob: Peer) -> None:
    octets(relay)
    for octet in (0, MARK, 0):
        relay.receives_from_peer(b"hi", bob.address, alice.relayed_address, octet)

    assert octets(relay) == [0, MARK, 0]


def test_with_segments(relay: Scenario, alice: Client, bob: Peer) -> None:
    octets(relay)
    frame = channel_data(TO_BOB, b"hi")
    relay.receives_segments_from_client(frame * 5, len(frame), alice.address, MARK)
    relay.receives_segments_from_peer(b"hi" * 5, 2, bob.address, alice.relayed_address, MARK)

    assert relay.network.at_once == [5, 5]
    assert octets(relay) == [MARK] * 10


@pytest.mark.parametrize("takes", [0, 2])
def test_with_segments_that_go_one_by_one(
    relay: Scenario, alice: Client, bob: Peer, takes: int
) -> None:
    """Because the kernel does not take them all at once."""
    octets(relay)
    relay.network.takes = takes
    frame = channel_data(TO_BOB, b"hi")
    relay.receives_segments_from_client(frame * 5, len(frame), alice.address, MARK)
    relay.receives_segments_from_peer(b"hi" * 5, 2, bob.address, alice.relayed_address, MARK)

    assert octets(relay) == [MARK] * 10


@pytest.mark.usefixtures("bob", "carol")
def test_with_segments_that_differ(relay: Scenario, alice: Client) -> None:
    octets(relay)
    segments = channel_data(TO_BOB, b"one") + channel_data(TO_CAROL, b"two")
    relay.receives_segments_from_client(segments, len(segments) // 2, alice.address, MARK)

    assert octets(relay) == [MARK, MARK]


@pytest.mark.usefixtures("carol")
def test_from_one_allocation_to_another(relay: Scenario, alice: Client) -> None:
    octets(relay)
    frame = channel_data(TO_CAROL, b"hi")
    relay.receives_from_client(frame, alice.address, MARK)
    relay.receives_segments_from_client(frame * 3, len(frame), alice.address, MARK)
    relay.network.takes = 0
    relay.receives_segments_from_client(frame * 3, len(frame), alice.address, MARK)

    assert octets(relay) == [MARK] * 7


def test_the_relays_own_answers_are_not_marked(relay: Scenario, alice: Client) -> None:
    """Whatever the request came with: it is no part of a flow."""
    octets(relay)
    relay.receives_from_client(request(Method.BINDING).encode(), alice.address, MARK)
    relay.receives_from_client(alice.signed(Method.REFRESH), alice.address, MARK)

    assert len(relay.sent()) == 2
    assert octets(relay) == [0, 0]
