"""What floods of connections cost everybody else: how much is lost of a steady flow over UDP.

Run it with ``python -m bench.connections``, as root. The relay has a CPU; clients, peers and the
flood share another one, in the network of :mod:`bench.loadlib.netns`. Floods come from a hundred
addresses.

For each kind of flood the table says which part of the flow was lost, both ways together, how long
the longest iteration of the relay's loop was, how long a newcomer's Allocate took over UDP, and
over TLS with its handshake, and how much memory the relay had. While it has thousands of packets at
once, the kernel keeps the relay from its CPU, which counts as part of an iteration. A flood that
fell behind its rate is marked: then it is the generator, or this machine, that was the limit.
"""

import argparse
import os
import select
import socket
import ssl
import struct
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from bench.flood import BEHIND, FLOW, PAYLOAD, SOURCE_PREFIX, Flooded, beside, cpus
from bench.loadlib.clients import Clients, LoadError
from bench.loadlib.netns import PEER_HOST, RELAY_HOST, Network, inside, ip
from bench.loadlib.process import resident_memory
from bench.loadlib.servers import Server, running
from bench.loadlib.traffic import Load, Session, open_peers
from relay.stun.address import Address
from relay.stun.const import Kind as MessageKind
from relay.stun.const import Method
from relay.stun.message import Message
from tests.certificates import Authority, without_checks
from tests.probes import scrape
from tests.turnclient import StreamClient, TurnError

TCP_PORT: Final = 3478
TLS_PORT: Final = 5349
HTTP_PORT: Final = 8080
SOURCES: Final = [f"198.18.{network}.{host}" for network in range(10) for host in range(1, 11)]
HELD: Final = 500  # connections that a flood keeps
BINDING: Final = Message(MessageKind.REQUEST, Method.BINDING, bytes(12)).encode()


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of flood: what is done over and over, and how often per second."""

    name: str
    attack: "Callable[[Server], Iterator[None]] | None"
    rate: float = 0.0


def main() -> int:
    """Flood the relay with each kind, and print a table; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each kind")
    parser.add_argument("--flow", type=float, default=FLOW, help="relayed datagrams per second")
    parser.add_argument("--kind", metavar="TEXT", help="only those whose name contains this")
    parser.add_argument("--key", default="ecdsa", help="ecdsa, rsa-2048 and so on")
    options = parser.parse_args()
    load = Load(PAYLOAD, options.flow, options.seconds)
    try:
        with tempfile.TemporaryDirectory() as name, Network("crowd") as network:
            folder = Path(name)
            folder.chmod(0o755)
            load_cpu, server_cpu = cpus()
            os.sched_setaffinity(0, {load_cpu})
            for source in SOURCES:
                ip("-n", network.clients, "address", "add", f"{source}/32", "dev", "eth0")
            ip("-n", network.relay, "route", "add", SOURCE_PREFIX, "via", "192.0.2.2")
            chain, key = Authority().issue(RELAY_HOST, kind=options.key).write_to(folder)
            more = [
                *(f"--tcp-port={TCP_PORT}", f"--tls-port={TLS_PORT}"),
                *(f"--tls-cert={chain}", f"--tls-key={key}"),
                f"--http-addr={RELAY_HOST}:{HTTP_PORT}",
            ]
            print(
                f"{'flood':44}{'per second':>12}{'lost':>9}{'iteration':>11}{'newcomer':>10}"
                f"{'by TLS':>9}{'memory':>9}"
            )
            for kind in KINDS:
                if options.kind and options.kind not in kind.name:
                    continue
                with running(
                    "relay", network, server_cpu, folder, limited=True, more=more
                ) as relay:
                    print(f"{kind.name:44}{_measure(kind, relay, load)}", flush=True)
    except (LoadError, OSError) as error:
        print(f"bench.connections: {error}", file=sys.stderr)
        return 1
    return 0


