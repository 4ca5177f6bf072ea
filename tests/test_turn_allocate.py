"""Allocate. RFC 8656 §7."""

import errno
from collections import Counter
from typing import Any

import pytest

from relay.stun.attributes import Attr
from relay.stun.const import UDP_PROTOCOL, Family, Method
from relay.turn.allocate import PORT_TRIES
from tests.scenario import (
    LISTEN_PORT,
    PUBLIC_IP4,
    PUBLIC_IP6,
    Answer,
    Client,
    Scenario,
    channel_data,
    to,
)

UDP = (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL)
V4, V6 = Family.IPV4, Family.IPV6
BOTH, ONLY_V4, ONLY_V6 = (V4, V6), (V4,), (V6,)
HOST = {V4: PUBLIC_IP4, V6: PUBLIC_IP6}


def test_success_holds_addresses_and_lifetime_and_is_signed(relay: Scenario) -> None:
    answer = relay.client("192.0.2.10:5000").asks(Method.ALLOCATE, UDP)

    relayed = answer.get(Attr.XOR_RELAYED_ADDRESS)
    assert relayed is not None
    assert relayed[0] == PUBLIC_IP4
    assert 49152 <= relayed[1] <= 65535
    assert answer.get(Attr.XOR_MAPPED_ADDRESS) == ("192.0.2.10", 5000)
    assert answer.get(Attr.LIFETIME) == 600
    assert answer.signed
    assert answer.attributes == {
        Attr.XOR_RELAYED_ADDRESS,
        Attr.XOR_MAPPED_ADDRESS,
        Attr.LIFETIME,
        Attr.MESSAGE_INTEGRITY,
    }


