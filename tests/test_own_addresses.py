"""A relay whose host gets and loses addresses while it runs: a network namespace and a veth."""

import errno
import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.stun.const import Family
from tests.netns import inside, ip, prefixed
from tests.probes import ask
from tests.process import RelayProcess, free_port, free_tcp_port
from tests.seccomp import SOCKET, refusing
from tests.turnclient import TIMEOUT, TurnClient, TurnError

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None,
    reason="making a network namespace takes root and iproute2",
)

HOST = "198.51.100.1"  # of the relay's host, always
LATER = "198.51.100.2", "2001:db8:1::2"  # come and go
OUTSIDE = "198.51.100.10", "2001:db8:1::10"
ALLOWED = "--allow-peer=198.51.100.0/24,2001:db8:1::/64"


class Host:
    """A namespace that is one hop away, at HOST."""

    def __init__(self) -> None:
        self.name, self.ours = f"own-{os.getpid()}", f"ot{os.getpid()}"
        self._theirs = f"oh{os.getpid()}"
        ip("netns", "add", self.name)
        link = "link", "add", self.ours, "type", "veth", "peer", "name", self._theirs
        ip(*link, "netns", self.name)
        self.gets(HOST)
        self.gets("2001:db8:1::1")
        for host in OUTSIDE:
            ip("address", "add", *prefixed(host), "dev", self.ours)
        ip("-n", self.name, "link", "set", "lo", "up")
        ip("-n", self.name, "link", "set", self._theirs, "up")
        ip("link", "set", self.ours, "up")

    def gets(self, host: str) -> None:
        ip("-n", self.name, "address", "add", *prefixed(host), "dev", self._theirs)

    def checks(self, host: str) -> None:
        """Get an IPv6 address that cannot be bound before nobody else was found to have it."""
        ip("-n", self.name, "address", "add", f"{host}/64", "dev", self._theirs)

    def loses(self, host: str) -> None:
        prefix = "64" if ":" in host else "24"
        ip("-n", self.name, "address", "delete", f"{host}/{prefix}", "dev", self._theirs)

    def runs_relay(self, *arguments: str, program: str | None = None) -> RelayProcess:
        within = ("ip", "netns", "exec", self.name)
        return RelayProcess(
            ALLOWED, *arguments, port=free_port(), prefix=within, loopback=False, program=program
        )


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    try:
        yield host
    finally:
        ip("link", "delete", host.ours)  # at once; with the namespace it would take a moment
        ip("netns", "delete", host.name)


@pytest.mark.parametrize(("later", "outside"), [*zip(LATER, OUTSIDE, strict=True)])
def test_ports_are_bound_to_the_public_address_when_it_comes_and_while_it_stays(
    host: Host, later: str, outside: str
) -> None:
    is_ipv6 = ":" in later
    server = "2001:db8:1::1" if is_ipv6 else HOST
    public = f"--public-ip6-addr={later}" if is_ipv6 else f"--public-ip4-addr={later}"
    with host.runs_relay(public) as relay, peer(outside) as bob:
        assert source_of(relay, server, bob) == server
        host.gets(later)
        relay.logs(f"new relay ports are bound to {later}, which this host has now")
        assert source_of(relay, server, bob) == later
        host.loses(later)
        relay.logs(f"{later} cannot be bound: new relay ports are bound to")
        assert source_of(relay, server, bob) == server


def test_an_ipv6_address_is_used_when_it_has_been_checked_for_duplicates(host: Host) -> None:
    public = LATER[1]
    host.checks(public)
    with host.runs_relay(f"--public-ip6-addr={public}") as relay, peer(OUTSIDE[1]) as bob:
        assert source_of(relay, "2001:db8:1::1", bob) in {"2001:db8:1::1", public}
        relay.logs(f"new relay ports are bound to {public}, which this host has now")
        assert source_of(relay, "2001:db8:1::1", bob) == public


def test_an_address_that_comes_is_no_peer_any_more(host: Host) -> None:
    """Nor does what is bound to it relay anything."""
    later = LATER[0]
    with (
        host.runs_relay(f"--public-ip4-addr={HOST}") as relay,
        TurnClient((HOST, relay.port), relay.username, relay.password) as alice,
    ):
        alice.allocates()
        alice.binds(0x4000, (later, relay.port))
        alice.binds(0x4001, (OUTSIDE[0], 9))
        host.gets(later)
        while "1 channels" not in summary(relay):
            pass
        for port in (relay.port, 161):
            with pytest.raises(TurnError) as refusal:
                alice.binds(0x4002, (later, port))
            assert refusal.value.code == 403
        relay.logs("is this relay itself")
        relay.logs(f"{later} is this host; --allow-peer {later} would allow it")

        host.loses(later)
        while not can_bind(alice, (later, 161)):
            pass


