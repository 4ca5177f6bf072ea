"""What a datagram costs in the kernel: the program alone, and between devices.

Run it as root with ``python -m bench.kernel``; it takes half a minute. First the program is run on
frames of several kinds: those that it relays, and what other traffic of the host pays for its being
there. That includes what it takes to run an empty program, which is the last row.

Then frames arrive at a veth as at a network card, and leave by another one, as fast as that goes.
With two CPUs it is done by one, then by both, each with a queue of its own: the program runs where
a frame arrives, so what more cores are worth is the ratio.

Against other servers, ``python -m bench.versus --xdp`` compares it.
"""

import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from socket import if_nametoindex
from statistics import median
from typing import Final

from bench.loadlib.clients import LoadError
from bench.loadlib.farend import always, attached
from bench.loadlib.netns import inside, ip
from relay.stun.address import Address
from relay.stun.const import Family
from relay.turn.commands import BindChannel, ClientAddress, PeerAddress
from relay.xdp import bpf
from relay.xdp.attach import load
from relay.xdp.routes import KernelRoutes, RouteMap
from tests.frames import ARP, Datagram
from tests.scenario import channel_data

NUMBER: Final = 0x4001
PAYLOAD: Final = 1200  # bytes
REPEAT: Final = 250  # runs in one call; a relayed frame loses one of its TTL in each
CALLS: Final = 100
MANY: Final = 100_000  # routes
ROUNDS: Final = 5
FRAMES: Final = 1_000_000  # of a round, per CPU
HEADERS: Final = 48  # bytes: Ethernet, IPv4, UDP and ChannelData, and a multiple of four

# Ours are the relay's host's, theirs are neighbours. By family: towards clients, towards peers.
OURS: Final = {4: ("192.0.2.1", "198.51.100.1"), 6: ("2001:db8:1::1", "2001:db8:2::1")}
THEIRS: Final = {4: ("192.0.2.2", "198.51.100.2"), 6: ("2001:db8:1::2", "2001:db8:2::2")}
DEVICES: Final = ("towards0", "towards1")
FAR: Final = ("far0", "far1")
MAC: Final = "02:00:00:00:00:0e"


def main() -> int:
    """Measure, and print what was found; return the exit code."""
    if os.geteuid() != 0:
        print("bench.kernel: network namespaces take root: run it with sudo", file=sys.stderr)
        return 1
    try:
        with host(queues=len(os.sched_getaffinity(0))):
            _measure_program()
            _measure_devices()
    except (LoadError, OSError) as error:
        print(f"bench.kernel: {error}", file=sys.stderr)
        return 1
    return 0


# --- The program alone ----------------------------------------------------------------------


def _measure_program() -> None:
    print(f"{'one frame, ns':52}{'least':>8}{'p50':>8}")
    for version, family in ((4, Family.IPV4), (6, Family.IPV6)):
        for routes in (0, MANY):
            program = load()
            frame = _endless(program, version, routes)
            title = f"relayed, {family.name}" + (f", {routes:,} other routes" if routes else "")
            _print(title, program, frame, REPEAT)
            program.close()
    program = load()
    client = Datagram(source=(THEIRS[4][0], 5000), to=(OURS[4][0], 3478), payload=b"")
    data = channel_data(NUMBER, bytes(PAYLOAD))
    for title, frame in {
        "handed up: ChannelData without a route": client.but(payload=data).frame(),
        "handed up: STUN, DNS, QUIC …": client.but(payload=bytes(PAYLOAD)).frame(),
        "handed up: TCP": client.frame()[:23] + b"\6" + client.frame()[24:],
        "handed up: ARP": client.frame()[:12] + ARP.to_bytes(2) + bytes(46),
    }.items():
        _print(title, program, frame, REPEAT)
    program.close()
    with always(bpf.XDP_PASS) as empty:
        _print("an empty program", empty, client.frame(), REPEAT)


def _print(title: str, program: bpf.Program, frame: bytes, repeat: int) -> None:
    times = sorted(program.run(frame, repeat)[2] for _ in range(CALLS))
    print(f"{title:52}{times[0]:8}{median(times):8.0f}", flush=True)


