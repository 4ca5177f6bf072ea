"""Channels become routes of the kernel by the server's own commands, and go with them."""

import errno
import logging
from collections.abc import Iterator

import pytest

from relay.stun.attributes import Attr
from relay.stun.const import Family
from relay.turn.commands import BindChannel, ClientAddress, PeerAddress, UnbindChannel
from relay.xdp.routes import KernelRoutes
from tests.scenario import LISTEN_PORT, PUBLIC_IP4, PUBLIC_IP6, Client, Peer, Scenario
from tests.xdpbed import Entries, routes_to

HOSTS = {Family.IPV4: PUBLIC_IP4, Family.IPV6: PUBLIC_IP6}


class Kernel(Entries):
    """A map that can be full, or refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.room = 1000
        self.error: int | None = None
        self.changes: list[str] = []

    def update(self, key: bytes, value: bytes) -> None:  # type: ignore[override]
        if self.error is not None:
            raise OSError(self.error, "as the test wants it")
        if len(self) >= self.room:
            raise OSError(errno.E2BIG, "Argument list too long")
        assert key not in self
        super().update(key, value)
        self.changes.append("to the client" if channel_of(key) == 0 else "to the peer")

    def delete_many(self, keys: bytes, count: int) -> None:
        if self.error is not None:
            raise OSError(self.error, "as the test wants it")
        super().delete_many(keys, count)


def channel_of(flow: bytes) -> int:
    return int.from_bytes(flow[36:38])


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def lost_control() -> list[str]:
    return []


@pytest.fixture
def routes(relay: Scenario, kernel: Kernel, lost_control: list[str]) -> Iterator[KernelRoutes]:
    routes = routes_to(kernel, HOSTS, HOSTS, on_lost_control=lost_control.append)
    relay.datapath.routes.watchers.append(routes)
    yield routes
    assert lost_control or len(routes) == len(kernel)


@pytest.fixture
def alice(relay: Scenario) -> Client:
    return relay.client("192.0.2.10:5000").allocates((Attr.ADDITIONAL_ADDRESS_FAMILY, Family.IPV6))


@pytest.fixture
def bob(relay: Scenario) -> Peer:
    return relay.peer("198.51.100.7:9000")


@pytest.mark.usefixtures("routes")
def test_a_channel_is_two_routes_of_which_that_to_the_client_is_first(
    kernel: Kernel, alice: Client, bob: Peer
) -> None:
    """What a client sends once it hears "success" finds the way back open."""
    alice.binds(0x4001, bob)
    assert kernel.changes == ["to the client", "to the peer"]
    to_client, to_peer = kernel
    port = alice.relayed_address[1].to_bytes(2)
    mapped = bytes(10) + b"\xff\xff"
    us, them = mapped + bytes([192, 0, 2, 1]), mapped + bytes([198, 51, 100, 7])
    her = mapped + bytes([192, 0, 2, 10])
    listening = LISTEN_PORT.to_bytes(2)
    assert to_client == them + us + (9000).to_bytes(2) + port + b"\0\0\4\0"
    assert to_peer == her + us + (5000).to_bytes(2) + listening + b"\x40\x01\4\0"
    for key, value in kernel.items():
        assert value[8:48] == key
        assert len(value) == 120
        assert value[88:] == bytes(32)
    up, down = kernel[to_peer], kernel[to_client]
    assert down[4:8] + down[48:84] == (5000).to_bytes(2) + listening + her + us + b"\x40\x01\4\0"
    assert up[4:8] + up[48:84] == (9000).to_bytes(2) + port + them + us + b"\0\0\4\0"


def test_no_two_routes_have_the_same_id(
    routes: KernelRoutes, kernel: Kernel, alice: Client, bob: Peer
) -> None:
    """By it the program knows whose next hop it has found, and whether it has read one route."""
    ids = []
    for _ in range(3):
        alice.binds(0x4001, bob)
        ids += [value[:4] for value in kernel.values()]
        assert [value[84:88] for value in kernel.values()] == ids[-2:]
        alice.refreshes(lifetime=0)
        alice.allocates()
    assert len(set(ids)) == 6
    assert len(routes) == 0


def test_a_refresh_is_no_change(
    routes: KernelRoutes, kernel: Kernel, alice: Client, bob: Peer
) -> None:
    alice.binds(0x4001, bob)
    alice.binds(0x4001, bob)
    alice.refreshes()
    assert len(kernel.changes) == 2
    assert len(routes) == 2


def test_a_channel_that_expires_is_over_until_it_is_revived(
    relay: Scenario, routes: KernelRoutes, kernel: Kernel, alice: Client, bob: Peer
) -> None:
    alice.refreshes(lifetime=3600)
    alice.binds(0x4001, bob)
    relay.passes(seconds=600)
    assert not kernel
    alice.binds(0x4001, bob)
    assert len(kernel) == 2
    relay.passes(seconds=4000)
    assert not kernel
    assert len(routes) == 0


@pytest.mark.usefixtures("routes")
def test_it_ends_before_the_client_hears_so(
    relay: Scenario, kernel: Kernel, alice: Client, bob: Peer
) -> None:
    alice.binds(0x4001, bob).binds(0x4002, relay.peer("[2001:db8::7]:9000"))
    alice.refreshes(lifetime=0)
    assert not kernel


@pytest.mark.usefixtures("routes")
def test_of_two_families_one_can_end_alone(
    relay: Scenario, kernel: Kernel, alice: Client, bob: Peer
) -> None:
    alice.binds(0x4001, bob).binds(0x4002, relay.peer("[2001:db8::7]:9000"))
    alice.asks(0x004, (Attr.LIFETIME, 0), (Attr.REQUESTED_ADDRESS_FAMILY, Family.IPV6))
    assert {channel_of(flow) for flow in kernel} == {0, 0x4001}


@pytest.mark.usefixtures("routes")
def test_what_becomes_forbidden_is_over(
    relay: Scenario, kernel: Kernel, alice: Client, bob: Peer
) -> None:
    alice.binds(0x4001, bob).binds(0x4002, relay.peer("192.0.2.200:9000"))
    relay.changes_peers(deny=["198.51.100.7"])
    assert {channel_of(flow) for flow in kernel} == {0, 0x4002}


@pytest.mark.usefixtures("routes")
def test_permissions_are_none_of_the_kernels_business(
    kernel: Kernel, alice: Client, bob: Peer
) -> None:
    alice.permits(bob)
    alice.indicates(bob, b"x")
    assert not kernel


def test_an_allocation_of_this_relay_is_marked_as_inside(
    relay: Scenario, routes: KernelRoutes, kernel: Kernel, alice: Client
) -> None:
    carol = relay.client("192.0.2.11:5000").allocates()
    alice.binds(0x4001, carol.relayed_address)
    flags = {channel_of(flow): value[83] for flow, value in kernel.items()}
    assert flags == {0x4001: 1, 0: 4}  # back only from inside: the address is the host's own
    assert len(routes) == 2


def test_flags_when_dscp_and_ecn_are_not_copied(kernel: Kernel) -> None:
    routes = routes_to(kernel, HOSTS, HOSTS, copies_tos=False, on_lost_control=pytest.fail)
    client = ClientAddress((("192.0.2.10", 5000), b""))
    for number, peer in ((0x4001, ("198.51.100.7", 9000)), (0x4002, (PUBLIC_IP4, 50000))):
        routes.bound(BindChannel(client, number, 50001, PeerAddress(peer), reaches_outside=True))
    assert sorted(value[83] for value in kernel.values()) == [2, 2, 3, 6]


def test_a_link_local_client_stays_with_the_sockets(kernel: Kernel) -> None:
    """Somebody else may have its address at another device."""
    routes = routes_to(kernel, HOSTS, HOSTS, on_lost_control=pytest.fail)
    client = ClientAddress((("fe80::1%eth0", 5000, 0, 2), b""))
    peer = PeerAddress(("2001:db8::7", 9000))
    routes.bound(BindChannel(client, 0x4001, 50000, peer, reaches_outside=True))
    assert not kernel
    routes.unbinding(UnbindChannel(client, 0x4001, 50000, peer))
    assert sum(routes.failures.values()) == 0


def test_what_does_not_fit_stays_with_the_sockets(
    routes: KernelRoutes,
    kernel: Kernel,
    alice: Client,
    relay: Scenario,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not by half, either. It is said once, and counted each time."""
    kernel.room = 3
    caplog.set_level(logging.WARNING)
    for number in range(3):
        alice.binds(0x4001 + number, relay.peer(f"198.51.100.7:900{number}"))
    assert {channel_of(flow) for flow in kernel} == {0, 0x4001}
    assert routes.failures["map_full"] == 2
    (record,) = caplog.records
    assert record.getMessage() == (
        "a channel is relayed by the sockets, for the kernel does not take it: Argument list too "
        "long (map_full); more such are only counted"
    )
    alice.sends_data(0x4002, b"x")
    assert len(relay.sent()) > 0
    alice.refreshes(lifetime=0)
    assert not kernel


