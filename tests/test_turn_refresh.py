"""Refresh. RFC 8656 §8."""

import pytest

from relay.stun.attributes import Attr
from relay.stun.const import UDP_PROTOCOL, Family, Method
from tests.scenario import UNIX_START, Answer, Client, Scenario, channel_data, relayed, to

FAMILY = Attr.REQUESTED_ADDRESS_FAMILY
BOTH = (Attr.ADDITIONAL_ADDRESS_FAMILY, Family.IPV6)
UDP = (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL)


def tries_to_allocate(client: Client) -> Answer:
    return client.asks(Method.ALLOCATE, UDP)


@pytest.mark.parametrize(
    ("requested", "granted"),
    [(None, 600), (1, 1), (100, 100), (3600, 3600), (3601, 3600), (2**32 - 1, 3600)],
)
def test_refresh_moves_the_end(relay: Scenario, requested: int | None, granted: int) -> None:
    alice = relay.client("192.0.2.10:5000").allocates(lifetime=1000)
    relay.passes(seconds=500)
    answer = alice.refreshes(requested)
    assert answer.get(Attr.LIFETIME) == granted
    assert answer.signed

    relay.passes(seconds=granted - 0.5)
    assert relay.server.allocations == 1
    relay.passes(seconds=0.5)
    assert relay.server.allocations == 0


