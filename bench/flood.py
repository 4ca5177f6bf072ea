"""What a flood costs everybody else: how much is lost of a steady flow through one channel.

Run it with ``python -m bench.flood``, as root. The servers have a CPU, each alone at a time;
clients, peers and the flood share another one, in the network of :mod:`bench.loadlib.netns`. What
strangers send comes from a thousand addresses, through a raw socket; what takes a nonce is sent by
one client. Answers to strangers go to where nobody is, as they would if addresses are forged.

For each kind of flood the table says which part of the flow was lost, both ways together, and how
long a newcomer's Allocate took, retransmissions included. A flood that fell behind its rate is
marked: then it is the generator, or this machine, that was the limit.
"""

import argparse
import itertools
import multiprocessing
import os
import random
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from bench import hostile
from bench.loadlib.clients import Client, Clients, LoadError, Pair
from bench.loadlib.mmsg import Volleys
from bench.loadlib.netns import PEER_HOST, Network, inside, ip
from bench.loadlib.servers import Server, running
from bench.loadlib.traffic import Load, Session, open_peers
from relay.stun.attributes import Attr
from relay.stun.const import Method
from relay.stun.message import decode
from tests.scenario import Scenario, request

SERVERS: Final = ("relay", "coturn")
FLOW: Final = 5000.0  # datagrams per second
FLOOD: Final = 20_000.0  # likewise
PAYLOAD: Final = 160  # bytes
BEHIND: Final = 0.95  # of its rate: a flood below that is marked

# The network for benchmarks, RFC 2544: a thousand addresses in four networks of it.
SOURCES: Final = [f"198.18.{network}.{host}" for network in range(4) for host in range(1, 251)]
SOURCE_PREFIX: Final = "198.18.0.0/15"
SOURCE_PORT: Final = 40_000
MTU: Final = 9000  # bytes: the longest message in one piece, as from a host with jumbo frames
AT_ONCE: Final = 20  # datagrams per system call of the flood
DATAGRAMS: Final = 1000  # that are ready, and sent over and over


