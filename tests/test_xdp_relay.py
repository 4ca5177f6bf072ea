"""The relay with its program in the kernel, between real hosts: who relays what, and until when."""

import json
import re
import select
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Self

import pytest

from bench.loadlib.netns import inside
from relay.stun.const import Family
from relay.turn.channeldata import HEADER
from tests.interop.needs import needs_programs
from tests.netns import ip
from tests.probes import scrape
from tests.process import CHECKOUT, RelayProcess
from tests.turnclient import TIMEOUT, StreamClient, TurnClient, TurnError
from tests.xdpbed import needs_bpf
from tests.xdpworld import (
    HTTP,
    PORT,
    WORLDS,
    Counts,
    World,
    behind_a_router,
    on_one_link,
    two_interfaces,
)

NUMBER = 0x4001
SIZES = (0, 1, 3, 60, 160, 512, 1200, 1400)
UDP_SEGMENT = (17, 103)  # <linux/udp.h>
_IP_RECVTOS = 13  # <linux/in.h>

ALL_FAMILIES = [
    pytest.param(client, peer, id=f"{client.name} client, {peer.name} peer")
    for client in Family
    for peer in Family
]
every_family = pytest.mark.parametrize(("client_family", "peer_family"), ALL_FAMILIES)


@pytest.fixture(scope="module", autouse=True)
def _needs() -> None:
    needs_bpf()


@pytest.fixture(scope="module", params=WORLDS)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with WORLDS[request.param]() as world:
        yield world


@pytest.fixture(scope="module")
def relay(world: World) -> Iterator[RelayProcess]:
    with world.starts() as relay:
        yield relay


@pytest.fixture
def ends(
    world: World, relay: RelayProcess, client_family: Family, peer_family: Family
) -> Iterator["Ends"]:
    with Ends(world, relay, client_family, peer_family) as ends:
        yield ends


class Ends:
    """A client with a channel to a peer. The kernel knows the way to both."""

    def __init__(
        self,
        world: World,
        relay: RelayProcess,
        client: Family = Family.IPV4,
        peer: Family = Family.IPV4,
        number: int = NUMBER,
    ) -> None:
        self._relay = relay
        self.number = number
        self.client = world.client(relay, client)
        self.peer = world.peer(peer)
        self.relayed = self.client.allocates(peer)
        self.client.binds(number, self.peer.address)
        self.exchange(b"by whomever")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(TurnError, ConnectionRefusedError):  # it may have ended, as may the relay
            self.client.refreshes(lifetime=0)
        self.client.socket.close()
        self.peer.__exit__()

    def exchange(self, payload: bytes) -> None:
        """Send it to the peer and back, and see it come."""
        self.client.sends(self.number, payload)
        assert self.peer.receives() == (payload, self.relayed)
        self.peer.sends(payload, self.relayed)
        assert self.client.receives() == (self.number, payload)

    def tos_at_the_peer(self, payload: bytes) -> int:
        """Send to the peer, and return the octet of DSCP and ECN that it sees."""
        self.peer.socket.setsockopt(socket.IPPROTO_IP, _IP_RECVTOS, 1)
        self.client.sends(self.number, payload)
        received, control, _, _ = self.peer.socket.recvmsg(1000, 64)
        assert received == payload
        ((_, _, octet),) = control
        return octet[0]

    def sends_in_vain(self) -> None:
        """Send both ways what must not arrive; return when the relay is through with it."""
        self.peer.sends(b"in vain", self.relayed)
        self.client.sends(self.number, b"in vain")
        self.client.maps()
        assert nothing_is_queued(self.client.socket)
        assert nothing_is_queued(self.peer.socket)


def nothing_is_queued(sock: socket.socket) -> bool:
    return not select.select([sock], [], [], 0)[0]


# --- Wherever everybody is ------------------------------------------------------------------


