"""A relay's host between clients and peers, laid out in the ways that there are.

What arrives there has whole checksums, and what an XDP program sends back is received, as with
network cards: by itself a veth has neither. The tests say where that is not so.
"""

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final, Self

from bench.loadlib.farend import like_a_cable
from bench.loadlib.netns import inside
from relay.stun.const import Family
from tests.netns import ip
from tests.process import RelayProcess
from tests.turnclient import Peer, TurnClient

PORT: Final = 3478
HTTP: Final = 8080

Hosts = dict[Family, str]


@dataclass(frozen=True, slots=True)
class World:
    """Three network namespaces, or four, and who has which address in them."""

    relay: str
    clients: str
    peers: str
    devices: tuple[str, ...]  # of the relay
    relay_hosts: Hosts
    client_hosts: Hosts
    peer_hosts: Hosts

    def starts(
        self,
        *arguments: str,
        xdp: str = "require",
        prefix: tuple[str, ...] = (),
        program: str | None = None,
        portal: bool = False,
    ) -> RelayProcess:
        """Return a relay there."""
        return RelayProcess(
            *(
                f"--public-ip{4 if of is Family.IPV4 else 6}-addr={host}"
                for of, host in self.relay_hosts.items()
            ),
            f"--xdp={xdp}",
            *(f"--xdp-device={device}" for device in self.devices),
            "--allow-peer=192.0.2.0/24,198.51.100.0/24,2001:db8::/32",
            f"--http-addr=127.0.0.1:{HTTP}",
            "--drain-timeout=0",
            *arguments,
            port=PORT,
            prefix=("ip", "netns", "exec", self.relay, *prefix),
            program=program,
            portal=portal,
            loopback=False,
        )

    def client(self, relay: RelayProcess, family: Family) -> TurnClient:
        with inside(self.clients):
            return TurnClient((self.relay_hosts[family], PORT), relay.username, relay.password)

    def peer(self, family: Family) -> Peer:
        with inside(self.peers):
            return Peer(family, host=self.peer_hosts[family])

    def checksum_errors(self) -> int:
        """How many datagrams with a wrong checksum anybody has received."""
        total = 0
        for name in (self.relay, self.clients, self.peers):
            with inside(name):
                here = Path("/proc/thread-self/net")
                names, values = [
                    line.split()
                    for line in (here / "snmp").read_text().splitlines()
                    if line.startswith("Udp:")
                ]
                total += int(values[names.index("InCsumErrors")])
                six = dict(line.split() for line in (here / "snmp6").read_text().splitlines())
                total += int(six["Udp6InCsumErrors"])
        return total


@dataclass(frozen=True, slots=True)
class Counts:
    """Datagrams relayed: up to peers, and down to clients."""

    up_by_sockets: int
    down_by_sockets: int
    up_by_xdp: int
    down_by_xdp: int
    routes: int

    @classmethod
    def of(cls, relay: RelayProcess) -> Self:
        """Ask a relay for its summary."""
        lines = relay.lines
        relay.signals(signal.SIGUSR1)
        summary = relay.logs("summary: ", after=lines)
        up, down = re.findall(r"(?:client to peer|peer to client): (\d+) datagrams", summary)
        up_by_xdp, down_by_xdp = re.findall(r"in the kernel: (\d+) datagrams", summary)
        (routes,) = re.findall(r"(\d+) routes", summary)
        return cls(*map(int, (up, down, up_by_xdp, down_by_xdp, routes)))


@contextmanager
def two_interfaces(*, cables: bool = True) -> Iterator[World]:
    """Clients at one device of the relay's host, peers at another."""
    with ExitStack() as stack:
        relay, clients, peers = namespaces(stack, "relay", "clients", "peers")
        lay(relay, "towards0", ("192.0.2.1/24", "2001:db8:1::1/64"),
            clients, "eth0", ("192.0.2.2/24", "2001:db8:1::2/64"))  # fmt: skip
        lay(relay, "towards1", ("198.51.100.1/24", "2001:db8:2::1/64"),
            peers, "eth0", ("198.51.100.2/24", "2001:db8:2::2/64"))  # fmt: skip
        # The relay is known to all by its address towards clients.
        for gateway in ("198.51.100.1", "2001:db8:2::1"):
            ip("-n", peers, "route", "add", "default", "via", gateway)
        if cables:
            for name in (clients, peers):
                with inside(name):
                    stack.enter_context(like_a_cable("eth0"))
        yield World(
            relay,
            clients,
            peers,
            devices=("towards0", "towards1"),
            relay_hosts={Family.IPV4: "192.0.2.1", Family.IPV6: "2001:db8:1::1"},
            client_hosts={Family.IPV4: "192.0.2.2", Family.IPV6: "2001:db8:1::2"},
            peer_hosts={Family.IPV4: "198.51.100.2", Family.IPV6: "2001:db8:2::2"},
        )


