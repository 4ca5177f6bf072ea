"""How much one client gets through over TCP and TLS, compared with coturn.

    python -m bench.streams [--rounds N] [--seconds N] [--json FILE]

Takes root, two CPUs and Debian's coturn. Both servers run at once in a namespace of their own, on
one CPU, the load client and its peer on the other one; the rounds alternate. One client with one
channel sends frames as fast as the connection takes them, and its peer counts what arrives (up);
or the peer sends bursts at a rate that is more than either server relays, and the client counts
(down). CPU is the server's, by the scheduler's clock.
"""

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

from bench.loadlib.clients import LoadError, udp_socket
from bench.loadlib.mmsg import Inbox, Outbox, socket_name
from bench.loadlib.netns import PEER_HOST, RELAY_HOST, Network, inside
from bench.loadlib.process import cpu_time
from bench.loadlib.servers import Server, running
from relay.stun.address import Address
from relay.turn.users import DEFAULT_REALM
from tests.certificates import Authority, without_checks
from tests.turnclient import StreamClient

SIZES: Final = (160, 1200)  # bytes of payload
CHANNEL: Final = 0x4000
TRAIN: Final = 32  # datagrams that a peer sends at once
DOWN_RATE: Final = {160: 400_000, 1200: 250_000}  # datagrams per second
TLS_PORTS: Final = {"relay": 5349, "coturn": 5350}
REALMS: Final = {"relay": DEFAULT_REALM, "coturn": "versus"}
TCP_PORTS: Final = {"relay": 3478, "coturn": 3479}


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured."""

    transport: str
    direction: str
    size: int

    def __str__(self) -> str:
        return f"{self.transport.upper()} {self.direction}, {self.size} bytes"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it."""

    rate: float  # datagrams per second that arrived
    cost: float  # µs of the server's CPU for each of them


def main() -> None:
    """Compare, and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cases = [
        Case(transport, direction, size)
        for transport in ("tcp", "tls")
        for direction in ("up", "down")
        for size in SIZES
    ]
    try:
        found = measure(cases, options.rounds, options.seconds)
    except LoadError as error:
        sys.exit(f"bench.streams: {error}")
    report(found)
    if options.json is not None:
        rows = {
            str(case): {name: [[o.rate, o.cost] for o in outcomes] for name, outcomes in by.items()}
            for case, by in found.items()
        }
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


Run = Callable[[socket.socket, socket.socket, int, float], int]
Found = dict[Case, dict[str, list[Outcome]]]


def measure(cases: Sequence[Case], rounds: int, seconds: float) -> Found:
    """Return what each server did in each round. Raises LoadError."""
    server_cpu, load_cpu = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, {load_cpu})
    found: Found = {case: {name: [] for name in TCP_PORTS} for case in cases}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o755)
        network = stack.enter_context(Network("streams"))
        chain, key = Authority().issue(RELAY_HOST).write_to(folder)
        certificate = [str(chain), str(key)]
        more = {
            "relay": [
                f"--tcp-port={TCP_PORTS['relay']}",
                f"--tls-port={TLS_PORTS['relay']}",
                *(f"--tls-cert={certificate[0]}", f"--tls-key={certificate[1]}"),
                "--http-addr=off",
            ],
            "coturn": [
                f"--tls-listening-port={TLS_PORTS['coturn']}",
                *(f"--cert={certificate[0]}", f"--pkey={certificate[1]}"),
            ],
        }
        servers = [
            stack.enter_context(running(name, network, server_cpu, folder, more=more[name]))
            for name in more
        ]
        for number in range(rounds):
            for case in cases:
                for server in servers if number % 2 else servers[::-1]:
                    found[case][server.name].append(_run(server, case, seconds))
                print(f"{number + 1}/{rounds} {case}", file=sys.stderr)
    return found


def _run(server: Server, case: Case, seconds: float) -> Outcome:
    ports = TCP_PORTS if case.transport == "tcp" else TLS_PORTS
    with inside(server.network.peers):
        peer = udp_socket(PEER_HOST)
        peer.bind((PEER_HOST, 0))
    address = (RELAY_HOST, ports[server.name])
    who = server.credentials
    with inside(server.network.clients):
        client = StreamClient(
            address,
            *(who.username, who.password),
            realm=REALMS[server.name],
            context=without_checks() if case.transport == "tls" else None,
        )
    with client, peer:
        relayed = client.allocates()
        client.binds(CHANNEL, peer.getsockname())
        run: Run = _run_up if case.direction == "up" else partial(_run_down, relayed)
        began, before = time.perf_counter(), cpu_time(server.pid)
        arrived = run(client.socket, peer, case.size, seconds)
        took = time.perf_counter() - began
        used = (cpu_time(server.pid) - before).spent
        return Outcome(arrived / took, used / 1000 / max(arrived, 1))


def frame_of(size: int) -> bytes:
    """Return ChannelData with its padding."""
    return CHANNEL.to_bytes(2, "big") + size.to_bytes(2, "big") + bytes(size + -size % 4)


def _run_up(client: socket.socket, peer: socket.socket, size: int, seconds: float) -> int:
    frame = frame_of(size)
    blob = frame * (64_000 // len(frame))
    inbox, arrived = Inbox(), 0
    client.settimeout(0.001)
    end = time.perf_counter() + seconds
    left = memoryview(b"")
    while time.perf_counter() < end:
        left = left or memoryview(blob)
        with suppress(TimeoutError):
            left = left[client.send(left) :]
        arrived += _count(inbox, peer)
    deadline = time.perf_counter() + 0.2
    while time.perf_counter() < deadline:
        arrived += _count(inbox, peer)
    return arrived


def _count(inbox: Inbox, sock: socket.socket) -> int:
    return sum(
        -(-(end - start) // step) for start, end, step in inbox.receive(sock.fileno()) if step
    )


def _run_down(
    relayed: Address, client: socket.socket, peer: socket.socket, size: int, seconds: float
) -> int:
    outbox = Outbox(size, TRAIN, gso=True, name_size=16)
    outbox.address_to(socket_name(*relayed))
    interval = TRAIN / DOWN_RATE[size]
    buffer = bytearray(1 << 18)
    client.settimeout(0.0)
    whole, arrived = len(frame_of(size)), 0
    began = time.perf_counter()
    next_burst, end = began, began + seconds
    while (now := time.perf_counter()) < end:
        if now >= next_burst:
            outbox.send(peer.fileno())
            next_burst = max(next_burst + interval, now - 0.005)
        arrived += _read(client, buffer)
    deadline = time.perf_counter() + 0.2
    while time.perf_counter() < deadline:
        arrived += _read(client, buffer)
    return arrived // whole


def _read(client: socket.socket, buffer: bytearray) -> int:
    try:
        return client.recv_into(buffer)
    except (BlockingIOError, OSError):  # ssl's SSLWantReadError among them
        return 0


def report(found: Found) -> None:
    """Print a table: the relay's number over coturn's, median and range of the rounds."""
    print("| one client | throughput, relay / coturn | CPU per datagram, relay / coturn |")
    print("| --- | --- | --- |")
    for case, by_name in found.items():
        pairs = list(zip(by_name["relay"], by_name["coturn"], strict=True))
        rates = [ours.rate / theirs.rate for ours, theirs in pairs]
        costs = [ours.cost / theirs.cost for ours, theirs in pairs]
        mine = median(ours.rate for ours, _ in pairs)
        other = median(theirs.rate for _, theirs in pairs)
        print(f"| {case} | {_cell(rates)} {mine:,.0f} : {other:,.0f}/s | {_cell(costs)} |")


def _cell(ratios: Sequence[float]) -> str:
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()
