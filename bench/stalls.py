"""How long everybody's data is held up by what happens to many at once.

Run it with ``python -m bench.stalls``. The relay has 16,000 allocations with 200,000 channels and
even more permissions, on real sockets, in the real event loop; its clients have none, so nobody has
to take the answers. For each event the table has the longest iteration of the loop, how many it
took until all was done, and the longest pause of the garbage collector meanwhile. The collector is
set as the daemon sets it, or by ``--gc``, three thresholds with commas between, to compare others.
With ``--xdp``, as root, the routes of channels are written to the kernel, too.
"""

import argparse
import errno
import gc
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from socket import AF_INET, AF_UNIX, SOCK_DGRAM, inet_aton, socket
from typing import Any, Final

from bench.memory import SPARE_DESCRIPTORS, Idle, address_of, allocate_of, allow_descriptors
from relay.daemon import GC_THRESHOLDS
from relay.net import netlink
from relay.net.hostaddresses import HostAddresses
from relay.stun.address import family_of
from relay.stun.attributes import Attr
from relay.stun.const import Family, Method
from relay.turn.commands import ClientAddress
from relay.turn.peers import PeerPolicy
from relay.xdp.attach import load
from relay.xdp.routes import KernelRoutes
from tests.scenario import DOCUMENTATION, LISTEN_PORT, PUBLIC_IP4, PUBLIC_IP6, Client

ALLOCATIONS: Final = 16_000
CHANNELS: Final = 200_000
MOST: Final = 4096  # channels that one allocation can have
MAX_CHANNELS: Final = 1 << 18  # and permissions
HOSTS: Final = 15  # with permissions of each allocation
FIRST_PORT: Final = 30_000
FREE_PORTS: Final = 16  # besides those that are lent
ADDRESSES: Final = 20_000  # of the host, at most


def main() -> None:
    """Fill a relay, let things happen to it, and print how long each took."""
    parser = argparse.ArgumentParser(description="How long do events hold up the loop?")
    parser.add_argument("--allocations", type=int, default=ALLOCATIONS)
    parser.add_argument("--channels", type=int, default=CHANNELS)
    parser.add_argument("--gc", default=",".join(map(str, GC_THRESHOLDS)))
    parser.add_argument("--xdp", action="store_true")
    arguments = parser.parse_args()
    allow_descriptors(arguments.allocations + SPARE_DESCRIPTORS)
    relay = Full(arguments.allocations)
    if arguments.xdp:
        relay.write_routes_to_the_kernel()
    gc.freeze()
    gc.set_threshold(*map(int, arguments.gc.split(",")))
    print(f"{'event':44}{'longest iteration':>18}{'iterations':>12}{'longest collection':>20}")
    for name, happens in relay.events(arguments.channels).items():
        with watched() as stalls:
            happens(stalls)
        print(
            f"{name:44}{1000 * stalls.longest:15.1f} ms{stalls.iterations:12}"
            f"{1000 * stalls.longest_collection:17.1f} ms",
            flush=True,
        )
    relay.close()


class Stalls:
    """The iterations of the loop while something happens, and the collector's pauses."""

    def __init__(self) -> None:
        self.longest = self.longest_collection = 0.0  # seconds
        self.iterations = 0
        self._collecting_since = 0.0

    def iteration(self, work: Callable[[], object]) -> None:
        """Do what one iteration of the loop does."""
        began = time.thread_time()
        work()
        self.longest = max(self.longest, time.thread_time() - began)
        self.iterations += 1

    def on_collection(self, phase: str, _: dict[str, Any]) -> None:
        """Note how long the collector takes."""
        now = time.thread_time()
        if phase == "start":
            self._collecting_since = now
        else:
            self.longest_collection = max(self.longest_collection, now - self._collecting_since)


@contextmanager
def watched() -> Iterator[Stalls]:
    """Note what the collector does meanwhile."""
    stalls = Stalls()
    gc.callbacks.append(stalls.on_collection)
    try:
        yield stalls
    finally:
        gc.callbacks.remove(stalls.on_collection)


