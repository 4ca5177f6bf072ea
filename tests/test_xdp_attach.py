"""Where the kernel cannot relay, the log says why and what to do, and the sockets relay."""

import errno
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from bench.loadlib.farend import finish_checksums, like_a_cable
from bench.loadlib.netns import inside
from relay.stun.const import Family
from tests.interop.needs import needs_programs
from tests.netns import ip
from tests.probes import scrape
from tests.process import RelayProcess
from tests.seccomp import BPF, refusing
from tests.xdpbed import needs_bpf
from tests.xdpworld import HTTP, World, namespaces, two_interfaces

MAP_DELETE_BATCH = 27  # commands of bpf(2)
PROG_LOAD = 5
LINK_CREATE = 28
EX_OSERR = 71


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    needs_bpf()
    with two_interfaces(cables=False) as world:
        yield world


def relays_by_sockets(world: World, relay: RelayProcess) -> None:
    """A client and a peer hear each other, and metrics say that no program is at work."""
    with world.client(relay, Family.IPV4) as client, world.peer(Family.IPV4) as peer:
        relayed = client.allocates()
        client.binds(0x4001, peer.address)
        client.sends(0x4001, b"up")
        assert peer.receives() == (b"up", relayed)
        peer.sends(b"down", relayed)
        assert client.receives() == (0x4001, b"down")
    with inside(world.relay):
        metrics = scrape(HTTP)
    assert metrics["relay_relayed_packets_total", "udp", "client_to_peer", "sockets"] == 1
    assert metrics["relay_relayed_packets_total", "udp", "peer_to_client", "sockets"] == 1
    assert metrics["relay_xdp_routes"] == 0
    for device in world.devices:
        assert metrics["relay_xdp_attached", "no", device] == 0


def nothing(_: ExitStack, __: World) -> None:
    """Leave the host as it is."""


def taken(stack: ExitStack, world: World) -> None:
    for device in world.devices:
        with inside(world.relay):
            stack.enter_context(like_a_cable(device))


def with_large_frames(stack: ExitStack, world: World) -> None:
    for name in (world.clients, world.peers):  # by which a veth goes
        ip("-n", name, "link", "set", "eth0", "mtu", "9000")
        stack.callback(ip, "-n", name, "link", "set", "eth0", "mtu", "1500")


@dataclass(frozen=True, slots=True)
class Hindrance:
    """Why the kernel cannot relay: how the relay is run, what its host is like, what it says."""

    reason: str
    prefix: tuple[str, ...] = ()
    refused: tuple[int, int] | None = None  # a command of bpf(2), and with which errno
    arrange: Callable[[ExitStack, World], None] = nothing

    def start(self, stack: ExitStack, world: World, xdp: str, *, portal: bool) -> RelayProcess:
        needs_programs(*self.prefix[:1])
        with inside(world.relay):  # what it needs for its lookups it has to set by itself
            for of in ("ipv4", "ipv6"):
                Path(f"/proc/sys/net/{of}/conf/lo/forwarding").write_text("0")
        self.arrange(stack, world)
        program = None if self.refused is None else refusing(BPF, *self.refused)
        relay = world.starts(xdp=xdp, prefix=self.prefix, program=program, portal=portal)
        return stack.enter_context(relay)


NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all")
ALL_BUT_PERFMON = "-all,+bpf,+net_admin,+setpcap,+setuid,+setgid"
READ_ONLY = (
    "unshare",
    "--mount",
    "sh",
    "-c",
    'mount -o bind,ro /proc/sys /proc/sys && exec "$@"',
    "sh",
)
PRIVILEGES = "(it takes CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON in the host's user namespace"
LOADED, ATTACHED = "the program cannot be loaded: ", "towards0: it cannot be attached: "
HINDRANCES = {
    "no privileges": Hindrance(f"{LOADED}Operation not permitted {PRIVILEGES}", prefix=NOBODY),
    "no CAP_PERFMON": Hindrance(
        f"{LOADED}Permission denied {PRIVILEGES}",
        prefix=("setpriv", f"--bounding-set={ALL_BUT_PERFMON}", f"--inh-caps={ALL_BUT_PERFMON}"),
    ),
    "seccomp": Hindrance(
        f"{LOADED}Operation not permitted {PRIVILEGES}", refused=(PROG_LOAD, errno.EPERM)
    ),
    "no bpf(2)": Hindrance(
        f"{LOADED}Function not implemented (this kernel, or this kind of machine, has no bpf(2))",
        refused=(PROG_LOAD, errno.ENOSYS),
    ),
    "no driver support": Hindrance(
        f"{ATTACHED}Operation not supported (its driver has no place for a program; --xdp generic",
        refused=(LINK_CREATE, errno.EOPNOTSUPP),
    ),
    "too few queues": Hindrance(
        f"{ATTACHED}Invalid argument (its driver refuses; often it has too few queues",
        refused=(LINK_CREATE, errno.EINVAL),
    ),
    "no free queues": Hindrance(
        f"{ATTACHED}Cannot allocate memory (it has too few queues that are free",
        refused=(LINK_CREATE, errno.ENOMEM),
    ),
    "maps need privileges": Hindrance(
        "a map cannot be written without privileges (Operation not permitted): that takes Linux "
        "5.19",
        refused=(MAP_DELETE_BATCH, errno.EPERM),
    ),
    "busy": Hindrance(
        f"{ATTACHED}Device or resource busy (another program is there already", arrange=taken
    ),
    "MTU": Hindrance(
        f"{ATTACHED}Numerical result out of range (its MTU is too large: there is room for about",
        arrange=with_large_frames,
    ),
    "read-only sysctl": Hindrance(
        "net.ipv4.conf.lo.forwarding is off and cannot be written: set it by sysctl -w net.ipv4",
        prefix=READ_ONLY,
    ),
}
every_hindrance = pytest.mark.parametrize("hindrance", HINDRANCES.values(), ids=HINDRANCES)


