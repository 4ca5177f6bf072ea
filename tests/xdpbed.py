"""The program of relay/xdp on frames that a test makes: in the kernel, but at no device.

BPF_PROG_TEST_RUN runs it, in a network namespace in which the kernel knows the way to everyone.
"""

import errno
import fcntl
import os
import shutil
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import pytest

from bench.loadlib.netns import inside
from contrib.program import COMPILERS, OBJECT, compile_program
from relay.stun.address import Address
from relay.stun.const import Family
from relay.turn.commands import BindChannel, ClientAddress, PeerAddress, UnbindChannel
from relay.xdp import bpf
from relay.xdp.routes import KernelRoutes, LostControl, RouteMap
from tests.frames import Datagram, checksum
from tests.interop.needs import missing, needs_programs, needs_root
from tests.netns import ip

RELAY_PORTS: Final = range(49152, 65536)
LISTEN_PORT: Final = 3478
NETWORKS: Final = {  # device of the relay's host, with its addresses
    "towards0": ("192.0.2.1/24", "2001:db8:1::1/64", "2001:db8::1/128"),
    "towards1": ("198.51.100.1/24", "2001:db8:2::1/64"),
}
LISTENING: Final = {Family.IPV4: "192.0.2.1", Family.IPV6: "2001:db8:1::1"}
RELAYED: Final = {Family.IPV4: "198.51.100.1", Family.IPV6: "2001:db8:2::1"}
CLIENTS: Final = {
    Family.IPV4: ("192.0.2.10", 5000),
    Family.IPV6: ("2001:db8:1::10", 5000),
}
PEERS: Final = {
    Family.IPV4: ("198.51.100.7", 9000),
    Family.IPV6: ("2001:db8:2::7", 9000),
}
MAC_OF_CLIENTS, MAC_OF_PEERS = "02:00:00:00:00:0c", "02:00:00:00:00:0e"
NEIGHBOURS: Final = (
    (MAC_OF_CLIENTS, "towards0", ("192.0.2.10", "192.0.2.11", "2001:db8:1::10", "2001:db8:1::11")),
    (MAC_OF_PEERS, "towards1", ("198.51.100.7", "198.51.100.8", "2001:db8:2::7")),
)
NOBODY: Final = "198.51.100.99"  # whose address on the link nobody knows
MTU: Final = 1500
VERDICTS: Final = ("aborted", "drop", "pass", "tx", "redirect")


def family(host: str) -> Family:
    return Family.IPV6 if ":" in host else Family.IPV4


@contextmanager
def network() -> Iterator[str]:
    """Make the namespace: two devices, and next hops for everybody whom the tests know."""
    name = f"xdp-{os.getpid()}"
    ip("netns", "add", name)
    try:
        for device, addresses in NETWORKS.items():
            far = f"far-{device}"
            ip("-n", name, "link", "add", device, "type", "veth", "peer", "name", far)
            for address in addresses:
                flags = ("nodad",) if ":" in address else ()
                ip("-n", name, "address", "add", address, "dev", device, *flags)
            ip("-n", name, "link", "set", far, "up")
            ip("-n", name, "link", "set", device, "up")
        ip("-n", name, "link", "set", "lo", "up")
        _know_neighbours(name)
        with inside(name):
            for setting in ("ipv4", "ipv6"):
                Path(f"/proc/sys/net/{setting}/conf/lo/forwarding").write_text("1")
            yield name
    finally:
        ip("netns", "delete", name)


def _know_neighbours(namespace: str) -> None:
    for mac, device, hosts in NEIGHBOURS:
        for host in hosts:
            neighbour = ("lladdr", mac, "dev", device, "nud", "permanent")
            ip("-n", namespace, "neighbour", "replace", host, *neighbour)


@dataclass(frozen=True, slots=True)
class Channel:
    """Who is bound to whom."""

    client: Address
    number: int
    port: int
    peer: Address

    @property
    def listening(self) -> Address:
        return (LISTENING[family(self.client[0])], LISTEN_PORT)

    @property
    def relayed(self) -> Address:
        return (RELAYED[family(self.peer[0])], self.port)

    @property
    def bound(self) -> BindChannel:
        client = ClientAddress((self.client, b""))
        peer = PeerAddress(self.peer)
        return BindChannel(client, self.number, self.port, peer, reaches_outside=True)

    @property
    def unbinding(self) -> UnbindChannel:
        client = ClientAddress((self.client, b""))
        return UnbindChannel(client, self.number, self.port, PeerAddress(self.peer))


def routes_to(
    target: RouteMap,
    listening: Mapping[Family, str] = LISTENING,
    relayed: Mapping[Family, str] = RELAYED,
    *,
    copies_tos: bool = True,
    are_relayed_own: bool = True,
    on_lost_control: LostControl,
) -> KernelRoutes:
    """What writes to a map of routes, as in the relay."""
    return KernelRoutes(
        target,
        client_side=lambda client: (listening[family(client[0][0])], LISTEN_PORT),
        port_host=lambda _, of: relayed[of],
        public_hosts=relayed,
        relay_ports=RELAY_PORTS,
        is_own_host=lambda host: are_relayed_own and host in relayed.values(),
        copies_tos=copies_tos,
        on_lost_control=on_lost_control,
    )


