"""What is counted while calls run."""

import pytest

from relay.observe.counters import Counters
from tests.scenario import Client, Peer, Scenario, spelled

SILENT = "198.51.100.9:9000"


@pytest.fixture
def relay() -> Scenario:
    return Scenario()


@pytest.fixture
def alice(relay: Scenario) -> Client:
    return relay.client("192.0.2.10:5000").allocates()


@pytest.fixture
def bob(relay: Scenario, alice: Client) -> Peer:
    peer = relay.peer("198.51.100.7:9000")
    alice.binds(0x4001, peer)
    return peer


def test_relayed_datagrams_are_counted_by_the_size_of_their_payload(
    relay: Scenario, alice: Client, bob: Peer
) -> None:
    """Neither the header nor the padding of ChannelData is payload."""
    alice.sends_data(0x4001, b"ping", padding=bytes(4))
    alice.sends_data(0x4001, b"pong")
    alice.sends_data(0x4001, b"")
    bob.sends(b"answer", to=alice.relayed_address)

    assert relay.counters.to_peer == {4: 2, 0: 1}
    assert relay.counters.to_client == {6: 1}


def test_what_is_dropped_is_not_counted_as_relayed(
    relay: Scenario, alice: Client, bob: Peer
) -> None:
    alice.sends_data(0x4002, b"on a channel that is not bound")
    relay.peer(SILENT).sends(b"from a peer that is not bound", to=alice.relayed_address)
    relay.network.is_full = True
    alice.sends_data(0x4001, b"to a socket that is full")
    bob.sends(b"to a socket that is full", to=alice.relayed_address)

    assert relay.counters.to_peer == {}
    assert relay.counters.to_client == {}


def test_between_two_clients_a_datagram_is_counted_in_both_directions(relay: Scenario) -> None:
    """For one client it goes to a peer, for the other it comes from a peer."""
    alice = relay.client("192.0.2.10:5000").allocates()
    bob = relay.client("192.0.2.11:5000").allocates()
    alice.binds(0x4001, relay.peer(spelled(bob.relayed_address)))
    bob.binds(0x4002, relay.peer(spelled(alice.relayed_address)))

    alice.sends_data(0x4001, b"ping")

    assert relay.counters.to_peer == {4: 1}
    assert relay.counters.to_client == {4: 1}


def test_counting_starts_at_nothing() -> None:
    counters = Counters()

    assert not any((counters.to_peer, counters.to_client, counters.batches, counters.dropped))
    assert counters.bugs == 0