@every_hindrance
def test_the_reason_is_logged_and_the_sockets_relay(world: World, hindrance: Hindrance) -> None:
    with ExitStack() as stack:
        relay = hindrance.start(stack, world, "auto", portal=False)
        assert "WARNING" in relay.logs(hindrance.reason)
        relay.logs("; the sockets relay everything")
        relays_by_sockets(world, relay)


@every_hindrance
def test_who_requires_it_hears_the_reason_and_it_ends(world: World, hindrance: Hindrance) -> None:
    with ExitStack() as stack:
        relay = hindrance.start(stack, world, "require", portal=True)
        assert relay.wait() == EX_OSERR
        line = relay.logs("ERROR")
        assert hindrance.reason in line
        assert line.endswith("(--xdp auto leaves it to the sockets)\n")


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("eth9", "eth9: there is no such device"),
        ("lo", "lo: it is no Ethernet device"),
        ("bridge0", "bridge0: it cannot be attached: Operation not supported"),
    ],
)
def test_a_device_that_cannot_do_it_is_named(world: World, device: str, reason: str) -> None:
    with with_bridge(world), replace(world, devices=(device,)).starts(xdp="auto") as relay:
        assert f"xdp: {reason}" in relay.logs("WARNING relay.xdp")
        relay.logs("xdp: it is attached to no device; the sockets relay everything")


def test_what_one_device_cannot_do_another_one_may(world: World) -> None:
    """Required, it has to be everywhere."""
    some = replace(world, devices=("eth9", "towards0"))
    with some.starts(xdp="auto") as relay:
        relay.logs("eth9: there is no such device")
        relay.logs("xdp: the kernel relays channels at towards0 (native)")
    with some.starts(xdp="require", portal=True) as relay:
        assert relay.wait() == EX_OSERR


def test_generic_mode_is_for_devices_without_driver_support(world: World) -> None:
    with (
        with_bridge(world),
        replace(world, devices=("bridge0", "towards0")).starts(xdp="generic") as relay,
    ):
        relay.logs("xdp: the kernel relays channels at bridge0 (generic), towards0 (native)")


@pytest.mark.parametrize("device", ["towards0", "towards1"])
def test_a_veth_is_not_taken_unless_it_is_named(world: World, device: str) -> None:
    """Its other end may be a container's, which takes nothing that the driver sends."""
    reason = f"xdp: {device}: it is a veth, and what its driver is to send is lost unless"
    with replace(world, devices=()).starts(xdp="auto") as relay:
        assert reason in relay.logs(f"xdp: {device}")
        relay.logs("; the sockets relay everything")
    with replace(world, devices=(device,)).starts(xdp="auto") as relay:
        assert reason in relay.logs("WARNING relay.xdp")
        relay.logs(f"xdp: the kernel relays channels at {device} (native)")


def test_generic_mode_relays_at_an_ordinary_veth(world: World) -> None:
    """With whole checksums, as they come from another machine; nothing is lost on the way."""
    with ExitStack() as stack:
        for name in (world.clients, world.peers):
            with inside(name):
                finish_checksums("eth0")
        relay = stack.enter_context(replace(world, devices=()).starts(xdp="generic"))
        relay.logs("xdp: the kernel relays channels at towards0 (generic), towards1 (generic)")
        client = stack.enter_context(world.client(relay, Family.IPV4))
        peer = stack.enter_context(world.peer(Family.IPV4))
        relayed = client.allocates()
        client.binds(0x4001, peer.address)
        for number in range(20):
            client.sends(0x4001, b"up %d" % number)
            assert peer.receives() == (b"up %d" % number, relayed)
            peer.sends(b"down %d" % number, relayed)
            assert client.receives() == (0x4001, b"down %d" % number)
        with inside(world.relay):
            metrics = scrape(HTTP)
    assert metrics["relay_relayed_packets_total", "udp", "client_to_peer", "xdp"] > 10


def test_more_devices_than_frames_can_leave_by(world: World) -> None:
    """The program is at all of them; what would go from one to those beyond goes by the sockets."""
    names = [f"tap{number}" for number in range(20)]
    with ExitStack() as stack:
        for name in names:
            ip("-n", world.relay, "tuntap", "add", name, "mode", "tap")
            stack.callback(ip, "-n", world.relay, "tuntap", "delete", name, "mode", "tap")
            ip("-n", world.relay, "link", "set", name, "up")
        with replace(world, devices=tuple(names)).starts(xdp="require") as relay:
            relay.logs("what comes in elsewhere leaves here by the sockets: Argument list too long")
            relay.logs("xdp: the kernel relays channels at tap0 (native)")


@contextmanager
def with_bridge(world: World) -> Iterator[None]:
    ip("-n", world.relay, "link", "add", "bridge0", "type", "bridge")
    try:
        ip("-n", world.relay, "link", "set", "bridge0", "up")
        yield
    finally:
        ip("-n", world.relay, "link", "delete", "bridge0")


def test_without_a_device_it_says_what_to_name(world: World) -> None:
    """In this namespace there is none but lo."""
    with ExitStack() as stack:
        (alone,) = namespaces(stack, "alone")
        here = replace(world, relay=alone, devices=(), relay_hosts={Family.IPV4: "127.0.0.1"})
        relay = stack.enter_context(here.starts(xdp="auto"))
        relay.logs("xdp: there is no Ethernet device for it; --xdp-device names one; the sockets")