@every_family
def test_the_kernel_relays_and_the_sockets_do_not(
    world: World, relay: RelayProcess, ends: Ends
) -> None:
    before, errors, rng = Counts.of(relay), world.checksum_errors(), Random(1)
    for size in SIZES:
        ends.exchange(rng.randbytes(size))

    after = Counts.of(relay)
    assert (after.up_by_xdp - before.up_by_xdp, after.down_by_xdp - before.down_by_xdp) == (
        len(SIZES),
        len(SIZES),
    )
    assert (after.up_by_sockets, after.down_by_sockets) == (
        before.up_by_sockets,
        before.down_by_sockets,
    )
    assert after.routes == 2
    assert world.checksum_errors() == errors


@every_family
def test_what_fits_into_no_frame_goes_by_the_sockets(relay: RelayProcess, ends: Ends) -> None:
    """They have the kernel fragment it."""
    before = Counts.of(relay)
    ends.exchange(bytes(1472))
    ends.exchange(bytes(4000))

    after = Counts.of(relay)
    assert after.down_by_sockets - before.down_by_sockets == 2
    assert after.up_by_sockets - before.up_by_sockets == 2


@every_family
def test_a_train_of_segments_is_relayed_whole(relay: RelayProcess, ends: Ends) -> None:
    before = Counts.of(relay)
    payloads = [bytes([number]) * 500 for number in range(20)] + [b"short"]
    frames = [HEADER.pack(ends.number, len(payload)) + payload for payload in payloads]
    segment = [(*UDP_SEGMENT, struct.pack("H", len(frames[0])))]
    ends.client.socket.sendmsg(frames, segment)
    assert [ends.peer.receives()[0] for _ in payloads] == payloads

    after = Counts.of(relay)
    assert after.up_by_xdp - before.up_by_xdp == len(payloads)
    assert after.up_by_sockets == before.up_by_sockets


@every_family
def test_refresh_to_nothing_ends_it_at_once(relay: RelayProcess, ends: Ends) -> None:
    ends.client.refreshes(lifetime=0)
    before = Counts.of(relay)
    assert before.routes == 0

    ends.sends_in_vain()

    assert Counts.of(relay) == before


@pytest.mark.parametrize(("client_family", "peer_family"), [(Family.IPV4, Family.IPV4)])
def test_other_traffic_of_the_host_is_left_alone(
    world: World, relay: RelayProcess, ends: Ends
) -> None:
    """A resolver at a port of the relay's range, TCP, ICMP and what finds neighbours."""
    before = Counts.of(relay)
    with inside(world.relay):
        resolver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        resolver.bind(("", 49152 + (ends.relayed[1] == 49152)))
        server = socket.create_server((world.relay_hosts[Family.IPV4], PORT))
    with resolver, server:
        resolver.settimeout(TIMEOUT)
        resolver.sendto(b"question", ends.peer.address)
        question, source = ends.peer.receives()
        assert question == b"question"
        ends.peer.sends(b"answer", source)
        assert resolver.recvfrom(100) == (b"answer", ends.peer.address)
        with inside(world.clients):
            stream = socket.create_connection((world.relay_hosts[Family.IPV4], PORT), TIMEOUT)
        with stream, server.accept()[0] as accepted:
            stream.sendall(HEADER.pack(ends.number, 4) + b"data")
            assert accepted.recv(8) == HEADER.pack(ends.number, 4) + b"data"
    for name in (world.clients, world.peers):
        for family in Family:
            pings(name, world.relay_hosts[family])
    ends.exchange(b"and it goes on")

    after = Counts.of(relay)
    assert (after.up_by_sockets, after.down_by_sockets) == (
        before.up_by_sockets,
        before.down_by_sockets,
    )