class Entries(dict[bytes, bytes]):
    """What is written to a map of routes."""

    def update(self, key: bytes, value: bytes) -> None:  # type: ignore[override]
        self[key] = value

    def delete_many(self, keys: bytes, count: int) -> None:
        size = len(keys) // count
        for at in range(0, len(keys), size):
            if keys[at : at + size] not in self:
                raise FileNotFoundError(errno.ENOENT, "No such file or directory")
            del self[keys[at : at + size]]


class Bed:
    """A program, and the routes that it is given as in the relay."""

    def __init__(
        self,
        path: Path = OBJECT,
        *,
        devices: Iterable[str] = NETWORKS,
        copies_tos: bool = True,
        are_relayed_own: bool = True,
        listening: Mapping[Family, str] = LISTENING,
        relayed: Mapping[Family, str] = RELAYED,
    ) -> None:
        self.program = bpf.Program(bpf.read_object(path), "turn", explain=True)
        for device in devices:
            key = struct.pack("=I", socket.if_nametoindex(device))
            self.program.maps["devices"].update(key, key)
        self.lost_control: list[str] = []
        self.routes = routes_to(
            self.program.maps["routes"],
            listening,
            relayed,
            copies_tos=copies_tos,
            are_relayed_own=are_relayed_own,
            on_lost_control=self.lost_control.append,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.program.close()
        assert self.lost_control == []

    def bind(self, channel: Channel) -> Channel:
        self.routes.bound(channel.bound)
        return channel

    def unbind(self, channel: Channel) -> None:
        self.routes.unbinding(channel.unbinding)

    def relays(self, frame: bytes) -> Datagram:
        """Run it on a frame that it has to relay; return what leaves."""
        verdict, left, _ = self.program.run(frame)
        assert VERDICTS[verdict] in {"tx", "redirect"}
        return Datagram.of(left)

    def passes(self, frame: bytes) -> None:
        """Run it on a frame that it has to hand up as it is."""
        verdict, left, _ = self.program.run(frame)
        assert VERDICTS[verdict] == "pass"
        assert left == frame

    def counts(self) -> list[tuple[int, int]]:
        """Datagrams and bytes, to peers by class, then to clients."""
        layout = struct.Struct("=QQ")
        totals = []
        for each in self.program.maps["relayed"].lookup_all():
            pairs = [layout.unpack(value) for value in each]
            totals.append((sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)))
        return totals


def assert_consistent(frame: bytes) -> None:
    """Check the lengths in a frame with UDP, and the checksum of its IPv4 header."""
    if frame[12:14] == b"\x08\0":
        assert checksum(frame[14:34]) == 0
        header, length = 34, int.from_bytes(frame[16:18]) - 20
    else:
        header, length = 54, int.from_bytes(frame[18:20])
    assert int.from_bytes(frame[header + 4 : header + 6]) == length
    assert 8 <= length <= len(frame) - header


def mac_of(device: str) -> bytes:
    """The address of a device in the present namespace."""
    request = struct.pack("256s", device.encode())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return fcntl.ioctl(sock, 0x8927, request)[18:24]  # SIOCGIFHWADDR


@contextmanager
def without_address(namespace: str, prefix: str, device: str, *, then: str) -> Iterator[None]:
    """Take an address away, for another one in the same network."""
    ip("-n", namespace, "address", "add", then, "dev", device)
    ip("-n", namespace, "address", "delete", prefix, "dev", device)
    ip("-n", namespace, "address", "replace", then, "dev", device)  # it may go with the first one
    _know_neighbours(namespace)
    try:
        yield
    finally:
        ip("-n", namespace, "address", "delete", then, "dev", device)
        ip("-n", namespace, "address", "add", prefix, "dev", device)
        _know_neighbours(namespace)


def compiled(compiler: str, folder: Path) -> Path:
    """Compile the program, as contrib.generate does, or by GCC. Skips if that is not there."""
    needs_compiler(compiler)
    target = folder / OBJECT.name
    compile_program(compiler, target)
    return target


def needs_compiler(compiler: str) -> None:
    """Skip the test without a compiler. GCC's for BPF is small; clang's is nowhere required."""
    program = COMPILERS[compiler][0]
    if compiler == "gcc":
        needs_programs(program)
    elif shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")


def needs_bpf() -> None:
    """Skip the test if this kernel loads no program for us, or lets us make no namespaces."""
    needs_root()
    needs_programs("ip")
    try:
        program = bpf.Program(bpf.read_object(OBJECT), "turn")
    except OSError as error:
        missing(f"the kernel loads no XDP program: {error.strerror}")
    program.close()