def main(arguments: list[str] | None = None) -> int:
    """Flood each server with each kind, and print a table; return the exit code."""
    options = _parser().parse_args(arguments)
    load = Load(PAYLOAD, options.flow, options.seconds)
    try:
        with tempfile.TemporaryDirectory() as folder, Network() as network, ExitStack() as stack:
            _route(network)
            load_cpu, server_cpu = cpus()
            os.sched_setaffinity(0, {load_cpu})
            servers = [
                stack.enter_context(running(name, network, server_cpu, Path(folder), limited=True))
                for name in SERVERS
            ]
            titles = "".join(f"{f'{name}: lost':>16}{'newcomer':>10}" for name in SERVERS)
            print(f"{'flood':43}{titles}")
            for kind in KINDS:
                if not options.kind or options.kind in kind.name:
                    rate = options.rate if kind.datagrams else 0.0
                    cells = (_measure(kind, server, network, load, rate) for server in servers)
                    print(f"{kind.name:43}{''.join(map(str, cells))}", flush=True)
    except (LoadError, OSError) as error:
        print(f"bench.flood: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of flood: from strangers, or by one client with an allocation."""

    name: str
    datagrams: Callable[[Client], Iterator[bytes]] | None
    by_a_client: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a flood has done to the others."""

    loss: float  # 0 to 1
    newcomer: float | None  # seconds, None if it got no allocation
    kept_up: bool  # the flood was as fast as it was to be
    flow_kept_up: bool

    def __str__(self) -> str:
        mark = ("" if self.kept_up else "*") + ("" if self.flow_kept_up else "+")
        newcomer = "none" if self.newcomer is None else f"{self.newcomer:.2f} s"
        return f"{f'{self.loss:.2%}{mark}':>16}{newcomer:>10}"


def _measure(kind: Kind, server: Server, network: Network, load: Load, rate: float) -> Outcome:
    """Let the flow run beside the flood. Raises LoadError."""
    with ExitStack() as stack:
        with inside(network.peers):
            peers = open_peers(PEER_HOST, 1)
        for peer in peers:
            stack.enter_context(peer)
        with inside(network.clients):
            mallory = stack.enter_context(Clients(server.address, server.credentials, 1))
            newcomer = stack.enter_context(Clients(server.address, server.credentials, 1))
            session = Session(server.address, server.credentials, clients=1, peers=peers)
            raw = stack.enter_context(_raw_socket(server))
        mallory.allocate()
        stack.callback(_release, mallory)
        stack.enter_context(session)
        [client] = mallory.all
        sock = client.socket if kind.by_a_client else raw
        datagrams = _ready(kind, client, server)
        with flooding(sock, datagrams, rate) as flood:
            result = session.measure(load)
            try:
                waited: float | None = newcomer.allocate()
            except LoadError:
                waited = None
        _release(newcomer)
    wanted = (load.rate or 0.0) * BEHIND
    return Outcome(result.loss, waited, flood.rate >= rate * BEHIND, result.sent_rate >= wanted)


@dataclass(slots=True)
class Flooded:
    """How fast a flood has been; known once it has ended."""

    rate: float = 0.0  # datagrams per second


@contextmanager
def flooding(sock: socket.socket, datagrams: Sequence[bytes], rate: float) -> Iterator[Flooded]:
    """Send *datagrams* over and over through *sock*, at that rate, in a process of its own."""
    if not rate:
        yield Flooded()
        return
    with beside(partial(_flood, sock, datagrams, rate)) as flooded:
        yield flooded


@contextmanager
def beside(flood: Callable[[Connection], None]) -> Iterator[Flooded]:
    """Run *flood* in a process of its own, in the namespace of this thread.

    It says when it has begun, ends when it is told that it is enough, and then says how much it did
    per second.
    """
    flooded = Flooded()
    context = multiprocessing.get_context("fork")
    ours, its = context.Pipe()
    process = context.Process(target=flood, args=(its,), daemon=True)
    process.start()
    try:
        ours.recv()  # it has begun
        yield flooded
        ours.send("enough")
        flooded.rate = ours.recv()
    finally:
        process.kill()
        process.join()


def _flood(
    sock: socket.socket, datagrams: Sequence[bytes], rate: float, parent: Connection
) -> None:
    """Send until the parent says that it is enough; then say how many that were per second."""
    volleys, descriptor = Volleys(datagrams, AT_ONCE), sock.fileno()
    interval = AT_ONCE / rate
    sent = volleys.send(descriptor)
    parent.send("begun")
    began = due = time.monotonic()
    while not parent.poll(max(0.0, due - time.monotonic())):
        sent += volleys.send(descriptor)
        due = max(due + interval, time.monotonic() - interval)  # what it is behind, it leaves out
    parent.send(sent / (time.monotonic() - began))


def _release(clients: Clients) -> None:
    with suppress(LoadError):  # the flood may have ended their allocation, or they have none
        clients.release()


def _ready(kind: Kind, client: Client, server: Server) -> list[bytes]:
    """Return what the socket is to send: from strangers, with headers from IP on."""
    if kind.datagrams is None:
        return []
    datagrams = list(itertools.islice(kind.datagrams(client), DATAGRAMS))
    if kind.by_a_client:
        return datagrams
    return [
        _ip_and_udp(source, server.address, datagram)
        for source, datagram in zip(SOURCES, datagrams, strict=True)
    ]


def _ip_and_udp(source: str, to: tuple[str, int], payload: bytes) -> bytes:
    """Return an IPv4 packet. The kernel writes length, identification and checksum of IP.

    RFC 791 §3.1, RFC 768: a UDP checksum of 0 is none.
    """
    hosts = socket.inet_aton(source) + socket.inet_aton(to[0])
    header = struct.pack("!BBHHHBBH", 0x45, 0, 0, 0, 0, 64, socket.IPPROTO_UDP, 0)
    udp = struct.pack("!HHHH", SOURCE_PORT, to[1], 8 + len(payload), 0)
    return header + hosts + udp + payload


def _raw_socket(server: Server) -> socket.socket:
    """Return a socket that sends IPv4 packets to *server*, whoever they say that they are from."""
    raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    raw.setblocking(False)
    raw.connect((server.address[0], 0))
    return raw


def _route(network: Network) -> None:
    """Let the sources be reached through the clients' host, and the longest messages pass."""
    ip("-n", network.clients, "link", "set", "eth0", "mtu", str(MTU))
    ip("-n", network.relay, "link", "set", "towards0", "mtu", str(MTU))
    ip("-n", network.relay, "route", "add", SOURCE_PREFIX, "via", "192.0.2.2")


def cpus() -> tuple[int, int]:
    """Return the CPU of the load, and the servers'. Raises LoadError."""
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        raise LoadError("two CPUs are needed: one for the server, one for the load")
    return usable[0], usable[-1]


# --- What strangers send --------------------------------------------------------------------


def of(flood: hostile.Flood) -> Callable[[Client], Iterator[bytes]]:
    """Return the datagrams that :mod:`bench.hostile` has of a kind. None of them is signed."""

    def datagrams(_: Client) -> Iterator[bytes]:
        relay = Scenario()
        for datagram, _sender in flood.datagrams(relay, relay.client(hostile.MALLORY)):
            yield datagram

    return datagrams


def wrongly_signed(client: Client, nonce: bytes | None = None) -> Iterator[bytes]:
    """Allocates by usernames that nobody has had before, in the server's own realm."""
    rng = random.Random(1)
    realm, own_nonce = _realm_and_nonce(client)
    for _ in itertools.count():
        credentials: list[Pair] = [
            (Attr.USERNAME, f"{2**40}:{rng.randbytes(8).hex()}"),
            (Attr.REALM, realm),
            (Attr.NONCE, own_nonce if nonce is None else nonce),
        ]
        yield request(Method.ALLOCATE, *credentials).encode(b"guessed")


def _realm_and_nonce(client: Client) -> tuple[str, bytes]:
    """Return what the server has told *client*."""
    own = decode(client.request(Method.REFRESH)).message
    realm, nonce = own.get(Attr.REALM), own.get(Attr.NONCE)
    assert realm is not None
    assert nonce is not None
    return realm, nonce


# --- What one client sends ------------------------------------------------------------------


def signed(
    method: Method, attributes: Callable[[int], Sequence[Pair]]
) -> Callable[[Client], Iterator[bytes]]:
    """Return requests of a client with good credentials, the n-th with *attributes(n)*."""

    def datagrams(client: Client) -> Iterator[bytes]:
        for number in itertools.count():
            yield client.request(method, *attributes(number))

    return datagrams


def _peers(count: int) -> Sequence[Pair]:
    return [(Attr.XOR_PEER_ADDRESS, (f"198.51.100.{1 + at}", 9000)) for at in range(count)]


def _forbidden(number: int) -> Sequence[Pair]:
    peer = f"10.0.{number >> 8 & 255}.{number & 255}", 9000
    return [(Attr.CHANNEL_NUMBER, 0x4FFF), (Attr.XOR_PEER_ADDRESS, peer)]


KINDS: Final = (
    Kind("none", None),
    *(Kind(flood.name, of(flood)) for flood in hostile.FLOODS if flood.from_strangers),
    Kind("wrong signature, no good nonce", lambda client: wrongly_signed(client, b"none such")),
    Kind("wrong signature, good nonce", wrongly_signed, by_a_client=True),
    Kind(
        "CreatePermission with 16 peers",
        signed(Method.CREATE_PERMISSION, lambda _: _peers(16)),
        by_a_client=True,
    ),
    Kind(
        "CreatePermission with 150 peers",
        signed(Method.CREATE_PERMISSION, lambda _: _peers(150)),
        by_a_client=True,
    ),
    Kind("Refresh", signed(Method.REFRESH, lambda _: [(Attr.LIFETIME, 3600)]), by_a_client=True),
    Kind("ChannelBind that is refused", signed(Method.CHANNEL_BIND, _forbidden), by_a_client=True),
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.flood",
        description="Flood this relay and coturn beside a steady flow of relayed datagrams, in"
        " network namespaces. Takes root and two CPUs.",
        epilog="*: the flood did not reach its rate; +: the flow did not.",
    )
    parser.add_argument("--rate", type=float, default=FLOOD, help="of the flood, per second")
    parser.add_argument("--flow", type=float, default=FLOW, help="relayed datagrams per second")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each kind and server")
    parser.add_argument("--kind", metavar="TEXT", help="only those whose name contains this")
    return parser


if __name__ == "__main__":
    sys.exit(main())