def _measure(kind: Kind, server: Server, load: Load) -> str:
    with ExitStack() as stack:
        with inside(server.network.peers):
            peers = open_peers(PEER_HOST, 1)
        for peer in peers:
            stack.enter_context(peer)
        with inside(server.network.clients):
            session = Session(server.address, server.credentials, clients=1, peers=peers)
            newcomer = stack.enter_context(Clients(server.address, server.credentials, 1))
        stack.enter_context(session)
        with inside(server.network.clients), _beside(kind, server) as flood:
            result = session.measure(load)
            try:
                by_udp = f"{newcomer.allocate():.2f} s"
            except LoadError:
                by_udp = "none"
            began = time.monotonic()
            try:
                address = (RELAY_HOST, TLS_PORT)
                with _client(server, address, without_checks()) as client:
                    client.allocates()
                    by_tls = f"{time.monotonic() - began:.2f} s"
            except (TurnError, OSError):
                by_tls = "none"
            memory = resident_memory(server.pid) >> 20
            iteration = scrape(HTTP_PORT, RELAY_HOST)["relay_loop_lag_seconds"]
    rate = f"{flood.rate:,.0f}{'' if flood.rate >= kind.rate * BEHIND else '*'}"
    mark = "" if result.sent_rate >= (load.rate or 0.0) * BEHIND else "+"
    lost = f"{result.loss:.2%}{mark}"
    return f"{rate:>12}{lost:>9}{iteration * 1000:>8.1f} ms{by_udp:>10}{by_tls:>9}{memory:>5} MiB"


def _client(
    server: Server, address: Address, context: ssl.SSLContext | None = None
) -> StreamClient:
    who = server.credentials
    return StreamClient(address, who.username, who.password, context=context)


def _beside(kind: Kind, server: Server) -> AbstractContextManager[Flooded]:
    if kind.attack is None:
        return nullcontext(Flooded())
    return beside(partial(_flood, kind, server))


def _flood(kind: Kind, server: Server, parent: Connection) -> None:
    assert kind.attack is not None
    steps, done = kind.attack(server), 0
    next(steps)
    parent.send("begun")
    began = due = time.monotonic()
    interval = 1 / kind.rate
    while not parent.poll(max(0.0, due - time.monotonic())):
        with suppress(OSError):
            next(steps, None)
        done += 1
        due = max(due + interval, time.monotonic() - 0.02)  # what it is behind, it leaves out
    parent.send(done / (time.monotonic() - began))


# --- What is done ---------------------------------------------------------------------------


def _connect(number: int, port: int) -> socket.socket:
    """Begin a connection from one of the addresses; it need not be there yet."""
    sock = socket.socket()
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.bind((SOURCES[number % len(SOURCES)], 0))
    with suppress(BlockingIOError):
        sock.connect((RELAY_HOST, port))
    return sock


def connecting(
    port: int, says: bytes = b"", *, resets: bool = False, held: int = 50
) -> Callable[[Server], Iterator[None]]:
    """Open one connection after the other, say something, and close it later."""

    def attack(_: Server) -> Iterator[None]:
        held_now: deque[socket.socket] = deque()
        number = 0
        while True:
            number += 1
            held_now.append(_connect(number, port))
            if says and len(held_now) > 5:
                with suppress(OSError):
                    held_now[-5].send(says)
            if len(held_now) > held:
                old = held_now.popleft()
                if resets:
                    linger = struct.pack("ii", 1, 0)
                    old.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                old.close()
            yield

    return attack


def shaking_hands(_: Server) -> Iterator[None]:
    """Do whole handshakes, and close."""
    context = without_checks()
    number = 0
    while True:
        number += 1
        sock = _connect(number, TLS_PORT)
        sock.settimeout(1.0)
        with suppress(OSError):
            select.select([], [sock], [], 1.0)
            context.wrap_socket(sock).close()
        sock.close()
        yield


