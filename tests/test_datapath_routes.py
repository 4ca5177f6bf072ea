"""The routes have one writer, and watchers hear of each change before it takes effect."""

import pytest

from relay.stun.attributes import Attr
from relay.stun.const import Family
from relay.turn.commands import (
    BindChannel,
    ClientAddress,
    ClosePort,
    InstallPermissions,
    PeerAddress,
    UnbindChannel,
)
from tests.scenario import Client, Peer, Scenario

Route = tuple[ClientAddress, int, int, PeerAddress]


class Watcher:
    """Keeps routes of its own, as a program in the kernel would."""

    def __init__(self, relay: Scenario) -> None:
        self._relay = relay
        self.routes: set[Route] = set()
        self.permitted_hosts: list[str] = []
        self.sent_before: list[int] = []  # how many datagrams had left at each change
        relay.datapath.routes.watchers.append(self)

    def bound(self, bind: BindChannel) -> None:
        route = (bind.client, bind.number, bind.port, bind.peer)
        assert route not in self.routes
        assert (bind.client, bind.number) in self._relay.datapath.routes.to_peer
        self.routes.add(route)
        self.sent_before.append(len(self._relay.network.sent))

    def unbinding(self, unbind: UnbindChannel) -> None:
        assert (unbind.client, unbind.number) in self._relay.datapath.routes.to_peer
        self.routes.remove((unbind.client, unbind.number, unbind.port, unbind.peer))
        self.sent_before.append(len(self._relay.network.sent))

    def closing(self, close: ClosePort) -> None:
        for number, peer in close.channels:
            self.unbinding(UnbindChannel(close.client, number, close.port, peer))

    def permitted(self, install: InstallPermissions) -> None:
        self.permitted_hosts += install.hosts


@pytest.fixture
def watcher(relay: Scenario) -> Watcher:
    return Watcher(relay)


@pytest.fixture
def alice(relay: Scenario) -> Client:
    return relay.client("192.0.2.10:5000").allocates((Attr.ADDITIONAL_ADDRESS_FAMILY, Family.IPV6))


@pytest.fixture
def bob(relay: Scenario) -> Peer:
    return relay.peer("198.51.100.7:9000")


def route(client: Client, number: int, peer: Peer) -> Route:
    return (client.address, number, client.relayed_address[1], peer.address)


def test_a_watcher_hears_of_a_bind_before_the_client_does(
    relay: Scenario, watcher: Watcher, alice: Client, bob: Peer
) -> None:
    relay.sent()
    request = alice.signed(
        0x009, (Attr.CHANNEL_NUMBER, 0x4001), (Attr.XOR_PEER_ADDRESS, bob.address)
    )
    alice.sends(request)

    assert watcher.routes == {route(alice, 0x4001, bob)}
    assert watcher.sent_before == [0]
    assert len(relay.sent()) == 1  # the success


def test_a_refreshed_channel_is_no_change(watcher: Watcher, alice: Client, bob: Peer) -> None:
    alice.binds(0x4001, bob)
    alice.binds(0x4001, bob)

    assert len(watcher.sent_before) == 1


def test_a_watcher_hears_when_a_channel_expires_and_is_revived(
    relay: Scenario, watcher: Watcher, alice: Client, bob: Peer
) -> None:
    alice.refreshes(lifetime=3600)
    alice.binds(0x4001, bob)
    relay.passes(seconds=600)
    assert watcher.routes == set()

    alice.binds(0x4001, bob)
    assert watcher.routes == {route(alice, 0x4001, bob)}


def test_a_watcher_hears_of_an_end_before_the_client_does(
    relay: Scenario, watcher: Watcher, alice: Client, bob: Peer
) -> None:
    six = relay.peer("[2001:db8::7]:9000")
    alice.binds(0x4001, bob).binds(0x4002, six)
    relay.sent()
    alice.sends(alice.signed(0x004, (Attr.LIFETIME, 0)))

    assert watcher.routes == set()
    assert watcher.sent_before[-2:] == [0, 0]
    assert len(relay.sent()) == 1


def test_a_watcher_hears_of_forbidden_peers(
    relay: Scenario, watcher: Watcher, alice: Client, bob: Peer
) -> None:
    carol = relay.peer("192.0.2.200:9000")
    alice.binds(0x4001, bob).binds(0x4002, carol)
    relay.changes_peers(deny=["198.51.100.7"])

    assert watcher.routes == {route(alice, 0x4002, carol)}


def test_after_the_end_of_all_allocations_no_route_is_left(
    relay: Scenario, watcher: Watcher, alice: Client, bob: Peer
) -> None:
    other = relay.client("192.0.2.11:5000").allocates(lifetime=60)
    other.binds(0x4001, bob)
    alice.binds(0x4001, bob)
    relay.passes(seconds=600)

    assert watcher.routes == set()
    assert relay.datapath.routes.to_peer == {}
    assert relay.network.sockets == {}
