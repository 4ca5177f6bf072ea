"""DSCP and ECN through real sockets: what was read with a datagram, and what it is sent with."""

import ctypes
import fcntl
import os
import platform
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from relay.net.listening import ListeningSocket, WildcardSocket, adopt
from relay.net.offload import Offload
from relay.net.reactor import Reactor
from relay.net.tos import CopyTos, report_tos
from relay.net.udp import (
    MAX_SINGLE_READS,
    SAMPLED_BURSTS,
    SEGMENTED_BUDGET,
    PortSocket,
    Shared,
    UdpDestination,
    bind_udp,
)
from tests.netns import ip, prefixed
from tests.turnclient import TIMEOUT

SOL_UDP, UDP_SEGMENT, UDP_GRO = 17, 103, 104  # <linux/udp.h>
IP_RECVTOS = 13  # <linux/in.h>
WILDCARDS = {"127.0.0.1": "0.0.0.0", "::1": "::"}
ECT_0, ECT_1, CE, EF = 0b10, 0b01, 0b11, 46 << 2

every_host = pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
every_kind = pytest.mark.parametrize("kind", ["port", "bound", "wildcard"])


class Reading:
    """A socket under test, and the octet of each datagram that it handed over."""

    def __init__(
        self, kind: str, host: str, stack: ExitStack, copy_tos: CopyTos, *, offload: bool = True
    ) -> None:
        self.kind = kind
        sock = stack.enter_context(bind_udp(WILDCARDS[host] if kind == "wildcard" else host, 0, 0))
        self.address = (host, sock.getsockname()[1])
        self._buffer = memoryview(bytearray(65535))
        shared = Shared(self._buffer, pytest.fail, Offload(wanted=offload), copy_tos)
        self.under_test: PortSocket | ListeningSocket
        if kind == "port":
            reactor = Reactor()
            stack.callback(reactor.close)
            self.under_test = PortSocket(sock, shared, self, reactor)
        elif kind == "bound":
            self.under_test = ListeningSocket(sock, shared, self)
        else:
            self.under_test = WildcardSocket(sock, shared, self)
        self.octets: list[int] = []
        self.sources: list[Any] = []
        self.segmented = 0

    def reads(self) -> list[int]:
        """Read all there is, and return what has come since the last time."""
        self.octets = []
        while self.under_test.reader.on_readable():
            pass
        return self.octets

    def reach(self, address: Any) -> UdpDestination:
        if self.kind == "port":
            return self.under_test.reach(address)
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        local = socket.inet_pton(family, address[0]) if self.kind == "wildcard" else b""
        return self.under_test.reach((address, local))

    def on_datagram(self, _size: int, source: Any, tos: int = 0) -> None:
        self.octets.append(tos)
        self.sources.append(source)

    def on_segments(self, size: int, segment: int, source: Any, tos: int = 0) -> int:
        self.octets += [tos] * -(-size // segment)
        self.sources.append(source)
        self.segmented += 1
        return 0


class Plain:
    """A socket of somebody else's, which marks what it sends, and looks at what it receives."""

    def __init__(self, host: str, stack: ExitStack) -> None:
        self.family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket = stack.enter_context(socket.socket(self.family, socket.SOCK_DGRAM))
        self.socket.bind((host, 0))
        self.socket.settimeout(10)
        report_tos(self.socket, wanted=True)

    def sends(self, to: Any, *octets: int, size: int = 100) -> None:
        for octet in octets:
            self.socket.sendmsg([bytes(size)], [self._mark(octet)], 0, to)

    def sends_segments(self, to: Any, octet: int, count: int, size: int = 100) -> None:
        control = [self._mark(octet), (SOL_UDP, UDP_SEGMENT, struct.pack("H", size))]
        self.socket.sendmsg([bytes(size * count)], control, 0, to)

    def receives(self) -> tuple[bytes, int]:
        """A datagram and its octet."""
        datagram, control, _, _ = self.socket.recvmsg(65535, 100)
        ((_, _, octet),) = control
        return datagram, octet[0] or octet[-1]  # of one byte, or of four in either order

    def _mark(self, octet: int) -> tuple[int, int, bytes]:
        if self.family == socket.AF_INET:
            return socket.IPPROTO_IP, socket.IP_TOS, bytes([octet])
        return socket.IPPROTO_IPV6, socket.IPV6_TCLASS, struct.pack("i", octet)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


# --- Reading ---------------------------------------------------------------------------------


@every_host
@every_kind
def test_the_octet_comes_with_each_datagram(kind: str, host: str, stack: ExitStack) -> None:
    reading, plain = Reading(kind, host, stack, "on"), Plain(host, stack)
    octets = [0, ECT_0, ECT_1, CE, EF, EF | CE, 255, 0, 0]

    plain.sends(reading.address, *octets)
    assert reading.reads() == octets
    for octet in octets:  # one by one, too
        plain.sends(reading.address, octet)
        assert reading.reads() == [octet]

    source = plain.socket.getsockname()
    family = plain.family
    expected = {
        "port": source[:2],
        "bound": (source, b""),
        "wildcard": (source, socket.inet_pton(family, host)),
    }
    assert set(reading.sources) == {expected[kind]}


@every_host
@every_kind
def test_segments_have_one_together(kind: str, host: str, stack: ExitStack) -> None:
    """They are read as segments from the start, for the control messages are read anyway."""
    reading, plain = Reading(kind, host, stack, "on"), Plain(host, stack)

    plain.sends_segments(reading.address, EF | ECT_0, 5)
    plain.sends_segments(reading.address, 0, 3)
    plain.sends(reading.address, CE)

    assert reading.reads() == [EF | ECT_0] * 5 + [0] * 3 + [CE]
    assert reading.segmented == 2
    assert len(set(reading.sources)) == 1


@every_host
@every_kind
@pytest.mark.parametrize("copy_tos", ["auto", "on"])
def test_so_it_is_without_offload(
    kind: str, host: str, copy_tos: CopyTos, stack: ExitStack
) -> None:
    reading = Reading(kind, host, stack, copy_tos, offload=False)
    plain = Plain(host, stack)

    plain.sends_segments(reading.address, CE, 5)

    assert reading.reads() == [CE] * 5


@every_host
@every_kind
def test_off_is_off(kind: str, host: str, stack: ExitStack) -> None:
    reading, plain = Reading(kind, host, stack, "off"), Plain(host, stack)
    for _ in range(3):
        plain.sends(reading.address, *[CE] * 40)
        assert reading.reads() == [0] * 40
        plain.sends_segments(reading.address, CE, 40)
        assert reading.reads() == [0] * 40


def test_a_socket_that_was_handed_over_reports_what_we_want(stack: ExitStack) -> None:
    """Systemd hands it from one process to the next, with its options."""
    sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sock.bind(("127.0.0.1", 0))
    for copy_tos in ("on", "off", "auto"):
        shared = Shared(memoryview(bytearray(100)), pytest.fail, Offload(wanted=True), copy_tos)
        adopt(sock, shared, Reading("port", "127.0.0.1", stack, "off"))
        reports = sock.getsockopt(socket.IPPROTO_IP, IP_RECVTOS)
        assert reports == (copy_tos != "off")


# --- Finding out if it is worth reading ------------------------------------------------------


@every_host
@pytest.mark.parametrize("kind", ["port", "bound"])
def test_the_first_datagram_of_all_is_looked_at(kind: str, host: str, stack: ExitStack) -> None:
    reading, plain = Reading(kind, host, stack, "auto"), Plain(host, stack)
    for octet in (ECT_0, ECT_0, 0, CE, 0, 0, EF):
        plain.sends(reading.address, octet)
        assert reading.reads() == [octet]


@every_host
@pytest.mark.parametrize("kind", ["port", "bound"])
def test_marks_that_begin_later_are_found_soon_and_then_none_is_lost(
    kind: str, host: str, stack: ExitStack
) -> None:
    """Also if the datagrams come one at a time."""
    reading, plain = Reading(kind, host, stack, "auto"), Plain(host, stack)
    for _ in range(100):
        plain.sends(reading.address, 0)
        assert reading.reads() == [0]
    found = []
    for _ in range(100):
        plain.sends(reading.address, ECT_0)
        found += reading.reads()

    lost = found.index(ECT_0)
    assert lost <= MAX_SINGLE_READS + 1
    assert found == [0] * lost + [ECT_0] * (100 - lost)


@every_host
@pytest.mark.parametrize("kind", ["port", "bound"])
@pytest.mark.parametrize("count", [2, 8, 40])
def test_marks_of_datagrams_that_come_together_are_found_soon_too(
    kind: str, host: str, count: int, stack: ExitStack
) -> None:
    reading = Reading(kind, host, stack, "auto", offload=False)
    plain, other = Plain(host, stack), Plain(host, stack)
    for _ in range(5):
        plain.sends(reading.address, *[0] * (count - 1))
        other.sends(reading.address, 0)
        assert reading.reads() == [0] * count

    found = []
    for _ in range(SAMPLED_BURSTS + 1):
        plain.sends(reading.address, *[CE] * count)
        found += reading.reads()

    lost = found.index(CE)
    assert lost <= (SAMPLED_BURSTS - 1) * count
    assert found[lost:] == [CE] * (len(found) - lost)


@every_host
@pytest.mark.parametrize("kind", ["port", "bound"])
def test_once_segments_are_read_their_octet_costs_nothing(
    kind: str, host: str, stack: ExitStack
) -> None:
    reading, plain = Reading(kind, host, stack, "auto"), Plain(host, stack)
    plain.sends(reading.address, *[0] * 40)  # a burst
    reading.reads()
    plain.sends_segments(reading.address, 0, 10)
    plain.sends_segments(reading.address, ECT_1, 10)
    plain.sends(reading.address, CE, 0, EF)

    assert reading.reads() == [0] * 10 + [ECT_1] * 10 + [CE, 0, EF]
    assert reading.segmented == 2


def test_what_is_read_as_segments_counts_against_the_budget(stack: ExitStack) -> None:
    reading, plain = Reading("port", "127.0.0.1", stack, "on"), Plain("127.0.0.1", stack)
    for _ in range(SEGMENTED_BUDGET + 1):
        plain.sends_segments(reading.address, ECT_0, 10)

    reading.under_test.reader.on_readable()

    assert reading.segmented == SEGMENTED_BUDGET


# --- Sending ---------------------------------------------------------------------------------


@every_host
@every_kind
def test_what_is_sent_has_the_octet_that_was_asked_for(
    kind: str, host: str, stack: ExitStack
) -> None:
    """And what is sent after it has none, if none was asked for."""
    reading, plain = Reading(kind, host, stack, "off"), Plain(host, stack)
    destination = reading.reach(plain.socket.getsockname())
    for octet in (0, ECT_0, CE, EF | ECT_1, 0, 255, 0):
        assert destination.send(b"hi", octet)
        assert plain.receives() == (b"hi", octet)
        assert destination.send_many([b"on", b"e", b"two"], 1, 2, octet) == 3
        assert [plain.receives() for _ in range(3)] == [
            (part, octet) for part in (b"on", b"et", b"wo")
        ]
        assert destination.send(b"hi")
        assert plain.receives() == (b"hi", 0)


# --- Between the network and the socket ------------------------------------------------------

HERE = {socket.AF_INET: "198.51.100.1", socket.AF_INET6: "2001:db8:1::1"}
THERE = {socket.AF_INET: "198.51.100.2", socket.AF_INET6: "2001:db8:1::2"}
SIOCETHTOOL = 0x8946  # <linux/sockios.h>
ETHTOOL_STSO, ETHTOOL_SGRO = 0x1F, 0x2C  # <linux/ethtool.h>
SENT = [EF, ECT_0, ECT_0, ECT_0, CE, CE, ECT_0, ECT_0, CE, ECT_1, ECT_1, 0, 0, EF]
SEND = """
import socket, sys
host, port, level, kind, *octets = sys.argv[1:]
with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
    for octet in map(int, octets):
        control = (int(level), int(kind), octet.to_bytes(4, sys.byteorder))
        sock.sendmsg([bytes([octet]) * 100], [control], 0, (host, int(port)))
"""


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None,
    reason="making a network namespace takes root and iproute2",
)
@pytest.mark.skipif(
    tuple(map(int, platform.release().split(".")[:2])) < (6, 10),
    reason="older kernels may join datagrams of different octets",
)
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def test_the_kernel_joins_no_datagrams_of_different_octets(
    family: socket.AddressFamily, stack: ExitStack
) -> None:
    """Or a CE would be lost among those that it did not happen to.

    The veth is set up so that it joins what is sent singly, and waits for more of it.
    """
    name, ours, theirs = f"tos-{os.getpid()}", f"ut{os.getpid()}", f"uh{os.getpid()}"
    ip("netns", "add", name)
    stack.callback(ip, "netns", "delete", name)
    ip("link", "add", theirs, "type", "veth", "peer", "name", ours)
    stack.callback(ip, "link", "delete", ours)
    set_feature(theirs, ETHTOOL_STSO, wanted=False)
    set_feature(ours, ETHTOOL_SGRO, wanted=True)
    Path(f"/sys/class/net/{ours}/gro_flush_timeout").write_text("300000000")  # ns
    ip("link", "set", theirs, "netns", name)
    for where, host, device in (((), HERE, ours), (("-n", name), THERE, theirs)):
        ip(*where, "address", "add", *prefixed(host[family]), "dev", device)
        ip(*where, "link", "set", device, "up")
    receiver = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
    receiver.bind((HERE[family], 0))
    receiver.settimeout(10)
    receiver.setsockopt(SOL_UDP, UDP_GRO, 1)
    report_tos(receiver, wanted=True)

    level, kind = {
        socket.AF_INET: (socket.IPPROTO_IP, socket.IP_TOS),
        socket.AF_INET6: (socket.IPPROTO_IPV6, socket.IPV6_TCLASS),
    }[family]
    arguments = map(str, (*receiver.getsockname()[:2], level, kind, *SENT))
    subprocess.run(
        ["ip", "netns", "exec", name, sys.executable, "-c", SEND, *arguments],
        check=True,
        timeout=TIMEOUT,
    )

    received: list[int] = []
    reads = 0
    while len(received) < len(SENT):
        datagrams, control, _, _ = receiver.recvmsg(65535, 100)
        octets = list(datagrams[::100])
        octet = control[-1][2]
        assert set(octets) == {octet[0] or octet[-1]}
        received += octets
        reads += 1
    assert received == SENT
    assert reads < len(SENT)


def set_feature(device: str, command: int, *, wanted: bool) -> None:
    """Do what ``ethtool -K`` does."""
    value = ctypes.create_string_buffer(struct.pack("II", command, wanted))
    request = struct.pack("16sP16x", device.encode(), ctypes.addressof(value))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, SIOCETHTOOL, request)
