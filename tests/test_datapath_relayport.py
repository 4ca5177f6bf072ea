"""Relay ports on real sockets: what is opened is closed, and nothing of it is left."""

import errno
import gc
import socket
from collections.abc import Iterator

import pytest

from relay.datapath.relayport import RelayPorts
from relay.datapath.workspace import Workspace
from relay.net.offload import Offload
from relay.net.reactor import Reactor
from relay.net.udp import PortOpener, Shared
from relay.observe.counters import Counters
from relay.stun.const import Family

HOSTS = {Family.IPV4: "127.0.0.1", Family.IPV6: "::1"}
BOTH = (Family.IPV4, Family.IPV6)


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    reactor = Reactor()
    yield reactor
    reactor.close()


@pytest.fixture
def ports(reactor: Reactor) -> RelayPorts:
    workspace = Workspace(Counters())
    shared = Shared(workspace.for_peers, workspace.counters.lost, Offload(wanted=True))
    opener = PortOpener(reactor, {int(f): host for f, host in HOSTS.items()}, shared)
    return RelayPorts(workspace, opener.open, lambda host: host in HOSTS.values(), reactor.clock)


def test_nothing_of_a_port_is_left_to_the_garbage_collector(
    reactor: Reactor, ports: RelayPorts
) -> None:
    """Its collections hold up everyone's datagrams, the more there is to look at."""
    number = free_port()
    gc.collect()
    gc.disable()
    try:
        for _ in range(100):
            ports.open(number, BOTH)
            ports.close(number, BOTH)
            reactor.close_retired()
        assert gc.collect() < 100  # of all that there is in this process
    finally:
        gc.enable()


def test_a_family_that_cannot_be_bound_is_told_and_the_other_stays(ports: RelayPorts) -> None:
    number = free_port()
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as other:
        other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        other.bind(("::1", number))
        failures = ports.open(number, BOTH)
    assert {family: error.errno for family, error in failures.items()} == {
        Family.IPV6: errno.EADDRINUSE
    }
    assert ports.at(("127.0.0.1", number)) is ports[number]
    assert ports.at(("::1", number)) is None
    ports.close(number, (Family.IPV4,))

    assert ports.open(number, BOTH) == {}
    assert ports.at(("127.0.0.1", number)) is ports.at(("::1", number)) is ports[number]
    ports.close_all()


def test_a_port_may_be_closed_in_one_family(ports: RelayPorts) -> None:
    number, ended = free_port(), []
    ports.on_last_closed = lambda: ended.append(True)
    ports.open(number, BOTH)

    ports.close(number, (Family.IPV6,))
    assert ports.at(("127.0.0.1", number)) is ports[number]
    assert ports.at(("::1", number)) is None
    assert not ended

    ports.close(number, (Family.IPV4,))
    assert ports.at(("127.0.0.1", number)) is None
    assert ended


def test_what_comes_from_a_port_of_ours_is_known(ports: RelayPorts) -> None:
    """Family, number and host: all three must be ours. RFC 8656 §21.1.7."""
    number = free_port()
    ports.open(number, (Family.IPV4,))

    assert ports.is_source(("127.0.0.1", number))
    assert not ports.is_source(("127.0.0.2", number))
    assert not ports.is_source(("::1", number))
    assert not ports.is_source(("127.0.0.1", number - 1))
    ports.close_all()


def free_port() -> int:
    """Return a UDP port that is free in both families."""
    while True:
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as four,
            socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as six,
        ):
            four.bind(("127.0.0.1", 0))
            number: int = four.getsockname()[1]
            try:
                six.bind(("::1", number))
            except OSError:
                continue
            return number
