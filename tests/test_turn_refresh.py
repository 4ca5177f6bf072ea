"""Refresh. RFC 8656 §8."""

import pytest

from relay.stun.attributes import Attr
from relay.stun.const import UDP_PROTOCOL, Family, Method
from tests.scenario import Scenario, channel_data, to


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
def test_only_the_username_that_allocated_may_go_on(relay: Scenario, method: Method) -> None:
    relay.client("192.0.2.10:5000").allocates()
    mallory = relay.client("192.0.2.10:5000", user="mallory")
    answer = mallory.asks(method, (Attr.LIFETIME, 0))

    assert (answer.code, answer.signed) == (441, True)
    assert relay.server.allocations == 1


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
