"""ICMP errors on real sockets: each is told once, and none of them costs a datagram."""

import os
import select
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import pytest

from relay.net.icmp import AT_ONCE
from relay.net.offload import Offload
from relay.net.reactor import Reactor
from relay.net.udp import PortSocket, Shared, bind_udp
from relay.turn.indications import Icmp

HOSTS = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
PORT_UNREACHABLE = {socket.AF_INET: (3, 3, 0), socket.AF_INET6: (1, 4, 0)}
DF: Final = 0x4000  # in the sixth and seventh byte of an IPv4 header
LOOPBACK_MTU: Final = 65536

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="raw sockets take root")


@pytest.fixture(params=HOSTS, ids=lambda family: family.name)
def port(request: pytest.FixtureRequest) -> Iterator["Port"]:
    port = Port(request.param)
    yield port
    port.close()


def test_an_error_is_told_with_the_address_that_was_sent_to(port: "Port") -> None:
    port.asks_for_errors()
    nobody = port.nobody()

    assert port.socket.reach(nobody).send(b"to nobody")
    port.serve_until(lambda: len(port.errors) == 1)
    assert port.errors == [(nobody[:2], PORT_UNREACHABLE[port.family])]
    assert port.is_quiet()
    assert not port.lost


def test_nobody_hears_of_errors_who_has_not_asked(port: "Port") -> None:
    nobody, somebody = port.nobody(), port.somebody()
    for _ in range(3):
        assert port.socket.reach(nobody).send(b"to nobody")
        assert port.socket.reach(somebody.getsockname()).send(b"to somebody")

    assert port.is_quiet()
    assert [somebody.recv(100) for _ in range(3)] == [b"to somebody"] * 3
    assert not port.lost


def test_an_error_does_not_cost_the_next_datagram_that_is_sent(port: "Port") -> None:
    """Linux lets the next system call on the socket fail for it, whoever that is about."""
    port.asks_for_errors()
    nobody, somebody = port.socket.reach(port.nobody()), port.somebody()
    to_somebody = port.socket.reach(somebody.getsockname())
    for number in range(20):  # on loopback the error is there when send() returns
        assert nobody.send(b"to nobody")
        assert to_somebody.send(bytes([number]))
        assert nobody.send(b"to nobody, with DSCP", 0xB8)
        assert to_somebody.send(bytes([100 + number]), 0xB8)

    arrived = [somebody.recv(100)[0] for _ in range(40)]
    assert arrived == [at + number for number in range(20) for at in (0, 100)]
    port.serve_until(lambda: len(port.errors) == 40)
    assert port.is_quiet()
    assert not port.lost


def test_an_error_does_not_cost_the_next_datagram_that_is_read(port: "Port") -> None:
    port.asks_for_errors()
    nobody, somebody = port.socket.reach(port.nobody()), port.somebody()
    for number in range(20):
        assert nobody.send(b"to nobody")
        somebody.sendto(bytes([number]), port.address)

    port.serve_until(lambda: len(port.received) == 20)
    port.serve_until(lambda: bool(port.errors))
    assert port.received == [bytes([number]) for number in range(20)]
    assert port.is_quiet()
    assert not port.lost


def test_an_error_does_not_cost_segments(port: "Port") -> None:
    port.asks_for_errors()
    nobody, somebody = port.socket.reach(port.nobody()), port.somebody()
    to_somebody = port.socket.reach(somebody.getsockname())
    assert nobody.send(b"to nobody")
    pieces: list[memoryview | bytes] = [bytes([number]) * 10 for number in range(5)]
    sent = to_somebody.send_many(pieces, 1, 10)
    for piece in pieces[sent:]:  # as whoever calls it does
        assert to_somebody.send(piece)

    assert [somebody.recv(100) for _ in range(5)] == pieces
    port.serve_until(lambda: len(port.errors) == 1)
    assert port.is_quiet()