def pings(namespace: str, host: str) -> None:
    """Send an echo request, after forgetting the neighbour, and wait for the answer."""
    ip("-n", namespace, "neighbour", "flush", "dev", "eth0")
    six = ":" in host
    protocol = socket.getprotobyname("ipv6-icmp" if six else "icmp")
    family = socket.AF_INET6 if six else socket.AF_INET
    with inside(namespace):
        sock = socket.socket(family, socket.SOCK_RAW, protocol)
    with sock:
        sock.settimeout(TIMEOUT)
        kind, answer = (128, 129) if six else (8, 0)
        body = struct.pack("!BBHHH", kind, 0, 0, 1, 1)
        sock.sendto(body[:2] + struct.pack("!H", 0xFFFF ^ (kind << 8) + 2) + body[4:], (host, 0))
        while (sock.recv(100) if six else sock.recv(100)[20:])[0] != answer:
            pass


def test_peers_of_one_relay_are_inside(world: World, relay: RelayProcess) -> None:
    """Two clients of this relay, each bound to the other's relayed address."""
    with ExitStack() as stack:
        alice, bob = (stack.enter_context(world.client(relay, family)) for family in Family)
        of_alice, of_bob = alice.allocates(Family.IPV4), bob.allocates(Family.IPV4)
        alice.binds(NUMBER, of_bob)
        bob.binds(0x4002, of_alice)
        before = Counts.of(relay)
        for _ in range(3):
            alice.sends(NUMBER, b"ping")
            assert bob.receives() == (0x4002, b"ping")
            bob.sends(0x4002, b"pong")
            assert alice.receives() == (NUMBER, b"pong")
        after = Counts.of(relay)
        assert after.up_by_xdp - before.up_by_xdp == 6
        assert after.down_by_xdp - before.down_by_xdp == 6  # as by the sockets, it counts for both
        assert after.up_by_sockets == before.up_by_sockets

        bob.refreshes(lifetime=0)
        alice.sends(NUMBER, b"to nobody")
        alice.maps()
        assert nothing_is_queued(bob.socket)
        alice.refreshes(lifetime=0)


def test_who_has_a_connection_is_relayed_by_the_sockets(small: World) -> None:
    """To peers, and to a client whose own channels are in the kernel."""
    with small.starts(f"--tcp-port={PORT}") as relay, ExitStack() as stack:
        with inside(small.clients):
            address = (small.relay_hosts[Family.IPV4], PORT)
            alice = stack.enter_context(StreamClient(address, relay.username, relay.password))
        bob = stack.enter_context(small.client(relay, Family.IPV4))
        peer = stack.enter_context(small.peer(Family.IPV4))
        of_alice, of_bob = alice.allocates(), bob.allocates()
        alice.binds(0x4001, peer.address)
        assert Counts.of(relay).routes == 0
        alice.binds(0x4002, of_bob)
        bob.binds(0x4003, of_alice)
        assert Counts.of(relay).routes == 2
        for number in range(3):
            payload = b"%d" % number
            alice.sends(0x4001, payload)
            assert peer.receives() == (payload, of_alice)
            peer.sends(payload, of_alice)
            assert alice.receives() == (0x4001, payload)
            alice.sends(0x4002, payload)
            assert bob.receives() == (0x4003, payload)
            bob.sends(0x4003, payload)
            assert alice.receives() == (0x4002, payload)
        bob.refreshes(0)


@pytest.mark.parametrize("name", WORLDS)
def test_without_whole_checksums_everything_works_by_the_sockets(name: str) -> None:
    """As between containers on one host: nobody finishes them, so the program may not relay."""
    with WORLDS[name](cables=False) as world, world.starts() as relay:
        for family in Family:
            with Ends(world, relay, family, family) as ends:
                for size in SIZES:
                    ends.exchange(bytes(size))
        assert world.checksum_errors() == 0
        counts = Counts.of(relay)
        assert counts.up_by_sockets == counts.down_by_sockets == 2 * (1 + len(SIZES))
        assert counts.up_by_xdp == counts.down_by_xdp == 0


# --- The life of a channel ------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Iterator[World]:
    with two_interfaces() as world:
        yield world


def test_an_allocation_that_expires_relays_no_more(small: World) -> None:
    with small.starts() as relay, Ends(small, relay) as ends:
        ends.client.refreshes(lifetime=1)
        while Counts.of(relay).routes:
            pass
        ends.sends_in_vain()