def test_lifetime_0_deletes_the_allocation_and_all_that_hangs_on_it(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates()
    bob = relay.peer("198.51.100.7:9000")
    alice.binds(0x4000, bob)

    answer = alice.refreshes(lifetime=0)
    assert answer.get(Attr.LIFETIME) == 0
    assert answer.signed
    assert relay.network.sockets == {}
    assert alice.refreshes().code == 437
    alice.sends_data(0x4000, b"hi")
    assert relay.sent() == []
    assert relay.dropped() == {"unbound_channel": 1}

    relay.passes(seconds=7200)  # and nothing of it comes due
    assert relay.server.poll_timeout() is None


def test_channels_do_not_survive_refresh_0(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates()
    bob, carol = relay.peer("198.51.100.7:9000"), relay.peer("198.51.100.8:9000")
    alice.binds(0x4000, bob)
    alice.refreshes(lifetime=0)
    alice.allocates()

    alice.sends_data(0x4000, b"hi")
    bob.sends(b"hi", to=alice.relayed_address)
    assert relay.sent() == []
    alice.binds(0x4000, carol)  # the number is not reserved for bob
    alice.binds(0x4001, bob)


def test_without_an_allocation_it_is_a_mismatch(relay: Scenario) -> None:
    answer = relay.client("192.0.2.10:5000").refreshes()

    assert (answer.code, answer.signed) == (437, True)
    assert relay.client("192.0.2.10:5000").refreshes(lifetime=0).code == 437


@pytest.mark.parametrize(
    "method", [Method.REFRESH, Method.CREATE_PERMISSION, Method.CHANNEL_BIND], ids=lambda m: m.name
)
def test_only_the_user_that_allocated_may_go_on(relay: Scenario, method: Method) -> None:
    relay.client("192.0.2.10:5000").allocates()
    mallory = relay.client("192.0.2.10:5000", user="mallory")
    answer = mallory.asks(method, (Attr.LIFETIME, 600))

    assert (answer.code, answer.signed) == (441, True)
    assert relay.server.allocations == 1


def test_with_renewed_credentials_it_is_the_same_user(relay: Scenario) -> None:
    """What follows the expiry is who a username is; the expiry changes with each renewal."""
    alice = relay.client("192.0.2.10:5000", user="alice", expiry=int(UNIX_START) + 1000)
    alice.allocates()
    renewed = relay.client("192.0.2.10:5000", user="alice", expiry=int(UNIX_START) + 90_000)
    bob = relay.peer("198.51.100.7:9000")

    assert renewed.refreshes().code is None
    renewed.binds(0x4000, bob)
    assert renewed.refreshes(lifetime=0).code is None


# --- A client that is restarted on its old port, with a new username --------------------------


def restarted(relay: Scenario) -> Client:
    """A client in whose place another one has allocated, on the same port, a moment ago."""
    relay.client("192.0.2.10:5000", user="before").allocates().binds(
        0x4000, relay.peer("198.51.100.7:9000")
    )
    return relay.client("192.0.2.10:5000", user="after")


def test_whoever_has_good_credentials_may_end_what_is_in_its_way(relay: Scenario) -> None:
    """Firezone's client is told 437, refreshes with lifetime 0, and allocates again."""
    alice = restarted(relay)
    assert tries_to_allocate(alice).code == 437

    ended = alice.refreshes(lifetime=0)
    assert (ended.code, ended.get(Attr.LIFETIME), ended.signed) == (None, 0, True)
    assert relay.network.sockets == {}
    alice.allocates().binds(0x4000, relay.peer("198.51.100.8:9000"))


@pytest.mark.parametrize("takeover", [False, True])
@pytest.mark.parametrize("again", [0, 1, 2])
def test_every_request_of_a_restart_may_arrive_again_and_late(again: int, takeover: bool) -> None:
    """After each step all requests so far arrive once more: none undoes what came after it."""
    relay = Scenario(one_allocation_per_username=takeover)
    alice = restarted(relay)
    refused = alice.signed(Method.ALLOCATE, UDP)
    ending = alice.signed(Method.REFRESH, (Attr.LIFETIME, 0))
    allocating = alice.signed(Method.ALLOCATE, UDP)

    assert alice.hears(refused).code == 437
    for _ in range(again):
        assert alice.hears(refused).code == 437
    assert alice.hears(ending).code is None
    for _ in range(again):
        assert alice.hears(ending).get(Attr.LIFETIME) == 0
    first = alice.hears(allocating)
    assert first.code is None
    for _ in range(again):
        assert alice.hears(allocating).datagram == first.datagram
        assert alice.hears(ending).get(Attr.LIFETIME) == 0
        assert alice.hears(refused).code == 437
    assert relay.server.allocations == 1
    assert alice.hears(allocating).datagram == first.datagram


def test_a_refused_allocate_that_arrives_again_when_the_way_is_free_is_served(
    relay: Scenario,
) -> None:
    """The client sent it, and has no allocation: it did not hear the 437."""
    alice = restarted(relay)
    refused = alice.signed(Method.ALLOCATE, UDP)
    alice.sends(refused)
    alice.refreshes(lifetime=0)

    assert alice.hears(refused).code is None


def test_the_end_of_an_allocation_is_told_again(relay: Scenario) -> None:
    """Its answer may have been lost, and 437 would say that there never was one."""
    alice = relay.client("192.0.2.10:5000").allocates()
    ending = alice.signed(Method.REFRESH, (Attr.LIFETIME, 0))

    first = alice.hears(ending)
    assert first.code is None
    assert alice.hears(ending).datagram == first.datagram


def test_a_late_duplicate_of_an_end_does_not_end_what_came_after(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates()
    ending = alice.signed(Method.REFRESH, (Attr.LIFETIME, 0))
    alice.sends(ending)
    alice.allocates()

    alice.sends(ending)
    assert relay.server.allocations == 1


def test_what_was_recorded_before_an_allocation_does_not_end_it(relay: Scenario) -> None:
    """A replay of an end that never arrived: its nonce is older than that of the allocation."""
    alice = relay.client("192.0.2.10:5000").allocates()
    recorded = alice.signed(Method.REFRESH, (Attr.LIFETIME, 0))
    relay.passes(seconds=600)
    later = relay.client("192.0.2.10:5000").allocates()

    assert later.hears(recorded).code == 438
    assert later.refreshes().code is None
    assert later.refreshes(lifetime=0).code is None


# --- Families --------------------------------------------------------------------------------


def test_one_family_of_a_dual_allocation_is_deleted_alone(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates(BOTH)
    four, six = relay.peer("198.51.100.7:9000"), relay.peer("[2001:db8::7]:9000")
    alice.binds(0x4000, four).binds(0x4001, six)
    relay.sent()

    answer = alice.asks(Method.REFRESH, (FAMILY, Family.IPV6), (Attr.LIFETIME, 0))
    assert (answer.code, answer.get(Attr.LIFETIME)) == (None, 0)
    port = alice.relayed_address[1]
    assert set(relay.network.sockets) == {(Family.IPV4, port)}
    for number in (0x4000, 0x4001):
        alice.sends_data(number, b"ping")
    four.sends(b"pong", to=alice.relayed_address)
    assert relay.sent() == [relayed(alice, four, b"ping"), to(alice, channel_data(0x4000, b"pong"))]
    assert alice.tries_to_bind(0x4001, six).code == 443
    assert alice.asks(Method.REFRESH, (FAMILY, Family.IPV6)).code == 443

    assert alice.asks(Method.REFRESH, (FAMILY, Family.IPV4), (Attr.LIFETIME, 0)).code is None
    assert relay.network.sockets == {}
    assert alice.refreshes().code == 437


def test_one_family_of_a_dual_allocation_is_refreshed_alone(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates(BOTH, lifetime=600)
    six = relay.peer("[2001:db8::7]:9000")
    relay.passes(seconds=500)
    alice.binds(0x4001, six).binds(0x4002, relay.peer("198.51.100.7:9000"))
    assert alice.asks(Method.REFRESH, (FAMILY, Family.IPV6), (Attr.LIFETIME, 1000)).code is None

    relay.passes(seconds=100)
    port = alice.relayed_address[1]
    assert set(relay.network.sockets) == {(Family.IPV6, port)}
    assert relay.server.channels == 1
    six.sends(b"still here", to=alice.relayed_addresses[1])
    assert to(alice, channel_data(0x4001, b"still here")) in relay.sent()

    relay.passes(seconds=900)
    assert relay.server.allocations == 0
    assert relay.network.sockets == {}


def test_without_a_family_a_refresh_is_about_both(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates(BOTH, lifetime=600)
    assert alice.refreshes(lifetime=1000).code is None
    relay.passes(seconds=999)
    assert len(relay.network.sockets) == 2

    assert alice.refreshes(lifetime=0).code is None
    assert relay.network.sockets == {}


def test_a_family_may_be_deleted_twice_over(relay: Scenario) -> None:
    """A retransmission does not find it any more, and is answered all the same."""
    alice = relay.client("192.0.2.10:5000").allocates(BOTH)
    ending = alice.signed(Method.REFRESH, (FAMILY, Family.IPV4), (Attr.LIFETIME, 0))

    assert alice.hears(ending).datagram == alice.hears(ending).datagram


def test_a_family_that_the_allocation_lacks(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates()
    family = Attr.REQUESTED_ADDRESS_FAMILY

    assert alice.asks(Method.REFRESH, (family, Family.IPV6)).code == 443
    assert alice.asks(Method.REFRESH, (family, Family.IPV6), (Attr.LIFETIME, 0)).code == 443
    assert alice.asks(Method.REFRESH, (family, Family.IPV4)).code is None


def test_firezones_clients_repeat_the_attributes_of_allocate(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates()
    answer = alice.asks(
        Method.REFRESH,
        (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL),
        (Attr.ADDITIONAL_ADDRESS_FAMILY, Family.IPV6),
    )

    assert answer.code is None
    assert answer.get(Attr.LIFETIME) == 600


def test_neither_data_nor_binding_extends_an_allocation(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates(lifetime=600)
    bob = relay.peer("198.51.100.7:9000")
    relay.passes(seconds=599)
    alice.binds(0x4000, bob)
    bob.sends(b"hi", to=alice.relayed_address)
    assert relay.sent() == [to(alice, channel_data(0x4000, b"hi"))]

    relay.passes(seconds=1)
    assert relay.server.allocations == 0
    relay.passes(seconds=3600)  # its channel would have lived longer