def _endless(program: bpf.Program, version: int, others: int) -> bytes:
    """Write two routes that undo each other: what one makes of a frame, the other one takes.

    Returns such a frame, with *others* in the map besides. A repeated frame is not restored.
    """
    _allow(program)
    client, relayed = (OURS[version][0], 3478), (OURS[version][1], 50_000)
    server, peer = (THEIRS[version][0], 3478), (THEIRS[version][1], 9000)
    routes = program.maps["routes"]
    _bind(_writer(routes, server, relayed[0]), client, relayed[1], peer)
    # The other way round: as if the peer's address were ours, and the client's server a client.
    _bind(_writer(routes, client, peer[0]), server, peer[1], relayed)
    many = _writer(routes, server, relayed[0])
    for number in range(others // 2):
        host = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
        _bind(many, (host, 5000), 10_000 + number % 9000, ("198.51.100.9", number % 60_000 + 1))
    datagram = Datagram(
        source=client, to=server, payload=channel_data(NUMBER, bytes(PAYLOAD)), ttl=255
    )
    frame = datagram.frame()
    left = Datagram.of(program.run(frame, REPEAT)[1])
    assert left.ttl == 255 - REPEAT, "it was not relayed each time"
    return frame


def _writer(routes: RouteMap, client_side: Address, port_host: str) -> KernelRoutes:
    return KernelRoutes(
        routes,
        client_side=lambda _: client_side,
        port_host=lambda _, __: port_host,
        public_hosts={},
        relay_ports=range(0),
        is_own_host=lambda _: False,
        copies_tos=True,
        on_lost_control=sys.exit,
    )


def _bind(routes: KernelRoutes, client: Address, port: int, peer: Address) -> None:
    address = ClientAddress((client, b""))
    routes.bound(BindChannel(address, NUMBER, port, PeerAddress(peer), reaches_outside=True))


# --- Between devices ------------------------------------------------------------------------


def _measure_devices() -> None:
    """Let frames arrive at one device as fast as they can, to leave by the other one."""
    cpus = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        program = load()
        stack.callback(program.close)
        _allow(program)
        for device in DEVICES:
            stack.enter_context(attached(program, device))
        for device, verdict in zip(FAR, (bpf.XDP_PASS, bpf.XDP_DROP), strict=True):
            far = stack.enter_context(always(verdict))
            stack.enter_context(attached(far, device))
        routes = _writer(program.maps["routes"], (OURS[4][0], 3478), OURS[4][1])
        senders = []
        for index in range(2):
            client = (THEIRS[4][0], 5000 + index)
            _bind(routes, client, 50_000 + index, (THEIRS[4][1], 9000))
            data = channel_data(NUMBER, bytes(PAYLOAD))
            frame = Datagram(source=client, to=(OURS[4][0], 3478), payload=data).frame()
            # Frames come back as they were left, so their headers are written anew.
            sends = stack.enter_context(always(bpf.XDP_TX, frame[:HEADERS]))
            senders.append(partial(sends.inject, frame, if_nametoindex(FAR[0]), FRAMES))
        rates: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(ROUNDS):
            for count in (1, 2)[: len(cpus)]:
                rates[count].append(_rate(program, senders[:count], cpus))
    print(f"\n{'frames of 1,200 bytes relayed from one veth to another':58}{'Mpps':>8}")
    for count, found in rates.items():
        if found:
            print(
                f"on {count} CPU{'s' * (count > 1)}, a queue each{'':38}{median(found) / 1e6:8.2f}"
            )
    if rates[2]:
        ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
        print(f"{'ratio':58}{median(ratios):8.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def _rate(program: bpf.Program, senders: Sequence[Callable[[], None]], cpus: list[int]) -> float:
    """Return how many frames per second are relayed when each sender has a CPU."""

    def send(inject: Callable[[], None], cpu: int) -> None:
        os.sched_setaffinity(0, {cpu})
        inject()

    before = _relayed(program)
    threads = [
        threading.Thread(target=send, args=pair) for pair in zip(senders, cpus, strict=False)
    ]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (_relayed(program) - before) / (time.monotonic() - began)


def _relayed(program: bpf.Program) -> int:
    values = program.maps["relayed"].lookup_all()
    return sum(struct.unpack_from("=Q", value)[0] for each in values for value in each)


# --- The host -------------------------------------------------------------------------------


@contextmanager
def host(queues: int) -> Iterator[None]:
    """Go into a namespace with two veths, whose other ends are in it, too. Raises LoadError."""
    name = f"kernel-{os.getpid()}"
    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "set", "lo", "up")
        number = ("numrxqueues", str(queues), "numtxqueues", str(queues))
        for index, (device, far) in enumerate(zip(DEVICES, FAR, strict=True)):
            pair = ("type", "veth", "peer", "name", far, *number)
            ip("-n", name, "link", "add", device, *number, *pair)
            for of in (4, 6):
                prefix = f"{OURS[of][index]}/{24 if of == 4 else 64}"
                at_once = ("nodad",) if of == 6 else ()
                ip("-n", name, "address", "add", prefix, "dev", device, *at_once)
            for end in (far, device):
                ip("-n", name, "link", "set", end, "up")
            for of in (4, 6):
                neighbour = ("lladdr", MAC, "dev", device, "nud", "permanent")
                ip("-n", name, "neighbour", "replace", THEIRS[of][index], *neighbour)
        with inside(name):
            for stack in ("ipv4", "ipv6"):
                Path(f"/proc/sys/net/{stack}/conf/lo/forwarding").write_text("1")
            yield
    finally:
        ip("netns", "delete", name)


def _allow(program: bpf.Program) -> None:
    """Let frames leave by both devices."""
    for device in DEVICES:
        key = struct.pack("=I", if_nametoindex(device))
        program.maps["devices"].update(key, key)


if __name__ == "__main__":
    sys.exit(main())