def test_probes_hear_that_the_public_address_is_gone(host: Host) -> None:
    host.gets(LATER[0])
    http = free_tcp_port()
    arguments = f"--public-ip4-addr={LATER[0]}", f"--http-addr=127.0.0.1:{http}"
    with host.runs_relay(*arguments) as relay:
        relay.logs("relaying: listening on")
        assert readiness(host, http) == (200, None)
        host.loses(LATER[0])
        while readiness(host, http) != (503, f"this host has lost {LATER[0]}"):
            pass
        host.gets(LATER[0])
        while readiness(host, http) != (200, None):
            pass


def test_a_public_address_that_is_private_is_a_warning(host: Host) -> None:
    """What every cloud's machine finds that has its public address in front of it."""
    host.gets("10.0.0.5")
    host.loses(HOST)
    ip("-n", host.name, "route", "add", "default", "via", "10.0.0.1")
    with host.runs_relay() as relay:
        line = relay.logs("10.0.0.5, which the routing table gives, is private")
        assert "WARNING" in line
        assert line.endswith("give the public address: --public-ip4-addr ADDR\n")


# --- Where AF_NETLINK is not allowed --------------------------------------------------------


def test_without_netlink_it_says_so_and_protects_its_host_all_the_same(
    host: Host, tmp_path: Path
) -> None:
    """As with systemd's RestrictAddressFamilies=."""
    later, file = LATER[0], tmp_path / "relay.conf"
    file.touch()
    # Only root can read where pytest makes its files.
    arguments = f"--public-ip4-addr={later}", f"--config={file}", "--user=root"
    without_netlink = refusing(SOCKET, socket.AF_NETLINK, errno.EAFNOSUPPORT)
    relay = host.runs_relay(*arguments, program=without_netlink)
    with relay, TurnClient((HOST, relay.port), relay.username, relay.password) as alice:
        assert "WARNING" in relay.logs("the kernel does not tell of this host's addresses")
        alice.allocates()
        assert can_bind(alice, (OUTSIDE[0], 161))
        assert not can_bind(alice, (HOST, 161))
        host.gets("198.51.100.3")
        assert not can_bind(alice, ("198.51.100.3", 161))

        host.gets(later)
        relay.signals(signal.SIGHUP)
        relay.logs(f"new relay ports are bound to {later}")


# --- Helpers --------------------------------------------------------------------------------


def source_of(relay: RelayProcess, server: str, bob: socket.socket) -> str:
    """Return the host from which a peer hears what a new client sends."""
    with TurnClient((server, relay.port), relay.username, relay.password) as alice:
        is_ipv6 = bob.family == socket.AF_INET6
        alice.allocates(Family.IPV6 if is_ipv6 else Family.IPV4)
        alice.binds(0x4000, bob.getsockname()[:2])
        alice.sends(0x4000, b"hi")
        payload, source = bob.recvfrom(100)
        assert payload == b"hi"
        assert (":" in source[0]) == is_ipv6
        host: str = source[0]
        alice.refreshes(0)
        return host


def peer(host: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((host, 0))
    sock.settimeout(TIMEOUT)
    return sock


def can_bind(alice: TurnClient, peer: tuple[str, int]) -> bool:
    """Try the next free channel."""
    number = next(_numbers)
    try:
        alice.binds(number, peer)
    except TurnError as error:
        if error.code != 403:
            raise
        return False
    return True


_numbers = iter(range(0x4100, 0x5000))


def summary(relay: RelayProcess) -> str:
    """Return what the last summary in the log says, and ask for another one."""
    relay.signals(signal.SIGUSR1)
    relay.logs("summary: ")
    return next(line for line in reversed(relay.errors().splitlines()) if "summary: " in line)


def readiness(host: Host, port: int) -> tuple[int, str | None]:
    with inside(host.name):
        status, answer = ask(port, "/readyz")
    return status, json.loads(answer)["reason"]
