"""CreatePermission: checked, but without effect. RFC 8656 §10."""

import pytest

from relay.stun.attributes import Attr
from relay.stun.const import Method
from tests.scenario import LISTEN_PORT, PUBLIC_IP4, Scenario

PEER = Attr.XOR_PEER_ADDRESS


def test_success_is_signed_and_empty(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates()
    answer = alice.asks(Method.CREATE_PERMISSION, (PEER, ("198.51.100.7", 9000)))

    assert answer.code is None
    assert answer.signed
    assert answer.attributes == {Attr.MESSAGE_INTEGRITY}


def test_it_relays_nothing(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates()
    bob = relay.peer("198.51.100.7:9000")
    assert alice.asks(Method.CREATE_PERMISSION, (PEER, bob.address)).code is None

    bob.sends(b"hi", to=alice.relayed_address)
    assert relay.sent() == []
    assert relay.dropped() == {"unbound_peer": 1}


def test_the_port_of_a_permission_does_not_count(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates()

    assert alice.asks(Method.CREATE_PERMISSION, (PEER, ("198.51.100.7", 0))).code is None


@pytest.mark.parametrize(
    ("peers", "code"),
    [
        pytest.param([], 400, id="no peer"),
        pytest.param([("2001:db8::7", 9000)], 443, id="family not allocated"),
        pytest.param([("10.0.0.1", 9000)], 403, id="forbidden"),
        pytest.param([("10.0.0.1", 0)], 403, id="forbidden, without a port"),
        pytest.param([(PUBLIC_IP4, LISTEN_PORT)], None, id="an allocation here, perhaps"),
        pytest.param([(f"198.51.100.{n}", 1) for n in range(16)], None, id="16 peers"),
        pytest.param([(f"198.51.100.{n}", 1) for n in range(17)], 400, id="17 peers"),
        pytest.param([("198.51.100.7", 1), ("10.0.0.1", 1)], 403, id="one of two forbidden"),
        pytest.param([("198.51.100.7", 1), ("2001:db8::7", 1)], 443, id="one of two mismatched"),
        pytest.param([("198.51.100.7", 1), ("198.51.100.8", 1)], None, id="two good ones"),
    ],
)
def test_all_or_nothing(relay: Scenario, peers: list[tuple[str, int]], code: int | None) -> None:
    alice = relay.client("192.0.2.10:5000").allocates()
    answer = alice.asks(Method.CREATE_PERMISSION, *((PEER, peer) for peer in peers))

    assert (answer.code, answer.signed) == (code, True)


def test_if_there_are_more_peers_than_are_read_the_signature_is_not_reached(
    relay: Scenario,
) -> None:
    alice = relay.client("192.0.2.10:5000").allocates()
    peers = [(PEER, (f"198.51.100.{number}", 1)) for number in range(150)]
    answer = alice.hears(alice.signed(Method.CREATE_PERMISSION, *peers))

    assert (answer.code, answer.signed) == (400, False)


@pytest.mark.parametrize("port", [0, 1, LISTEN_PORT, 49152, 65535])
def test_a_permission_does_not_tell_which_ports_are_lent(relay: Scenario, port: int) -> None:
    alice = relay.client("192.0.2.10:5000").allocates()

    assert alice.asks(Method.CREATE_PERMISSION, (PEER, (PUBLIC_IP4, port))).code is None


def test_where_refusals_are_to_be_ignored_a_forbidden_peer_is_a_success() -> None:
    relay = Scenario(ignores_refused_peers=True)
    alice = relay.client("192.0.2.10:5000").allocates()

    assert alice.asks(Method.CREATE_PERMISSION, (PEER, ("10.0.0.1", 1))).code is None
    assert sum(relay.server.refused_peers.values()) == 1


def test_without_an_allocation_it_is_a_mismatch(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000")

    assert alice.asks(Method.CREATE_PERMISSION, (PEER, ("198.51.100.7", 1))).code == 437