def test_many_errors_are_read_in_portions_until_none_is_left(port: "Port") -> None:
    """Others are to be served meanwhile; and the loop must not spin when all is read."""
    port.asks_for_errors()
    nobody = port.nobody()
    for _ in range(3 * AT_ONCE):
        port.sock.sendto(b"to nobody", socket.MSG_DONTWAIT, nobody)
        with pytest.raises(OSError, match="refused"):  # which takes the failure, not the entry
            port.sock.sendto(b"to nobody", socket.MSG_DONTWAIT, nobody)

    for already in (0, AT_ONCE, 2 * AT_ONCE):
        assert len(port.errors) == already
        port.serve_until(lambda already=already: len(port.errors) > already)
    assert port.is_quiet()


def test_a_datagram_that_is_too_big_for_our_own_interface_is_told_of() -> None:
    """Over IPv4 no datagram is too big for loopback; with the header of IPv6 this one is."""
    port = Port(socket.AF_INET6)
    port.asks_for_errors()
    somebody = port.somebody()
    way = port.socket.reach(somebody.getsockname())

    assert not way.send_whole(bytes(LOOPBACK_MTU - 47))
    assert port.lost == {"send_emsgsize": 1}
    assert {*port.errors} == {(somebody.getsockname()[:2], (2, 0, LOOPBACK_MTU))}
    assert way.send_whole(b"small")
    assert somebody.recv(100) == b"small"
    assert port.is_quiet()
    port.close()


@needs_root
def test_df_is_set_for_whole_datagrams_only() -> None:
    port = Port(socket.AF_INET)
    somebody = port.somebody()
    way = port.socket.reach(somebody.getsockname())
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP) as raw:
        raw.bind(("127.0.0.1", 0))
        raw.settimeout(10)
        flags = {}
        for send, payload in ((way.send, b"1"), (way.send_whole, b"2"), (way.send, b"3")):
            assert send(payload)
            while payload not in flags:  # others use loopback, too
                packet = raw.recv(65536)
                if int.from_bytes(packet[20:22], "big") == port.address[1]:
                    flags[packet[28:]] = int.from_bytes(packet[6:8], "big") & DF
    port.close()

    assert flags == {b"1": 0, b"2": DF, b"3": 0}


class Port:
    """A relay port that takes what comes, in a loop of its own."""

    def __init__(self, family: socket.AddressFamily) -> None:
        self.family = family
        self.received: list[bytes] = []
        self.errors: list[tuple[Any, Icmp]] = []
        self.lost: Counter[str] = Counter()
        self._reactor = Reactor(on_bug=self._on_bug)
        self._buffer = bytearray(65536)
        self.sock = bind_udp(HOSTS[family], 0, 1 << 20)
        self.address = self.sock.getsockname()
        shared = Shared(memoryview(self._buffer), self._count, Offload(wanted=True))
        self.socket = PortSocket(self.sock, shared, self, self._reactor)
        self._others: list[socket.socket] = []

    def asks_for_errors(self) -> None:
        self.socket.report_errors(lambda peer, icmp: self.errors.append((peer, icmp)))

    def somebody(self) -> socket.socket:
        other = socket.socket(self.family, socket.SOCK_DGRAM)
        other.bind((HOSTS[self.family], 0))
        other.settimeout(10)
        self._others.append(other)
        return other

    def nobody(self) -> Any:
        """An address at which there is nobody: bound by a socket that hears another one only."""
        other = self.somebody()
        other.connect(other.getsockname())
        return other.getsockname()

    def serve_until(self, done: Any) -> None:
        deadline = self._reactor.clock() + 10
        while not done():
            assert self._reactor.clock() < deadline
            self._reactor.call_at(deadline, self._reactor.stop)
            self._reactor.iterate()

    def is_quiet(self) -> bool:
        """Tell if nothing would wake the loop up."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return not poll.poll(0)

    def on_datagram(self, size: int, _source: Any, _tos: int = 0) -> None:
        self.received.append(bytes(self._buffer[:size]))

    def on_segments(self, *_: object) -> int:
        raise AssertionError("segments")

    def close(self) -> None:
        self.socket.close()
        self._reactor.close()
        for other in self._others:
            other.close()

    def _count(self, reason: str) -> None:
        self.lost[reason] += 1

    def _on_bug(self, error: Exception) -> None:
        raise error
