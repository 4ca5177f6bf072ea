"""A relay on a host of its own with two addresses per family: a network namespace and a veth."""

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.stun.const import Family
from tests.netns import ip, prefixed
from tests.process import RelayProcess, free_port
from tests.turnclient import TIMEOUT, TurnClient

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None,
    reason="making a network namespace takes root and iproute2",
)

# The first address of each family is the one that the kernel prefers as a source.
FIRST = {Family.IPV4: "198.51.100.1", Family.IPV6: "2001:db8:1::1"}
SECOND = {Family.IPV4: "198.51.100.2", Family.IPV6: "2001:db8:1::2"}
OUTSIDE = {Family.IPV4: "198.51.100.10", Family.IPV6: "2001:db8:1::10"}


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    """The name of a namespace that is one hop away, at FIRST and SECOND."""
    name, ours, theirs = f"relay-{os.getpid()}", f"rt{os.getpid()}", f"rh{os.getpid()}"
    ip("netns", "add", name)
    try:
        ip("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", name)
        for host in (*FIRST.values(), *SECOND.values()):
            ip("-n", name, "address", "add", *prefixed(host), "dev", theirs)
        for host in OUTSIDE.values():
            ip("address", "add", *prefixed(host), "dev", ours)
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "set", theirs, "up")
        ip("link", "set", ours, "up")
        yield name
    finally:
        ip("netns", "delete", name)  # and the veth with it


@pytest.fixture(scope="module")
def relay(host: str) -> Iterator[RelayProcess]:
    arguments = [
        f"--public-ip4-addr={SECOND[Family.IPV4]}",
        f"--public-ip6-addr={SECOND[Family.IPV6]}",
        "--allow-peer=198.51.100.0/24,2001:db8:1::/64",
    ]
    within = ("ip", "netns", "exec", host)
    with RelayProcess(*arguments, port=free_port(), prefix=within, loopback=False) as relay:
        yield relay


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("server", [FIRST, SECOND])
def test_every_address_answers_for_itself(
    relay: RelayProcess, family: Family, server: dict[Family, str]
) -> None:
    """The client's socket is connected: it hears from no other address."""
    with client_of(relay, server[family]) as alice, peer(family) as bob:
        assert alice.maps()[0] == OUTSIDE[family]
        relayed_address = alice.allocates(family)
        alice.binds(0x4000, bob.getsockname()[:2])

        bob.sendto(b"hi", relayed_address)
        assert alice.receives() == (0x4000, b"hi")


@pytest.mark.parametrize("family", Family)
def test_peers_hear_from_the_relayed_address(relay: RelayProcess, family: Family) -> None:
    with client_of(relay, FIRST[family]) as alice, peer(family) as bob:
        relayed_address = alice.allocates(family)
        assert relayed_address[0] == SECOND[family]
        alice.binds(0x4000, bob.getsockname()[:2])

        alice.sends(0x4000, b"hi")
        payload, source = bob.recvfrom(100)
        assert (payload, source[:2]) == (b"hi", relayed_address)


@pytest.mark.parametrize("family", Family)
def test_a_peer_without_a_route_costs_one_datagram(relay: RelayProcess, family: Family) -> None:
    """Sending there is ENETUNREACH."""
    nowhere = {Family.IPV4: ("8.8.8.8", 53), Family.IPV6: ("2606:4700::1111", 53)}
    with client_of(relay, FIRST[family]) as alice, peer(family) as bob:
        relayed_address = alice.allocates(family)
        alice.binds(0x4000, nowhere[family])
        alice.binds(0x4001, bob.getsockname()[:2])
        alice.sends(0x4000, b"lost")
        alice.sends(0x4001, b"hi")

        payload, source = bob.recvfrom(100)
        assert (payload, source[:2]) == (b"hi", relayed_address)


@pytest.fixture
def crowded() -> Iterator[str]:
    """The name of a namespace with so many addresses that not each can have a socket."""
    name = f"crowd-{os.getpid()}"
    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "set", "lo", "up")
        for number in range(1, 41):
            ip("-n", name, "address", "add", f"198.51.100.{number}/32", "dev", "lo")
        yield name
    finally:
        ip("netns", "delete", name)


def test_the_public_address_has_a_socket_of_its_own_among_many(crowded: str) -> None:
    public = "198.51.100.40"
    within = ("ip", "netns", "exec", crowded)
    arguments = (f"--public-ip4-addr={public}",)
    with RelayProcess(*arguments, port=free_port(), prefix=within, loopback=False) as relay:
        table = Path(f"/proc/{relay.process.pid}/net/udp").read_text().splitlines()[1:]
    hosts = {
        socket.inet_ntoa(int(line.split()[1].partition(":")[0], 16).to_bytes(4, sys.byteorder))
        for line in table
    }

    assert {"0.0.0.0", public} <= hosts
    assert len(hosts) < 40


def client_of(relay: RelayProcess, server: str) -> TurnClient:
    return TurnClient((server, relay.port), relay.username, relay.password)


def peer(family: Family) -> socket.socket:
    ipv6 = family is Family.IPV6
    sock = socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((OUTSIDE[family], 0))
    sock.settimeout(TIMEOUT)
    return sock