@pytest.mark.parametrize(
    ("error", "reason"),
    [(errno.ENOMEM, "no_memory"), (errno.EPERM, "not_permitted"), (errno.EINVAL, "other")],
)
def test_failures_are_counted_by_reason(
    routes: KernelRoutes, kernel: Kernel, alice: Client, bob: Peer, error: int, reason: str
) -> None:
    kernel.error = error
    alice.binds(0x4001, bob)
    assert routes.failures[reason] == 1
    assert len(routes) == 0


def test_without_a_way_to_the_peer_there_is_no_source(kernel: Kernel) -> None:
    wildcards = {Family.IPV4: "0.0.0.0", Family.IPV6: "::"}
    routes = routes_to(kernel, HOSTS, wildcards, on_lost_control=pytest.fail)
    client = ClientAddress((("192.0.2.10", 5000), b""))
    peer = PeerAddress(("255.255.255.255", 9000))  # which a socket may not connect to
    routes.bound(BindChannel(client, 0x4001, 50000, peer, reaches_outside=True))
    assert routes.failures["no_source_address"] == 1
    assert not kernel


def test_the_source_of_a_port_that_is_bound_to_no_address_is_the_routes(kernel: Kernel) -> None:
    wildcards = {Family.IPV4: "0.0.0.0", Family.IPV6: "::"}
    routes = routes_to(kernel, HOSTS, wildcards, on_lost_control=pytest.fail)
    client = ClientAddress((("192.0.2.10", 5000), b""))
    peer = PeerAddress(("127.0.0.9", 9000))
    routes.bound(BindChannel(client, 0x4001, 50000, peer, reaches_outside=True))
    to_client, _ = kernel
    assert to_client[28:32] == bytes([127, 0, 0, 1])


def test_what_cannot_be_taken_away_ends_the_program(
    routes: KernelRoutes, kernel: Kernel, lost_control: list[str], alice: Client, bob: Peer
) -> None:
    """Else it would relay for somebody who may not any more."""
    alice.binds(0x4001, bob)
    kernel.error = errno.EPERM
    alice.refreshes(lifetime=0)
    assert lost_control == ["a route cannot be deleted: as the test wants it"]
    routes.stop()
    kernel.error = None
    alice.allocates()
    alice.binds(0x4001, bob)
    assert len(routes) == 0
    alice.refreshes(lifetime=0)