@contextmanager
def behind_a_router(*, cables: bool = True) -> Iterator[World]:
    """One device, and everybody is behind one router."""
    with ExitStack() as stack:
        relay, clients, peers, router = namespaces(stack, "relay", "clients", "peers", "router")
        lay(relay, "eth0", ("203.0.113.5/24", "2001:db8:5::5/64"),
            router, "to-relay", ("203.0.113.1/24", "2001:db8:5::1/64"))  # fmt: skip
        lay(clients, "eth0", ("192.0.2.2/24", "2001:db8:1::2/64"),
            router, "to-clients", ("192.0.2.1/24", "2001:db8:1::1/64"))  # fmt: skip
        lay(peers, "eth0", ("198.51.100.2/24", "2001:db8:2::2/64"),
            router, "to-peers", ("198.51.100.1/24", "2001:db8:2::1/64"))  # fmt: skip
        for name, gateways in (
            (relay, ("203.0.113.1", "2001:db8:5::1")),
            (clients, ("192.0.2.1", "2001:db8:1::1")),
            (peers, ("198.51.100.1", "2001:db8:2::1")),
        ):
            for gateway in gateways:
                ip("-n", name, "route", "add", "default", "via", gateway)
        with inside(router):
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
            Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1")
            if cables:
                stack.enter_context(like_a_cable("to-relay"))
        yield World(
            relay,
            clients,
            peers,
            devices=("eth0",),
            relay_hosts={Family.IPV4: "203.0.113.5", Family.IPV6: "2001:db8:5::5"},
            client_hosts={Family.IPV4: "192.0.2.2", Family.IPV6: "2001:db8:1::2"},
            peer_hosts={Family.IPV4: "198.51.100.2", Family.IPV6: "2001:db8:2::2"},
        )


@contextmanager
def on_one_link(*, cables: bool = True) -> Iterator[World]:
    """One device, and everybody on the link behind it: the next hop is whom it is for."""
    with ExitStack() as stack:
        relay, clients, peers, switch = namespaces(stack, "relay", "clients", "peers", "switch")
        ip("-n", switch, "link", "add", "bridge0", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge0", "up")
        for number, name in enumerate((relay, clients, peers), start=1):
            lay(
                name, "eth0", (f"192.0.2.{number}/24", f"2001:db8:1::{number}/64"), switch, name, ()
            )
            ip("-n", switch, "link", "set", name, "master", "bridge0")
        with inside(switch):
            if cables:
                stack.enter_context(like_a_cable(relay))
        yield World(
            relay,
            clients,
            peers,
            devices=("eth0",),
            relay_hosts={Family.IPV4: "192.0.2.1", Family.IPV6: "2001:db8:1::1"},
            client_hosts={Family.IPV4: "192.0.2.2", Family.IPV6: "2001:db8:1::2"},
            peer_hosts={Family.IPV4: "192.0.2.3", Family.IPV6: "2001:db8:1::3"},
        )


WORLDS: Final[dict[str, Callable[..., AbstractContextManager[World]]]] = {
    "two interfaces": two_interfaces,
    "behind a router": behind_a_router,
    "on one link": on_one_link,
}


_numbers = count()


def namespaces(stack: ExitStack, *names: str) -> list[str]:
    """Make namespaces, which go with *stack*, and all that is in them."""
    number = next(_numbers)
    made = [f"{name}{number}-{os.getpid()}" for name in names]
    for name in made:
        ip("netns", "add", name)
        stack.callback(ip, "netns", "delete", name)
        ip("-n", name, "link", "set", "lo", "up")
        with inside(name):  # addresses of IPv6 are usable at once, those for neighbours too
            for of in ("all", "default"):
                Path(f"/proc/sys/net/ipv6/conf/{of}/accept_dad").write_text("0")
    return made


def lay(
    one: str,
    device: str,
    addresses: tuple[str, ...],
    other: str,
    other_device: str,
    other_addresses: tuple[str, ...],
) -> None:
    """Lay a veth between two namespaces."""
    veth = ("type", "veth", "peer", "name", other_device, "netns", other)
    ip("-n", one, "link", "add", device, *veth)
    for name, end, prefixes in (
        (one, device, addresses),
        (other, other_device, other_addresses),
    ):
        for prefix in prefixes:
            at_once = ("nodad",) if ":" in prefix else ()
            ip("-n", name, "address", "add", prefix, "dev", end, *at_once)
        ip("-n", name, "link", "set", end, "up")
