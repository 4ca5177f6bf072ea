"""CreatePermission, and the life of a permission. RFC 8656 §9, §10."""

import logging

import pytest

from relay.stun.attributes import Attr
from relay.stun.const import Family, Method
from tests.scenario import (
    LISTEN_PORT,
    PUBLIC_IP4,
    Client,
    Scenario,
    ToPeer,
    channel_data,
    indicated,
    relayed,
    to,
)

PEER = Attr.XOR_PEER_ADDRESS


def test_success_is_signed_and_empty(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates()
    answer = alice.asks(Method.CREATE_PERMISSION, (PEER, ("198.51.100.7", 9000)))

    assert answer.code is None
    assert answer.signed
    assert answer.attributes == {Attr.MESSAGE_INTEGRITY}


def test_a_permission_lasts_for_five_minutes(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates().permits(("198.51.100.7", 9000))

    relay.passes(seconds=299.75)
    assert can_talk(relay, alice)
    relay.passes(seconds=0.25)
    assert not can_talk(relay, alice)
    assert relay.server.permissions == 0


def test_a_request_for_it_prolongs_it_and_data_does_not(relay: Scenario) -> None:
    """RFC 8656 §9: "Permissions are not refreshed by data"."""
    alice = relay.client("192.0.2.10:5000").allocates().permits(("198.51.100.7", 9000))

    relay.passes(seconds=200)
    alice.permits(("198.51.100.7", 0))
    relay.passes(seconds=299)
    assert can_talk(relay, alice)
    relay.passes(seconds=1)
    assert not can_talk(relay, alice)


def test_a_bound_channel_permits_the_host_for_five_minutes_of_its_ten(relay: Scenario) -> None:
    """RFC 8656 §12.2: a ChannelBind installs or refreshes the permission, too."""
    alice = relay.client("192.0.2.10:5000").allocates()
    bob = relay.peer("198.51.100.7:9000")
    alice.binds(0x4001, bob)

    assert can_talk(relay, alice, port=9001)
    relay.passes(seconds=300)
    assert not can_talk(relay, alice, port=9001)
    bob.sends(b"channel", to=alice.relayed_address)
    assert relay.sent() == [to(alice, channel_data(0x4001, b"channel"))]
    alice.sends_data(0x4001, b"channel")
    assert relay.sent() == [relayed(alice, bob, b"channel")]


def test_permissions_end_with_their_allocation(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates().permits(("198.51.100.7", 9000))
    alice.refreshes(0)

    assert relay.server.permissions == 0
    alice.allocates()
    assert not can_talk(relay, alice)


def test_permissions_end_with_their_family(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates((Attr.ADDITIONAL_ADDRESS_FAMILY, Family.IPV6))
    alice.permits(("198.51.100.7", 9000), ("2001:db8::7", 9000))
    alice.asks(Method.REFRESH, (Attr.LIFETIME, 0), (Attr.REQUESTED_ADDRESS_FAMILY, Family.IPV4))

    assert relay.server.permissions == 1
    alice.indicates(("198.51.100.7", 9000), b"IPv4")
    assert relay.dropped() == {"no_permission": 1}
    alice.indicates(("2001:db8::7", 9000), b"IPv6")
    assert relay.sent() == [ToPeer(alice.relayed_address[1], ("2001:db8::7", 9000), b"IPv6")]


def test_permissions_are_per_allocation(relay: Scenario) -> None:
    relay.client("192.0.2.10:5000").allocates().permits(("198.51.100.7", 9000))
    other = relay.client("192.0.2.10:5001").allocates()

    assert not can_talk(relay, other)


def test_only_channels_relay_where_indications_are_switched_off() -> None:
    relay = Scenario(send_indications=False)
    alice = relay.client("192.0.2.10:5000").allocates().permits(("198.51.100.7", 9000))
    alice.binds(0x4001, ("198.51.100.7", 9000))

    assert relay.server.permissions == 0
    alice.indicates(("198.51.100.7", 9000), b"hi")
    relay.peer("198.51.100.7:9001").sends(b"hi", to=alice.relayed_address)
    assert relay.sent() == []
    assert relay.dropped() == {"send_indications_off": 1, "unbound_peer": 1}


def test_switched_off_by_a_reload_they_end_within_five_minutes(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates().permits(("198.51.100.7", 9000))
    relay.changes_settings(send_indications=False)

    relay.passes(seconds=200)
    assert can_talk(relay, alice)
    alice.permits(("198.51.100.7", 9000))
    relay.passes(seconds=100)
    assert not can_talk(relay, alice)


def test_the_operator_is_told_once_of_the_flag(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    relay = Scenario(send_indications=False)
    for port in (5000, 5001):
        relay.client(f"192.0.2.10:{port}").indicates(("198.51.100.7", 9000), b"hi")

    hints = [message for message in caplog.messages if "--send-indications" in message]
    assert len(hints) == 1


def test_an_allocation_has_as_many_permissions_as_it_may_have_channels() -> None:
    relay = Scenario(max_channels_per_allocation=2)
    alice = relay.client("192.0.2.10:5000").allocates()
    one, two, three = (("198.51.100.7", 1), ("198.51.100.8", 1), ("198.51.100.9", 1))

    assert alice.tries_to_permit(one, two, three).code == 508
    assert relay.server.permissions == 0  # all or nothing
    alice.permits(one, one, two)
    assert alice.tries_to_permit(two, three).code == 508
    assert alice.tries_to_bind(0x4001, three).code == 508
    assert relay.server.channels == 0
    alice.permits(one, two)
    alice.binds(0x4001, two)


def test_a_relay_has_so_many_permissions() -> None:
    relay = Scenario(max_permissions=1)
    relay.client("192.0.2.10:5000").allocates().permits(("198.51.100.7", 1))
    other = relay.client("192.0.2.10:5001").allocates()

    assert other.tries_to_permit(("198.51.100.7", 1)).code == 508


def test_rules_that_change_end_permissions(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates()
    alice.permits(("198.51.100.7", 9000), ("192.0.2.7", 9000))
    alice.indicates(("198.51.100.7", 9000), b"the way is known now")
    relay.sent()
    relay.changes_peers(deny=["198.51.100.0/24"])

    assert relay.server.permissions == 1
    assert not can_talk(relay, alice)
    alice.indicates(("192.0.2.7", 9000), b"still")
    assert relay.sent() == [ToPeer(alice.relayed_address[1], ("192.0.2.7", 9000), b"still")]


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
    assert relay.server.permissions == 0
    alice.permits(("10.0.0.1", 1), ("198.51.100.7", 1))
    assert relay.server.permissions == 1


def test_without_an_allocation_it_is_a_mismatch(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000")

    assert alice.asks(Method.CREATE_PERMISSION, (PEER, ("198.51.100.7", 1))).code == 437


def can_talk(relay: Scenario, client: Client, port: int = 9000) -> bool:
    """Tell if a client and 198.51.100.7 reach each other by indications. In one way only: fail."""
    peer = relay.peer(f"198.51.100.7:{port}")
    relay.sent()
    client.indicates(peer, b"ping")
    reaches = relay.sent() == [relayed(client, peer, b"ping")]
    peer.sends(b"pong", to=client.relayed_address)
    is_reached = [one.payload for one in indicated(relay.sent())] == [b"pong"]
    assert reaches is is_reached
    return reaches
