"""DSCP and ECN through a running relay, and from one family to the other."""

import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from relay.net.tos import report_tos
from relay.net.udp import LOOKS
from relay.stun.const import Family, Kind, Method
from relay.stun.message import Message
from relay.turn.channeldata import HEADER
from tests.process import RelayProcess, Stopped, free_port
from tests.turnclient import TIMEOUT, TurnClient

SOL_UDP, UDP_SEGMENT = 17, 103  # <linux/udp.h>
NUMBER = 0x4000
COUNT = 20
LOOPBACK = {Family.IPV4: "127.0.0.1", Family.IPV6: "::1"}
ECT_0, CE, EF = 0b10, 0b11, 46 << 2
MARKS = {
    Family.IPV4: (socket.IPPROTO_IP, socket.IP_TOS),
    Family.IPV6: (socket.IPPROTO_IPV6, socket.IPV6_TCLASS),
}

every_family = pytest.mark.parametrize(
    "families",
    [(client, peer) for client in Family for peer in Family],
    ids=lambda families: "-".join(family.name for family in families),
)


@pytest.fixture(scope="module", params=["auto", "on"])
def relay(request: pytest.FixtureRequest) -> Iterator[RelayProcess]:
    with RelayProcess(f"--copy-tos={request.param}", port=free_port()) as process:
        yield process


@every_family
def test_what_is_relayed_keeps_its_octet(
    relay: RelayProcess, families: tuple[Family, Family]
) -> None:
    """The flow is ECN-capable, as a tunnel's is; then a router on the way marks one."""
    with ExitStack() as stack:
        ends = Ends(relay, *families, stack)
        for octet in (ECT_0, ECT_0, EF | CE, ECT_0, 0, EF):
            assert ends.sends_to_peer(octet) == octet
            assert ends.sends_to_client(octet) == octet


@every_family
def test_so_do_segments(relay: RelayProcess, families: tuple[Family, Family]) -> None:
    with ExitStack() as stack:
        ends = Ends(relay, *families, stack)
        for octet in (ECT_0, CE, EF):
            with Stopped(relay):
                ends.sends_segments(octet)
            for sock in (ends.client.socket, ends.peer):
                assert [octet_of(sock) for _ in range(COUNT)] == [octet] * COUNT


@pytest.mark.parametrize("family", Family, ids=lambda family: family.name)
def test_an_answer_has_none(relay: RelayProcess, family: Family) -> None:
    """It is no part of the flow."""
    with ExitStack() as stack:
        ends = Ends(relay, family, family, stack)
        assert ends.sends_to_peer(EF) == EF
        request = Message(Kind.REQUEST, Method.BINDING, b"transaction!")
        send(ends.client.socket, family, EF | CE, [request.encode()])

        assert octet_of(ends.client.socket) == 0


def test_the_first_mark_of_a_flow_is_kept_even_if_what_came_before_it_had_none() -> None:
    """Of each socket by itself: nothing was marked before."""
    with RelayProcess(port=free_port()) as fresh, ExitStack() as stack:
        for client in Family:
            ends = Ends(fresh, client, Family.IPV4, stack)
            for _ in range(LOOKS - 1):
                assert ends.sends_to_peer(0) == ends.sends_to_client(0) == 0
            assert ends.sends_to_peer(EF) == ends.sends_to_client(EF) == EF


def test_off_is_off() -> None:
    with RelayProcess("--copy-tos=off", port=free_port()) as relay, ExitStack() as stack:
        ends = Ends(relay, Family.IPV4, Family.IPV6, stack)
        for _ in range(3):
            assert ends.sends_to_peer(EF | CE) == 0
            assert ends.sends_to_client(EF | CE) == 0


class Ends:
    """A client and a peer, perhaps of different families."""

    def __init__(self, relay: RelayProcess, client: Family, peer: Family, stack: ExitStack) -> None:
        self._families = client, peer
        self.client = stack.enter_context(
            TurnClient((LOOPBACK[client], relay.port), relay.username, relay.password)
        )
        self.peer = stack.enter_context(
            socket.socket(
                socket.AF_INET6 if peer is Family.IPV6 else socket.AF_INET, socket.SOCK_DGRAM
            )
        )
        self.peer.bind((LOOPBACK[peer], 0))
        self.peer.settimeout(TIMEOUT)
        self.peer.connect(self.client.allocates(peer))
        self.client.binds(NUMBER, self.peer.getsockname()[:2])
        for sock in (self.client.socket, self.peer):
            report_tos(sock, wanted=True)

    def sends_to_peer(self, octet: int) -> int:
        """Send with that octet; return the one that it arrives with."""
        send(self.client.socket, self._families[0], octet, [HEADER.pack(NUMBER, 2) + b"hi"])
        return octet_of(self.peer)

    def sends_to_client(self, octet: int) -> int:
        """Do the same in the other direction."""
        send(self.peer, self._families[1], octet, [b"hi"])
        return octet_of(self.client.socket)

    def sends_segments(self, octet: int) -> None:
        """Send many, in both directions."""
        frame = HEADER.pack(NUMBER, 100) + bytes(100)
        send(self.client.socket, self._families[0], octet, [frame] * COUNT)
        send(self.peer, self._families[1], octet, [bytes(100)] * COUNT)


def send(sock: socket.socket, family: Family, octet: int, datagrams: list[bytes]) -> None:
    mark = (*MARKS[family], struct.pack("i", octet))
    segment = (SOL_UDP, UDP_SEGMENT, struct.pack("H", len(datagrams[0])))
    sock.sendmsg(datagrams, [mark, segment] if len(datagrams) > 1 else [mark])


def octet_of(sock: socket.socket) -> int:
    """The octet with which the next datagram arrives."""
    _, ((_, _, octet),), _, _ = sock.recvmsg(65535, 100)
    return octet[0] or octet[-1]  # of one byte, or of four in either order