def test_who_takes_over_leaves_nothing_to_whom_it_was(small: World) -> None:
    with (
        small.starts("--one-allocation-per-username") as relay,
        Ends(small, relay) as before,
        Ends(small, relay, number=0x4002) as ends,
    ):
        assert Counts.of(relay).routes == 2
        before.sends_in_vain()
        ends.exchange(b"still there")


def test_a_port_has_nothing_of_who_had_it_before(small: World) -> None:
    """There is one port, and one after the other has it; a peer's host is no permission here."""
    one_port = ("--lowest-port=50000", "--highest-port=50000")
    with small.starts(*one_port, "--no-send-indications") as relay, Ends(small, relay) as first:
        first.client.refreshes(lifetime=0)
        with Ends(small, relay) as second:
            assert second.relayed == first.relayed
            first.sends_in_vain()
            assert nothing_is_queued(second.client.socket)
            second.exchange(b"mine")


def test_what_a_reload_forbids_stops_at_once(small: World, tmp_path: Path) -> None:
    config = tmp_path / "relay.conf"
    config.write_text("")
    with small.starts(f"--config={config}", "--user=root") as relay, Ends(small, relay) as ends:
        config.write_text(f"deny-peer = {ends.peer.address[0]}/32\n")
        relay.signals(signal.SIGHUP)
        relay.logs("reloaded; changed: deny-peer")
        assert Counts.of(relay).routes == 0
        ends.sends_in_vain()


def test_with_a_portal_it_is_attached_before_anybody_is_asked_over_the_network(
    small: World,
) -> None:
    """To attach it may take the network away for a moment."""
    relay = RelayProcess(
        "--public-ip4-addr=192.0.2.1",
        "--xdp=require",
        *(f"--xdp-device={device}" for device in small.devices),
        "--api-url=ws://127.0.0.1:9",  # where nobody listens
        port=PORT,
        prefix=("ip", "netns", "exec", small.relay),
        loopback=False,
        variables={"FIREZONE_TOKEN": "token"},
        portal=True,
    )
    with relay:
        relay.logs("waiting for the portal")
        said = relay.errors()
        assert said.index("xdp: the kernel relays channels at") < said.index("waiting for")


# --- Where relay ports are, and by which way -------------------------------------------------


def test_behind_a_nat_the_source_is_what_the_routes_say(small: World) -> None:
    """The public address is none of the host's: relay ports are bound to no address."""
    world = replace(small, relay_hosts={Family.IPV4: "203.0.113.77"})
    with world.starts() as relay, ExitStack() as stack:
        with inside(small.clients):
            server = (small.relay_hosts[Family.IPV4], PORT)
            client = TurnClient(server, relay.username, relay.password)
        stack.enter_context(client)
        peer = stack.enter_context(small.peer(Family.IPV4))
        told = client.allocates()
        assert told[0] == "203.0.113.77"
        client.binds(NUMBER, peer.address)
        for _ in range(3):
            client.sends(NUMBER, b"up")
            payload, source = peer.receives()
            assert (payload, source) == (b"up", ("198.51.100.1", told[1]))
            peer.sends(b"down", source)
            assert client.receives() == (NUMBER, b"down")
        counts = Counts.of(relay)
        assert counts.up_by_xdp >= 2
        assert counts.down_by_xdp == 3