def tiny_records(_: Server) -> Iterator[None]:
    """Send records of TLS with a byte in each, in lots of a hundred."""
    context = without_checks()

    def opened(number: int) -> ssl.SSLSocket:
        sock = _connect(number, TLS_PORT)
        select.select([], [sock], [], 1.0)
        sock.settimeout(1.0)
        return context.wrap_socket(sock)

    socks = [opened(number) for number in range(10)]
    number = 0
    while True:
        number += 1
        try:
            for at in range(100):
                socks[number % 10].send(BINDING[at % len(BINDING) :][:1])
        except OSError:
            socks[number % 10].close()
            socks[number % 10] = opened(number)
        yield


def byte_by_byte(_: Server) -> Iterator[None]:
    """Send requests on many connections, a segment for each byte."""
    socks = [_connect(number, TCP_PORT) for number in range(HELD)]
    select.select([], socks, [], 1.0)
    at = 0
    while True:
        sock = socks[at % HELD]
        try:
            sock.send(BINDING[at // HELD % len(BINDING) :][:1])
        except OSError:
            sock.close()
            socks[at % HELD] = _connect(at, TCP_PORT)
        at += 1
        yield


def many_messages(message: bytes, *, count: int) -> Callable[[Server], Iterator[None]]:
    """Send many messages in one piece, over and over, on a few connections."""

    def attack(_: Server) -> Iterator[None]:
        socks = [_connect(number, TCP_PORT) for number in range(10)]
        select.select([], socks, [], 1.0)
        at = 0
        while True:
            at += 1
            try:
                socks[at % 10].send(message * count)
            except BlockingIOError:
                pass
            except OSError:
                socks[at % 10].close()
                socks[at % 10] = _connect(at, TCP_PORT)
            yield

    return attack


def not_reading(server: Server) -> Iterator[None]:
    """Have a peer send to clients that do not read."""
    with inside(server.network.peers):
        peer = open_peers(PEER_HOST, 1)[0]
    clients, relayed = [], []
    for _ in range(10):
        client = _client(server, (RELAY_HOST, TCP_PORT))
        relayed.append(client.allocates())
        client.binds(0x4000, peer.getsockname())
        clients.append(client)
    number = 0
    while True:
        number += 1
        with suppress(BlockingIOError):
            peer.sendto(bytes(1200), relayed[number % 10])
        yield


def hello() -> bytes:
    """Return what a client of TLS begins with."""
    outgoing = ssl.MemoryBIO()
    session = without_checks().wrap_bio(ssl.MemoryBIO(), outgoing)
    with suppress(ssl.SSLWantReadError):
        session.do_handshake()
    return outgoing.read()


KINDS: Final = (
    Kind("none", None),
    Kind("connect and close", connecting(TCP_PORT), 3000),
    Kind("connect and reset", connecting(TCP_PORT, resets=True), 3000),
    Kind("connect, and stay without a word", connecting(TCP_PORT, held=4000), 1000),
    Kind(
        "connect, say something else, close", connecting(TCP_PORT, b"GET / HTTP/1.1\r\n\r\n"), 3000
    ),
    Kind("connect, ask once, close", connecting(TCP_PORT, BINDING), 3000),
    Kind("TLS: a hello, and reset", connecting(TLS_PORT, hello(), resets=True), 3000),
    Kind("TLS: whole handshakes", shaking_hands, 300),
    Kind("TLS: a byte in each record, 100 at once", tiny_records, 200),
    Kind("requests byte by byte, 500 connections", byte_by_byte, 20_000),
    Kind(
        "tiny messages, 10,000 in one piece", many_messages(b"\x40\x00\x00\x00", count=10_000), 200
    ),
    Kind("requests, 1,000 in one piece", many_messages(BINDING, count=1000), 200),
    Kind("10 clients that do not read", not_reading, 20_000),
)

if __name__ == "__main__":
    sys.exit(main())