class Full(Idle):
    """A relay with many clients, whose clock can be put forward."""

    def __init__(self, allocations: int) -> None:
        super().__init__(range(FIRST_PORT, FIRST_PORT + allocations + FREE_PORTS))
        self.scenario.changes_settings(max_channels=MAX_CHANNELS, max_permissions=MAX_CHANNELS)
        self._clients = [self.client(number) for number in range(allocations)]
        for client in self._clients:
            assert client.nonce  # which is asked for now, as long as there is little to check
        self._ahead = 0.0  # seconds
        clock = self._reactor.clock
        self._reactor.clock = lambda: clock() + self._ahead

    def write_routes_to_the_kernel(self) -> None:
        """Do what the relay does with ``--xdp``. Raises XdpError."""
        hosts = {Family.IPV4: PUBLIC_IP4, Family.IPV6: PUBLIC_IP6}
        routes = KernelRoutes(
            load().maps["routes"],
            client_side=lambda client: (hosts[family_of(client[0][0])], LISTEN_PORT),
            port_host=lambda _, family: hosts[family],
            public_hosts=hosts,
            relay_ports=range(FIRST_PORT, FIRST_PORT + len(self._clients) + FREE_PORTS),
            is_own_host=lambda _: False,
            copies_tos=True,
            on_lost_control=sys.exit,
        )
        self._datapath.routes.watchers.append(routes)

    def events(self, channels: int) -> dict[str, Callable[[Stalls], None]]:
        """Return what can happen to many at once, in this order."""
        each = -(-channels // len(self._clients))
        return {
            f"{len(self._clients)} clients allocate, until no port is left": self._all_allocate,
            f"each binds {each} channels": lambda stalls: self._each_binds(each, channels, stalls),
            f"one binds {MOST} channels": self._one_binds_many,
            "and ends": self._it_ends,
            f"each permits {HOSTS} hosts": self._each_permits,
            "the rules about peers change": self._rules_change,
            f"the host gets {ADDRESSES} addresses": self._addresses_come,
            "and loses them without a word": self._addresses_are_gone,
            "all channels and permissions expire": lambda stalls: self._passes(700, stalls),
            "they have cooled down": lambda stalls: self._passes(300, stalls),
            "half of the allocations end, others come": self._churn,
            "all allocations expire": lambda stalls: self._passes(4000, stalls),
        }

    def _asks(self, number: int, datagram: bytes, stalls: Stalls) -> None:
        self._buffer[: len(datagram)] = datagram
        client = ClientAddress((address_of(number), bytes([192, 0, 2, 1])))
        stalls.iteration(lambda: self._datapath.clients.on_datagram(len(datagram), client))

    def _all_allocate(self, stalls: Stalls) -> None:
        for number, client in enumerate(self._clients):
            self._asks(number, allocate_of(client), stalls)
        assert self.scenario.server.allocations == len(self._clients)

    def _each_binds(self, each: int, in_all: int, stalls: Stalls) -> None:
        for number, client in enumerate(self._clients):
            for channel in range(each):
                if number * each + channel < in_all:
                    self._asks(number, bind_of(client, channel), stalls)
        assert self.scenario.server.channels == in_all

    def _one_binds_many(self, stalls: Stalls) -> None:
        for channel in range(MOST):
            self._ahead += 0.01  # for so many requests a client has to take its time
            self._asks(0, bind_of(self._clients[0], channel), stalls)

    def _it_ends(self, stalls: Stalls) -> None:
        self._asks(0, self._clients[0].signed(Method.REFRESH, (Attr.LIFETIME, 0)), stalls)
        self._asks(0, allocate_of(self._clients[0]), stalls)

    def _each_permits(self, stalls: Stalls) -> None:
        hosts = [(Attr.XOR_PEER_ADDRESS, (f"198.51.100.{host}", 1)) for host in range(HOSTS)]
        for number, client in enumerate(self._clients):
            self._asks(number, client.signed(Method.CREATE_PERMISSION, *hosts), stalls)
        assert self.scenario.server.permissions >= HOSTS * len(self._clients)

    def _rules_change(self, stalls: Stalls) -> None:
        policy = PeerPolicy(DOCUMENTATION, ["203.0.113.0/24"])
        stalls.iteration(lambda: self._datapath.change_peer_policy(policy))
        self._passes(0, stalls)

    def _addresses_come(self, stalls: Stalls) -> None:
        self._kernel = Kernel()
        self._addresses = HostAddresses(lambda _: self._kernel)
        self._kernel.tells(ADDRESSES)
        while self._kernel.has_more:
            stalls.iteration(self._addresses.on_readable)
        assert inet_aton("10.0.0.1") in self._addresses

    def _addresses_are_gone(self, stalls: Stalls) -> None:
        """Have the kernel say that something was lost (ENOBUFS), so that it is asked anew."""
        self._kernel.loses_count()
        while self._kernel.has_more:
            stalls.iteration(self._addresses.on_readable)
        assert inet_aton("10.0.0.1") not in self._addresses
        self._addresses.close()

    def _churn(self, stalls: Stalls) -> None:
        for number in range(0, len(self._clients), 2):
            client = self._clients[number]
            self._asks(number, client.signed(Method.REFRESH, (Attr.LIFETIME, 0)), stalls)
            self._asks(number, allocate_of(client), stalls)
            stalls.iteration(self._reactor.close_retired)

    def _passes(self, seconds: int, stalls: Stalls) -> None:
        """Put the clock forward, second by second, and let the loop do what is due."""
        server, clock = self.scenario.server, self._reactor.clock
        for second in range(seconds + 1):
            self._ahead += 1 if second else 0
            while (deadline := server.poll_timeout()) is not None and deadline <= clock():
                stalls.iteration(self._reactor.iterate)


class Kernel(socket):
    """What rtnetlink says of a host's addresses; see :mod:`relay.net.netlink`."""

    def __init__(self) -> None:
        super().__init__(AF_UNIX, SOCK_DGRAM)
        self._says: list[bytes | OSError] = []

    @property
    def has_more(self) -> bool:
        """Tell if there is something left to read."""
        return bool(self._says)

    def tells(self, addresses: int) -> None:
        """Tell of so many new addresses, one by one."""
        for number in range(1, addresses + 1):
            address = struct.pack("=BBBBI", AF_INET, 32, 0, 0, 1)
            address += struct.pack("=HH", 8, 2) + struct.pack("!I", (10 << 24) + number)
            self._says.append(_netlink_message(netlink.RTM_NEWADDR, 0, address))

    def loses_count(self) -> None:
        """Say that messages were lost."""
        self._says.append(OSError(errno.ENOBUFS, "overrun"))

    def send(self, request: bytes, _flags: int = 0) -> int:  # type: ignore[override]
        """Answer that there is no address at all."""
        (sequence,) = struct.unpack_from("=I", request, 8)
        self._says.append(_netlink_message(netlink.NLMSG_DONE, sequence, bytes(4)))
        return len(request)

    def recvfrom(self, size: int, _flags: int = 0) -> tuple[bytes, tuple[int, int]]:
        """Return the next message, and that it is from the kernel."""
        return self.recv(size), (0, 0)

    def recv(self, _size: int, _flags: int = 0) -> bytes:
        """Return the next message, or raise what it is to raise."""
        if not self._says:
            raise BlockingIOError
        said = self._says.pop(0)
        if isinstance(said, OSError):
            raise said
        return said


def _netlink_message(kind: int, sequence: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 0, sequence, 0) + body


def bind_of(client: Client, channel: int) -> bytes:
    return client.signed(
        Method.CHANNEL_BIND,
        (Attr.CHANNEL_NUMBER, 0x4000 + channel),
        (Attr.XOR_PEER_ADDRESS, ("198.51.100.7", 9000 + channel)),
    )


if __name__ == "__main__":
    main()