@pytest.mark.parametrize("arguments", [(), ("--bind-ip4-addr=192.0.2.1",)], ids=["any", "one"])
def test_rules_about_routes_hold(small: World, arguments: tuple[str, ...]) -> None:
    """The way to this peer is in a table of its own, for what comes from the relay's address."""
    with ExitStack() as stack:
        far = "203.0.113.7"
        for name, *command in (
            (small.peers, "address", "add", f"{far}/32", "dev", "lo"),
            (small.relay, "route", "add", "203.0.113.0/24", "via", "198.51.100.2", "table", "100"),
            (small.relay, "rule", "add", "from", "192.0.2.1", "lookup", "100"),
        ):
            ip("-n", name, *command)
            undo = ["delete" if word == "add" else word for word in command]
            stack.callback(ip, "-n", name, *undo)
        world = replace(small, peer_hosts={Family.IPV4: far})
        relay = stack.enter_context(world.starts("--allow-peer=203.0.113.0/24", *arguments))
        with Ends(world, relay) as ends:
            before = Counts.of(relay)
            ends.exchange(b"over there")
            after = Counts.of(relay)
        assert after.up_by_xdp - before.up_by_xdp == 1
        assert after.down_by_xdp - before.down_by_xdp == 1


def test_in_generic_mode_the_stack_relays_between_bridges() -> None:
    """These have no driver that a program could be in."""
    with two_interfaces() as world, ExitStack() as stack:
        put_under_a_bridge(world, "towards0", "bridge0", "192.0.2.1/24", "2001:db8:1::1/64")
        put_under_a_bridge(world, "towards1", "bridge1", "198.51.100.1/24", "2001:db8:2::1/64")
        bridged = replace(world, devices=("bridge0", "bridge1"))
        relay = stack.enter_context(bridged.starts(xdp="generic"))
        relay.logs("xdp: the kernel relays channels at bridge0 (generic), bridge1 (generic)")
        for family in Family:
            with Ends(bridged, relay, family, family) as ends:
                before = Counts.of(relay)
                for size in SIZES:
                    ends.exchange(bytes(size))
                after = Counts.of(relay)
            assert after.up_by_xdp - before.up_by_xdp == len(SIZES)
            assert after.down_by_xdp - before.down_by_xdp == len(SIZES)
        assert world.checksum_errors() == 0


def test_from_a_driver_nothing_goes_to_a_device_without_one() -> None:
    """A bridge has no place for what has no socket: it would be lost there."""
    with two_interfaces() as world, ExitStack() as stack:
        put_under_a_bridge(world, "towards1", "bridge1", "198.51.100.1/24", "2001:db8:2::1/64")
        mixed = replace(world, devices=("towards0", "bridge1"))
        relay = stack.enter_context(mixed.starts(xdp="generic"))
        relay.logs("xdp: the kernel relays channels at towards0 (native), bridge1 (generic)")
        with Ends(mixed, relay) as ends:
            before = Counts.of(relay)
            for size in SIZES:
                ends.exchange(bytes(size))
            after = Counts.of(relay)
        assert after.up_by_sockets - before.up_by_sockets == len(SIZES)
        assert after.down_by_xdp - before.down_by_xdp == len(SIZES)


def put_under_a_bridge(world: World, device: str, bridge: str, *prefixes: str) -> None:
    """Give the addresses of one of the relay's devices to a bridge over it."""
    here = ("-n", world.relay)
    ip(*here, "link", "add", bridge, "type", "bridge")
    ip(*here, "link", "set", device, "master", bridge)
    for prefix in prefixes:
        at_once = ("nodad",) if ":" in prefix else ()
        ip(*here, "address", "delete", prefix, "dev", device)
        ip(*here, "address", "add", prefix, "dev", bridge, *at_once)
    ip(*here, "link", "set", bridge, "up")


def test_dscp_and_ecn_are_copied(small: World) -> None:
    with small.starts() as relay, Ends(small, relay) as ends:
        ends.client.socket.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0xB8)
        before = Counts.of(relay)
        assert ends.tos_at_the_peer(b"marked") == 0xB8
        assert Counts.of(relay).up_by_xdp - before.up_by_xdp == 1


# --- How the process lives with it ----------------------------------------------------------


def test_it_has_no_privileges_and_goes_with_the_process_however_that_ends(small: World) -> None:
    with small.starts() as relay, Ends(small, relay) as ends:
        ends.exchange(b"by the kernel")
        status = Path(f"/proc/{relay.pid}/status").read_text()
        assert "\nCapEff:\t0000000000000000\n" in status
        assert programs_at(small) == {"towards0": "turn", "towards1": "turn"}
        relay.process.kill()
        relay.process.wait()
        assert programs_at(small) == {}


