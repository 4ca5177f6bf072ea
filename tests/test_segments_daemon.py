"""Segments (GRO, GSO) through a running relay, on loopback and through a veth."""

import os
import shutil
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from relay.stun.const import Family
from relay.turn.channeldata import HEADER
from tests.netns import ip, prefixed
from tests.process import RelayProcess, Stopped, free_port, wait_until_read
from tests.turnclient import TIMEOUT, TurnClient

SOL_UDP, UDP_SEGMENT, UDP_GRO = 17, 103, 104  # <linux/udp.h>
NUMBER = 0x4000
COUNT = 32
LOOPBACK = {Family.IPV4: "127.0.0.1", Family.IPV6: "::1"}
BOUND = ("--bind-ip4-addr=127.0.0.1", "--bind-ip6-addr=::1")

every_family = pytest.mark.parametrize("family", Family, ids=lambda family: family.name)


@pytest.fixture(scope="module", params=[(), BOUND], ids=["wildcard", "bound"])
def relay(request: pytest.FixtureRequest) -> Iterator[RelayProcess]:
    with RelayProcess(*request.param, port=free_port()) as process:
        yield process


@every_family
@pytest.mark.parametrize("size", [160, 1200])
def test_segments_are_the_same_datagrams_behind_the_relay(
    relay: RelayProcess, family: Family, size: int
) -> None:
    """The last is shorter. The relay turns GRO on once it has seen a burst."""
    with ExitStack() as stack:
        ends = Ends(relay, family, LOOPBACK[family], stack)
        for number in range(3):
            payloads = [bytes([number, index]) * (size // 2) for index in range(COUNT)]
            payloads.append(b"short")
            with Stopped(relay):
                ends.sends(payloads, both_ways=True)

            assert [ends.peer.recv(65535) for _ in payloads] == payloads
            assert [ends.client.receives() for _ in payloads] == [
                (NUMBER, payload) for payload in payloads
            ]


@every_family
def test_segments_stay_together(relay: RelayProcess, family: Family) -> None:
    """With GRO at both ends, what was sent in one call is received in one read."""
    with ExitStack() as stack:
        ends = Ends(relay, family, LOOPBACK[family], stack)
        payloads = [bytes([index]) * 1000 for index in range(COUNT)]
        for _ in range(2):  # in the second it still reads what was queued before it had GRO
            with Stopped(relay):
                ends.sends(payloads, both_ways=True)
            for _ in payloads:
                ends.peer.recv(65535)
                ends.client.receives()
        ends.enable_gro()

        ends.sends(payloads, both_ways=True)

        assert ends.peer.recv(65535) == b"".join(payloads)
        assert ends.client.socket.recv(65535) == b"".join(map(framed, payloads))


def test_without_offload_datagrams_go_one_by_one() -> None:
    with RelayProcess("--offload=off", port=free_port()) as relay, ExitStack() as stack:
        ends = Ends(relay, Family.IPV4, "127.0.0.1", stack)
        ends.enable_gro()
        payloads = [bytes([index]) * 1000 for index in range(COUNT)]
        for _ in range(2):
            ends.sends(payloads, both_ways=True)
            assert [ends.peer.recv(65535) for _ in payloads] == payloads
            assert [ends.client.socket.recv(65535) for _ in payloads] == [*map(framed, payloads)]


def test_before_the_portal_says_init_every_segment_counts_as_dropped() -> None:
    relay = RelayProcess(
        "--api-url=ws://127.0.0.1:9",  # where nobody listens
        port=free_port(),
        variables={"FIREZONE_TOKEN": "token"},
        portal=True,
    )
    with relay, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        relay.logs("waiting for the portal")
        client.connect(("127.0.0.5", relay.port))  # which only the wildcard socket serves
        send_segments(client, [b"x" * 100] * COUNT + [b"short"])
        wait_until_read(relay.port)
    assert f"{COUNT + 1} not_serving" in relay.errors()


# --- Through a veth, whose MTU is 1,500 bytes ------------------------------------------------

INSIDE = {Family.IPV4: "198.51.100.1", Family.IPV6: "2001:db8:1::1"}
OUTSIDE = {Family.IPV4: "198.51.100.10", Family.IPV6: "2001:db8:1::10"}
HEADERS = {Family.IPV4: 28, Family.IPV6: 48}  # IP and UDP


@pytest.fixture(scope="module")
def far_relay() -> Iterator[RelayProcess]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("making a network namespace takes root and iproute2")
    name, ours, theirs = f"segments-{os.getpid()}", f"tt{os.getpid()}", f"th{os.getpid()}"
    ip("netns", "add", name)
    try:
        ip("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", name)
        for family in Family:
            ip("-n", name, "address", "add", *prefixed(INSIDE[family]), "dev", theirs)
            ip("address", "add", *prefixed(OUTSIDE[family]), "dev", ours)
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "set", theirs, "up")
        ip("link", "set", ours, "up")
        arguments = [
            f"--public-ip4-addr={INSIDE[Family.IPV4]}",
            f"--public-ip6-addr={INSIDE[Family.IPV6]}",
            "--allow-peer=198.51.100.0/24,2001:db8:1::/64",
        ]
        within = ("ip", "netns", "exec", name)
        with RelayProcess(*arguments, port=free_port(), prefix=within, loopback=False) as process:
            yield process
    finally:
        ip("netns", "delete", name)  # and the veth with it


@every_family
def test_what_the_header_makes_longer_than_the_mtu_is_sent_one_by_one(
    far_relay: RelayProcess, family: Family
) -> None:
    """UDP_SEGMENT never makes fragments. The peer's datagrams just fit, the client's do not."""
    with ExitStack() as stack:
        ends = Ends(far_relay, family, INSIDE[family], stack, bind=OUTSIDE[family])
        for size in (1500 - HEADERS[family], 1000):
            payloads = [bytes([index]) * size for index in range(COUNT)]
            for _ in range(3):
                with Stopped(far_relay):
                    ends.sends(payloads)
                assert [ends.client.receives() for _ in payloads] == [
                    (NUMBER, payload) for payload in payloads
                ]
    assert "UDP_SEGMENT refuses datagrams of" in far_relay.logs("UDP_SEGMENT")


@every_family
def test_segments_to_a_peer_through_a_veth(far_relay: RelayProcess, family: Family) -> None:
    with ExitStack() as stack:
        ends = Ends(far_relay, family, INSIDE[family], stack, bind=OUTSIDE[family])
        payloads = [bytes([index]) * 1200 for index in range(COUNT)]
        for _ in range(3):
            with Stopped(far_relay):
                ends.sends(payloads, both_ways=True)
            assert [ends.peer.recv(65535) for _ in payloads] == payloads
            assert [ends.client.receives()[1] for _ in payloads] == payloads


class Ends:
    """A client and its peer, which send segments to each other."""

    def __init__(
        self,
        relay: RelayProcess,
        family: Family,
        server: str,
        stack: ExitStack,
        *,
        bind: str = "",
    ) -> None:
        self.client = stack.enter_context(
            TurnClient((server, relay.port), relay.username, relay.password)
        )
        self.peer = stack.enter_context(
            socket.socket(
                socket.AF_INET6 if family is Family.IPV6 else socket.AF_INET, socket.SOCK_DGRAM
            )
        )
        self.peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self.peer.bind((bind or server, 0))
        self.peer.settimeout(TIMEOUT)
        self.peer.connect(self.client.allocates(family))
        self.client.binds(NUMBER, self.peer.getsockname()[:2])

    def sends(self, payloads: list[bytes], *, both_ways: bool = False) -> None:
        send_segments(self.peer, payloads)
        if both_ways:
            send_segments(self.client.socket, [framed(payload) for payload in payloads])

    def enable_gro(self) -> None:
        """Receive in one read what was sent in one call."""
        for sock in (self.client.socket, self.peer):
            sock.setsockopt(SOL_UDP, UDP_GRO, 1)


def send_segments(sock: socket.socket, datagrams: list[bytes]) -> None:
    sock.sendmsg(datagrams, [(SOL_UDP, UDP_SEGMENT, struct.pack("H", len(datagrams[0])))])


def framed(payload: bytes) -> bytes:
    return HEADER.pack(NUMBER, len(payload)) + payload