def test_the_port_is_open_before_the_client_hears_of_it(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates()

    assert set(relay.network.sockets) == {(V4, alice.relayed_address[1])}


@pytest.mark.parametrize(
    ("requested", "granted"),
    [
        (None, 600),
        (0, 600),
        (1, 1),
        (599, 599),
        (600, 600),
        (3600, 3600),
        (3601, 3600),
        (2**32 - 1, 3600),
    ],
)
def test_lifetime(relay: Scenario, requested: int | None, granted: int) -> None:
    attributes = [] if requested is None else [(Attr.LIFETIME, requested)]
    answer = relay.client("192.0.2.10:5000").asks(Method.ALLOCATE, UDP, *attributes)
    assert answer.get(Attr.LIFETIME) == granted

    relay.passes(seconds=granted - 0.5)
    assert relay.server.allocations == 1
    relay.passes(seconds=0.5)
    assert relay.server.allocations == 0
    assert relay.network.sockets == {}


def test_lifetime_does_not_depend_on_the_clock(relay: Scenario) -> None:
    """(now + 600) - now is often a little more than 600."""
    for number in range(50):
        relay.passes(seconds=0.0123)
        answer = relay.client(f"192.0.2.10:{5000 + number}").asks(Method.ALLOCATE, UDP)
        assert answer.get(Attr.LIFETIME) == 600


def test_lifetime_does_not_depend_on_how_long_it_takes_to_open_a_port(relay: Scenario) -> None:
    def takes_a_while() -> None:
        relay.time.now += 0.05

    relay.network.on_open = takes_a_while
    answer = relay.client("192.0.2.10:5000").asks(Method.ALLOCATE, UDP)
    assert answer.get(Attr.LIFETIME) == 600


def test_allocations_of_different_lifetimes_end_without_any_traffic(relay: Scenario) -> None:
    relay.client("192.0.2.10:5000").allocates(lifetime=3600)
    relay.client("192.0.2.11:5000").allocates(lifetime=60)

    relay.passes(seconds=60)
    assert relay.server.allocations == 1
    relay.passes(seconds=3540)
    assert relay.server.allocations == 0


def test_the_same_request_again_gets_the_same_success(relay: Scenario) -> None:
    """The answer may have been lost; the client then retransmits. RFC 8656 §7.2."""
    alice = relay.client("192.0.2.10:5000")
    asked = alice.signed(Method.ALLOCATE, UDP, (Attr.LIFETIME, 1000))

    first = alice.hears(asked)
    assert alice.hears(asked).datagram == first.datagram
    relay.passes(seconds=2.5)
    again = alice.hears(asked)
    assert again.get_all(Attr.XOR_RELAYED_ADDRESS) == first.get_all(Attr.XOR_RELAYED_ADDRESS)
    assert again.get(Attr.LIFETIME) == 998  # what is left, in whole seconds
    assert len(relay.network.opened) == 1


@pytest.mark.parametrize("seconds", [0, 39])
def test_an_allocate_that_arrives_again_after_its_allocation_makes_no_other(
    relay: Scenario, seconds: float
) -> None:
    """Nobody would own it, and its client would be told 437 until it expires."""
    alice = relay.client("192.0.2.10:5000")
    asked = alice.signed(Method.ALLOCATE, UDP)
    alice.sends(asked)
    alice.refreshes(lifetime=0)
    relay.passes(seconds)

    answer = alice.hears(asked)
    assert (answer.code, answer.signed) == (437, True)
    assert relay.server.allocations == 0
    alice.allocates()


def test_an_allocate_that_arrives_again_after_a_takeover_ends_nothing() -> None:
    relay = Scenario(one_allocation_per_username=True)
    before = relay.client("192.0.2.10:5000", user="alice")
    asked = before.signed(Method.ALLOCATE, UDP)
    before.sends(asked)
    roamed = relay.client("192.0.2.11:5000", user="alice").allocates()

    assert before.hears(asked).code == 437
    assert roamed.refreshes().code is None


def test_a_recorded_allocate_does_not_take_over() -> None:
    """Its nonce is older than that of the allocation: the client itself would get a new one."""
    relay = Scenario(one_allocation_per_username=True)
    before = relay.client("192.0.2.10:5000", user="alice")
    never_arrived = before.signed(Method.ALLOCATE, UDP)
    relay.passes(seconds=600)
    roamed = relay.client("192.0.2.11:5000", user="alice").allocates()

    answer = before.hears(never_arrived)
    assert (answer.code, answer.signed) == (438, True)
    assert roamed.refreshes().code is None
    before.allocates()  # which begins with a 438, and a nonce of now
    assert roamed.refreshes().code == 437


def test_another_allocate_on_the_same_5_tuple_is_a_mismatch(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates()

    assert alice.asks(Method.ALLOCATE, UDP).code == 437
    assert alice.asks(Method.ALLOCATE).code == 437  # whatever else is wrong with it
    assert relay.server.allocations == 1


def test_the_same_transaction_id_of_another_user_is_a_mismatch(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000")
    assert alice.asks(Method.ALLOCATE, UDP, transaction_id=b"twelve bytes").code is None
    mallory = relay.client("192.0.2.10:5000", user="mallory")

    assert mallory.asks(Method.ALLOCATE, UDP, transaction_id=b"twelve bytes").code == 437


def test_an_allocation_that_waits_for_its_end_is_not_there_any_more(relay: Scenario) -> None:
    """If many end at once, some have to wait; whoever asks does not."""
    alice, bob = relay.client("192.0.2.10:5000"), relay.client("192.0.2.11:5000")
    alice.allocates((Attr.ADDITIONAL_ADDRESS_FAMILY, V6), lifetime=600)
    bob.allocates(lifetime=600)
    relay.time.now += 600  # and the timer is late

    assert bob.refreshes().code == 437
    alice.allocates()
    assert len(relay.network.sockets) == 1


def test_a_5_tuple_is_free_again_after_its_allocation(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates()
    alice.refreshes(lifetime=0)

    alice.allocates()


def test_requested_transport_is_required_and_is_udp(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000")

    assert alice.asks(Method.ALLOCATE).code == 400
    assert alice.asks(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, 6)).code == 442
    assert relay.network.opened == []


@pytest.mark.parametrize(
    ("relay_has", "requested", "additional", "expected"),
    [
        (BOTH, None, None, ONLY_V4),
        (BOTH, V4, None, ONLY_V4),
        (ONLY_V4, None, None, ONLY_V4),
        (ONLY_V4, V4, None, ONLY_V4),
        (BOTH, V6, None, ONLY_V6),
        (ONLY_V6, V6, None, ONLY_V6),
        (BOTH, None, V6, BOTH),
        (ONLY_V4, None, V6, ONLY_V4),
        (ONLY_V6, None, V6, ONLY_V6),
        (BOTH, V4, V6, 400),
        (BOTH, V6, V6, 400),
        (BOTH, V4, V4, 400),
        (BOTH, None, V4, 400),
        (ONLY_V4, None, V4, 400),
        (ONLY_V6, None, V4, 400),
        (ONLY_V6, None, None, 440),
        (ONLY_V6, V4, None, 440),
        (ONLY_V4, V6, None, 440),
    ],
    ids=lambda value: "-" if value is None else str(value),
)
@pytest.mark.parametrize("address", ["192.0.2.10:5000", "[2001:db8::10]:5000"])
def test_address_families(
    relay_has: tuple[Family, ...],
    requested: Family | None,
    additional: Family | None,
    expected: tuple[Family, ...] | int,
    address: str,
) -> None:
    """What is asked for decides, not the family in which the client asks. RFC 8656 §7.2."""
    relay = Scenario(families=relay_has)
    attributes: list[tuple[Any, Any]] = [UDP]
    if requested is not None:
        attributes.append((Attr.REQUESTED_ADDRESS_FAMILY, requested))
    if additional is not None:
        attributes.append((Attr.ADDITIONAL_ADDRESS_FAMILY, additional))
    answer = relay.client(address).asks(Method.ALLOCATE, *attributes)

    if isinstance(expected, int):
        assert answer.code == expected
        assert relay.network.opened == []
        return
    relayed = answer.get_all(Attr.XOR_RELAYED_ADDRESS)
    assert [host for host, _ in relayed] == [HOST[family] for family in expected]
    assert len({port for _, port in relayed}) == 1
    assert set(relay.network.sockets) == {(family, relayed[0][1]) for family in expected}
    missing = set(Family) - set(expected) if additional is not None else set()
    errors = answer.get_all(Attr.ADDRESS_ERROR_CODE)
    assert [(family, code) for family, code, _ in errors] == [(f, 440) for f in missing]


def test_every_port_of_the_range_can_be_had_both_ends_included() -> None:
    relay = Scenario(ports=range(50000, 50004))
    ports = {
        relay.client(f"192.0.2.10:{port}").allocates().relayed_address[1]
        for port in range(5000, 5004)
    }

    assert ports == {50000, 50001, 50002, 50003}
    assert tries_to_allocate(relay.client("192.0.2.10:5004")).code == 508


def test_ports_are_drawn_uniformly() -> None:
    relay = Scenario(ports=range(50000, 50004))
    drawn: Counter[int] = Counter()
    for _ in range(400):
        alice = relay.client("192.0.2.10:5000").allocates()
        drawn[alice.relayed_address[1]] += 1
        alice.refreshes(lifetime=0)

    assert set(drawn) == {50000, 50001, 50002, 50003}
    assert min(drawn.values()) > 50


def test_a_range_of_one_port_serves_one_client_at_a_time() -> None:
    relay = Scenario(ports=range(65535, 65536))
    alice = relay.client("192.0.2.10:5000").allocates(lifetime=600)
    bob = relay.client("192.0.2.11:5000")
    assert tries_to_allocate(bob).code == 508

    relay.passes(seconds=600)
    assert bob.allocates().relayed_address == alice.relayed_address


def test_the_listening_port_is_never_lent() -> None:
    relay = Scenario(ports=range(LISTEN_PORT - 1, LISTEN_PORT + 2))
    ports = {relay.client(f"192.0.2.10:{port}").allocates().relayed_address[1] for port in (1, 2)}

    assert ports == {LISTEN_PORT - 1, LISTEN_PORT + 1}
    assert tries_to_allocate(relay.client("192.0.2.10:3")).code == 508


def test_a_port_held_by_another_process_is_passed_over() -> None:
    relay = Scenario(ports=range(50000, 50003))
    relay.network.occupied = {(V4, 50000), (V4, 50002)}

    assert relay.client("192.0.2.10:5000").allocates().relayed_address[1] == 50001


def test_both_families_of_a_dual_allocation_must_be_free() -> None:
    relay = Scenario(ports=range(50000, 50003))
    relay.network.occupied = {(V6, 50000), (V4, 50001)}
    alice = relay.client("192.0.2.10:5000").allocates((Attr.ADDITIONAL_ADDRESS_FAMILY, V6))

    assert alice.relayed_addresses == [(PUBLIC_IP4, 50002), (PUBLIC_IP6, 50002)]
    assert set(relay.network.sockets) == {(V4, 50002), (V6, 50002)}


@pytest.mark.parametrize("family", [V4, V6])
@pytest.mark.parametrize("error", [errno.EADDRNOTAVAIL, errno.EMFILE, errno.EAFNOSUPPORT])
def test_a_family_that_cannot_be_bound_is_not_had_and_the_other_is(
    relay: Scenario, family: Family, error: int
) -> None:
    """Firezone's clients always ask for both. RFC 8656 §18.12."""
    relay.network.failure, relay.network.failing = error, {family}
    alice = relay.client("192.0.2.10:5000")
    answer = alice.asks(Method.ALLOCATE, UDP, (Attr.ADDITIONAL_ADDRESS_FAMILY, V6))

    (address,) = answer.get_all(Attr.XOR_RELAYED_ADDRESS)
    assert address[0] == (PUBLIC_IP6 if family is V4 else PUBLIC_IP4)
    assert answer.get(Attr.ADDRESS_ERROR_CODE) == (family, 508, "Insufficient Capacity")
    assert len(relay.network.tried) == 2, "of one port: another one would do no better"
    assert alice.refreshes(lifetime=0).code is None
    assert relay.network.sockets == {}


def test_a_single_family_that_cannot_be_bound_is_508(relay: Scenario) -> None:
    relay.network.failure, relay.network.failing = errno.EADDRNOTAVAIL, {V6}
    alice = relay.client("192.0.2.10:5000")

    assert alice.asks(Method.ALLOCATE, UDP, (Attr.REQUESTED_ADDRESS_FAMILY, V6)).code == 508
    alice.allocates()


def test_what_is_missing_is_said_again_with_the_success(relay: Scenario) -> None:
    relay.network.failure, relay.network.failing = errno.EADDRNOTAVAIL, {V6}
    alice = relay.client("192.0.2.10:5000")
    asked = alice.signed(Method.ALLOCATE, UDP, (Attr.ADDITIONAL_ADDRESS_FAMILY, V6))

    assert alice.hears(asked).datagram == alice.hears(asked).datagram


def test_if_no_port_is_free_in_both_families_there_is_one_of_one() -> None:
    relay = Scenario(ports=range(50000, 50004))
    relay.network.occupied = {(V6, port) for port in range(50000, 50004)}
    answer = relay.client("192.0.2.10:5000").asks(
        Method.ALLOCATE, UDP, (Attr.ADDITIONAL_ADDRESS_FAMILY, V6)
    )

    assert [host for host, _ in answer.get_all(Attr.XOR_RELAYED_ADDRESS)] == [PUBLIC_IP4]
    assert answer.get(Attr.ADDRESS_ERROR_CODE) == (V6, 508, "Insufficient Capacity")
    assert len(relay.network.sockets) == 1
    relay.server.check()


def test_after_some_occupied_ports_the_client_is_told() -> None:
    relay = Scenario(ports=range(50000, 50100))
    relay.network.occupied = {(V4, port) for port in range(50000, 50100)}
    alice = relay.client("192.0.2.10:5000")

    assert tries_to_allocate(alice).code == 508
    relay.network.occupied = set()
    alice.allocates()  # nothing is left of the failure


def test_out_of_descriptors_is_508_at_once_and_harms_nobody(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates()
    bob = relay.peer("198.51.100.7:9000")
    alice.binds(0x4000, bob)
    relay.network.failure = errno.EMFILE

    answer = tries_to_allocate(relay.client("192.0.2.11:5000"))
    assert (answer.code, answer.signed) == (508, True)
    bob.sends(b"still here", to=alice.relayed_address)
    assert relay.sent() == [to(alice, channel_data(0x4000, b"still here"))]

    relay.network.failure = None
    relay.client("192.0.2.11:5000").allocates()


def test_no_more_allocations_than_allowed() -> None:
    relay = Scenario(max_allocations=2)
    alice = relay.client("192.0.2.10:5000").allocates()
    relay.client("192.0.2.11:5000").allocates()
    carol = relay.client("192.0.2.12:5000")
    assert tries_to_allocate(carol).code == 508

    alice.refreshes(lifetime=0)
    carol.allocates()


def test_no_more_sockets_than_there_are_descriptors_for() -> None:
    relay = Scenario(max_sockets=3)
    dual = (Attr.ADDITIONAL_ADDRESS_FAMILY, V6)
    alice = relay.client("192.0.2.10:5000").allocates(dual)
    bob = relay.client("192.0.2.11:5000")
    answer = bob.asks(Method.ALLOCATE, UDP, dual)
    assert answer.get(Attr.ADDRESS_ERROR_CODE) == (V6, 508, "Insufficient Capacity")
    assert tries_to_allocate(relay.client("192.0.2.12:5000")).code == 508

    alice.refreshes(lifetime=0)
    relay.client("192.0.2.12:5000").allocates(dual)


def test_a_draining_relay_takes_no_new_allocations(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates()
    relay.drain()

    assert tries_to_allocate(relay.client("192.0.2.11:5000")).code == 508
    assert alice.refreshes().code is None


def test_a_draining_relay_does_not_end_the_old_for_a_new_that_it_refuses() -> None:
    relay = Scenario(one_allocation_per_username=True)
    old = relay.client("192.0.2.10:5000", user="alice").allocates()
    relay.drain()

    assert tries_to_allocate(relay.client("192.0.2.99:6000", user="alice")).code == 508
    assert old.refreshes().code is None


def test_takeover_ends_what_the_username_holds_elsewhere() -> None:
    """Firezone's clients roam this way: new socket, same username."""
    relay = Scenario(one_allocation_per_username=True, ports=range(50000, 50001))
    old = relay.client("192.0.2.10:5000", user="alice").allocates()
    bob = relay.peer("198.51.100.7:9000")
    old.binds(0x4000, bob)

    new = relay.client("192.0.2.99:6000", user="alice").allocates()
    assert relay.server.allocations == 1
    assert old.refreshes().code == 437
    bob.sends(b"hi", to=new.relayed_address)
    assert relay.sent() == []  # its channels are gone too
    new.binds(0x4000, bob)
    bob.sends(b"hi", to=new.relayed_address)
    assert relay.sent() == [to(new, channel_data(0x4000, b"hi"))]


def test_takeover_comes_after_everything_that_can_be_wrong_with_the_request() -> None:
    relay = Scenario(one_allocation_per_username=True, families=ONLY_V4)
    alice = relay.client("192.0.2.10:5000", user="alice").allocates()
    roaming = relay.client("192.0.2.99:6000", user="alice")

    assert roaming.asks(Method.ALLOCATE).code == 400
    assert roaming.asks(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, 6)).code == 442
    assert roaming.asks(Method.ALLOCATE, UDP, (Attr.REQUESTED_ADDRESS_FAMILY, V6)).code == 440
    assert alice.refreshes().code is None


def test_without_takeover_a_username_holds_as_many_as_it_likes(relay: Scenario) -> None:
    relay.client("192.0.2.10:5000", user="alice").allocates()
    relay.client("192.0.2.10:5001", user="alice").allocates()

    assert relay.server.allocations == 2


def test_the_same_client_at_two_of_our_addresses_has_two_5_tuples(relay: Scenario) -> None:
    """A 5-tuple ends at the address that the client wrote to. RFC 8656 §3."""
    alice, again = relay.client("192.0.2.10:5000"), relay.client("192.0.2.10:5000")
    again.address = type(again.address)((again.address[0], b"\xc0\x00\x02\x02"))
    alice.allocates()
    again.allocates()

    assert relay.server.allocations == 2
    assert alice.relayed_address != again.relayed_address


def tries_to_allocate(client: Client) -> Answer:
    return client.asks(Method.ALLOCATE, UDP)


assert PORT_TRIES < 100  # or the test of occupied ports proves nothing