def test_the_capabilities_of_the_drop_in_are_enough(small: World) -> None:
    """For a user who is not root, in a sandbox in which sysctls can only be read."""
    needs_programs("setpriv", "unshare")
    drop_in = (CHECKOUT / "contrib/systemd/xdp.conf").read_text()
    (given,) = re.findall(r"^AmbientCapabilities=(.+)$", drop_in, re.MULTILINE)
    capabilities = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in given.split())
    confined = (
        *("unshare", "--mount", "sh", "-c", 'mount -o bind,ro /proc/sys /proc/sys && exec "$@"'),
        *("sh", "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"),
        f"--bounding-set=-all,{capabilities}",
        f"--inh-caps=-all,{capabilities}",
        f"--ambient-caps=-all,{capabilities}",
    )
    with inside(small.relay):
        for of in ("ipv4", "ipv6"):  # as the sysctl.d file does
            Path(f"/proc/sys/net/{of}/conf/lo/forwarding").write_text("1")
    with small.starts(prefix=confined) as relay, Ends(small, relay) as ends:
        before = Counts.of(relay)
        ends.exchange(b"by the kernel")
        assert Counts.of(relay).up_by_xdp == before.up_by_xdp + 1
        status = Path(f"/proc/{relay.pid}/status").read_text()
        assert "\nCapEff:\t0000000000000000\n" in status
        assert "\nUid:\t65534\t" in status


def programs_at(world: World) -> dict[str, str]:
    """Which XDP program is at which device of the relay's host."""
    command = ["ip", "-n", world.relay, "-j", "-d", "link", "show"]
    listed = subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT)
    return {
        link["ifname"]: link["xdp"]["prog"]["name"]
        for link in json.loads(listed.stdout)
        if "xdp" in link
    }


def test_metrics_tell_who_relays(small: World) -> None:
    with small.starts() as relay, Ends(small, relay) as ends:
        ends.exchange(b"x" * 100)
        ends.exchange(b"x" * 100)
        counts = Counts.of(relay)
        with inside(small.relay):
            metrics = scrape(HTTP)
    assert metrics["relay_xdp_attached", "native", "towards0"] == 1
    assert metrics["relay_xdp_attached", "native", "towards1"] == 1
    assert metrics["relay_xdp_routes"] == 2
    assert metrics["relay_xdp_failures_total", "not_attached"] == 0
    for direction, by_sockets, by_xdp in (
        ("client_to_peer", counts.up_by_sockets, counts.up_by_xdp),
        ("peer_to_client", counts.down_by_sockets, counts.down_by_xdp),
    ):
        assert metrics["relay_relayed_packets_total", "udp", direction, "sockets"] == by_sockets
        assert metrics["relay_relayed_packets_total", "udp", direction, "xdp"] == by_xdp
    assert metrics["relay_packet_size_bytes_bucket", "udp", "64.0", "xdp"] <= 2
    assert metrics["relay_packet_size_bytes_bucket", "udp", "128.0", "xdp"] >= 4
    assert metrics["relay_relayed_bytes_total", "udp", "peer_to_client", "xdp"] >= 200


@pytest.mark.parametrize("make", [behind_a_router, on_one_link])
def test_the_usual_devices_are_those_of_the_default_routes(
    make: Callable[..., AbstractContextManager[World]],
) -> None:
    with make() as world:
        unnamed = replace(world, devices=())
        with unnamed.starts(xdp="generic") as relay:
            relay.logs("xdp: the kernel relays channels at eth0 (generic)")


def test_without_a_default_route_all_devices_are_usual(small: World) -> None:
    with replace(small, devices=()).starts(xdp="generic") as relay:
        relay.logs("xdp: the kernel relays channels at towards0 (generic), towards1 (generic)")
