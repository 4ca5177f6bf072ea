"""Permissions and indications through a running relay, on real sockets."""

import signal
from collections.abc import Iterator

import pytest

from relay.stun.attributes import Attr
from relay.stun.const import Family
from tests.process import RelayProcess, Stopped, free_port
from tests.turnclient import Peer, TurnClient

LOOPBACK = {Family.IPV4: "127.0.0.1", Family.IPV6: "::1"}


@pytest.fixture(scope="module")
def relay() -> Iterator[RelayProcess]:
    with RelayProcess(port=free_port()) as relay:
        yield relay


def client_of(relay: RelayProcess, family: Family = Family.IPV4) -> TurnClient:
    return TurnClient((LOOPBACK[family], relay.port), relay.username, relay.password)


@pytest.mark.parametrize("client_family", Family, ids=lambda family: family.name)
@pytest.mark.parametrize("peer_family", Family, ids=lambda family: family.name)
@pytest.mark.parametrize("size", [0, 1, 160, 1401])
def test_data_flows_both_ways(
    relay: RelayProcess, client_family: Family, peer_family: Family, size: int
) -> None:
    with client_of(relay, client_family) as alice, Peer(peer_family) as bob:
        relayed_address = alice.allocates(peer_family)
        alice.permits(bob.address)
        alice.indicates(bob.address, bytes(size))
        assert bob.receives() == (bytes(size), relayed_address)

        bob.sends(bytes(size), relayed_address)
        heard = alice.hears()
        assert heard.get(Attr.XOR_PEER_ADDRESS) == bob.address
        assert heard.get(Attr.DATA) == bytes(size)


@pytest.mark.parametrize("family", Family, ids=lambda family: family.name)
def test_many_at_once_keep_their_order(relay: RelayProcess, family: Family) -> None:
    """Read and sent as segments where the kernel can."""
    count = 200
    with client_of(relay, family) as alice, Peer(family) as bob:
        relayed_address = alice.allocates(family)
        alice.permits(bob.address)
        payloads = [number.to_bytes(2, "big") + bytes(98) for number in range(count)]
        for _ in range(3):
            with Stopped(relay):
                for payload in payloads:
                    alice.indicates(bob.address, payload)
                    bob.sends(payload, relayed_address)
            assert [bob.receives()[0] for _ in payloads] == payloads
            assert [alice.hears().get(Attr.DATA) for _ in payloads] == payloads


@pytest.mark.parametrize("family", Family, ids=lambda family: family.name)
def test_an_error_comes_back_and_nothing_else_is_lost(relay: RelayProcess, family: Family) -> None:
    """On the same port a call goes on, in a channel."""
    unreachable = {Family.IPV4: (3, 3, 0), Family.IPV6: (1, 4, 0)}
    with client_of(relay, family) as alice, Peer(family) as bob, Peer(family) as gone:
        relayed_address = alice.allocates(family)
        alice.permits(bob.address, gone.address)
        alice.binds(0x4001, bob.address)
        gone.sends(b"here I am", relayed_address)
        assert alice.hears().get(Attr.XOR_PEER_ADDRESS) == gone.address
        gone.__exit__()
        for number in range(10):
            alice.indicates(gone.address, b"are you there?")
            alice.sends(0x4001, bytes([number]))
            assert bob.receives() == (bytes([number]), relayed_address)
            error = alice.hears()
            assert error.get(Attr.XOR_PEER_ADDRESS) == gone.address
            assert error.get(Attr.ICMP) == unreachable[family]
            assert error.get(Attr.DATA) is None
            bob.sends(bytes([number]), relayed_address)
            assert alice.receives() == (0x4001, bytes([number]))
    assert "ERROR" not in relay.errors()


def test_two_clients_of_one_relay_reach_each_other(relay: RelayProcess) -> None:
    with client_of(relay) as alice, client_of(relay) as bob:
        of_alice, of_bob = alice.allocates(), bob.allocates()
        alice.permits(of_bob)
        bob.permits(of_alice)
        alice.indicates(of_bob, b"ping")
        heard = bob.hears()
        assert heard.get(Attr.XOR_PEER_ADDRESS) == of_alice
        assert heard.get(Attr.DATA) == b"ping"


def test_switched_off_only_channels_relay_and_the_log_says_how_to_switch_it_on() -> None:
    with RelayProcess("--no-send-indications", port=free_port()) as relay:
        with client_of(relay) as alice, Peer() as bob:
            relayed_address = alice.allocates()
            alice.permits(bob.address)
            alice.indicates(bob.address, b"dropped")
            assert "--send-indications relays them" in relay.logs("Send indications")
            alice.binds(0x4001, bob.address)
            alice.sends(0x4001, b"relayed")
            assert bob.receives() == (b"relayed", relayed_address)
        relay.process.send_signal(signal.SIGUSR1)
        assert "1 send_indications_off" in relay.logs("summary")
