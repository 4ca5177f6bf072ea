"""What 32 datagrams cost at the sockets: waking up for them, reading them, sending them.

Compare one by one with segments (GRO, GSO), and the kinds of sockets with each other: the one on a
wildcard address has to learn and to say which of our addresses was asked. All is loopback,
where a send includes the kernel putting the datagram into the queue of who reads it.
"""

import struct
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Final

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from relay.net.listening import ListeningSocket, WildcardSocket
from relay.net.offload import Offload
from relay.net.reactor import Reactor
from relay.net.udp import READ_BUDGET, PortSocket, Shared, UdpDestination, bind_udp

COUNT: Final = READ_BUDGET
ROUNDS: Final = {"rounds": 500, "warmup_rounds": 5}

every_kind = pytest.mark.parametrize("kind", ["port", "bound", "wildcard"])
every_size = pytest.mark.parametrize("size", [160, 1200])


def test_wake_up(benchmark: BenchmarkFixture, ends: "Ends") -> None:
    """An iteration of the reactor for one readable socket, whose handler does nothing."""
    reactor = Reactor()
    reactor.register(ends.outside, lambda: None)
    ends.sends_to(ends.outside.getsockname(), 1, 160)
    benchmark(reactor.iterate)
    reactor.close()


@every_kind
@every_size
def test_read_single_datagrams(
    benchmark: BenchmarkFixture, ends: "Ends", kind: str, size: int
) -> None:
    sock = ends.opens(kind, offload=False)
    benchmark.pedantic(  # type: ignore[no-untyped-call]
        sock.reader.on_readable, setup=partial(ends.sends, COUNT, size), **ROUNDS
    )
    assert ends.reads == {1}


@every_kind
@every_size
def test_read_segments(benchmark: BenchmarkFixture, ends: "Ends", kind: str, size: int) -> None:
    """One read, and another one to see that there is no more."""
    sock = ends.opens(kind)
    ends.sends(COUNT, size)  # GRO is off before a burst
    sock.reader.on_readable()
    ends.reads.clear()
    benchmark.pedantic(  # type: ignore[no-untyped-call]
        sock.reader.on_readable, setup=partial(ends.sends_segments, COUNT, size), **ROUNDS
    )
    assert ends.reads == {COUNT}


@every_kind
@every_size
def test_send_single_datagrams(
    benchmark: BenchmarkFixture, ends: "Ends", kind: str, size: int
) -> None:
    outside = ends.reaches_outside(kind)
    datagram = memoryview(bytes(size))

    def send() -> None:
        for _ in range(COUNT):
            outside.send(datagram)

    benchmark.pedantic(send, setup=ends.drain, **ROUNDS)  # type: ignore[no-untyped-call]


@every_kind
@every_size
def test_send_segments(benchmark: BenchmarkFixture, ends: "Ends", kind: str, size: int) -> None:
    """To someone who reads it one by one."""
    outside = ends.reaches_outside(kind)
    pieces: list[memoryview | bytes] = [memoryview(bytes(size))] * COUNT
    benchmark.pedantic(  # type: ignore[no-untyped-call]
        partial(outside.send_many, pieces, 1, size), setup=ends.drain, **ROUNDS
    )


class Ends:
    """A socket of each kind, as it is wanted, and one outside."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._buffer = memoryview(bytearray(65535))
        self.outside = stack.enter_context(bind_udp("127.0.0.1", 0, 4 << 20))
        self.reads: set[int] = set()  # how many datagrams were read at once

    def opens(self, kind: str, *, offload: bool = True) -> PortSocket | ListeningSocket:
        """Open a socket to be measured."""
        host = "0.0.0.0" if kind == "wildcard" else "127.0.0.1"
        sock = self._stack.enter_context(bind_udp(host, 0, 4 << 20))
        self._address = ("127.0.0.1", sock.getsockname()[1])
        shared = Shared(self._buffer, fail, Offload(wanted=offload))
        if kind == "port":
            reactor = Reactor()
            self._stack.callback(reactor.close)
            return PortSocket(sock, shared, self, reactor)
        if kind == "bound":
            return ListeningSocket(sock, shared, self)
        return WildcardSocket(sock, shared, self)

    def reaches_outside(self, kind: str) -> UdpDestination:
        """Open a socket to be measured, and return how it reaches the one outside."""
        sock, address = self.opens(kind), self.outside.getsockname()
        if kind == "port":
            return sock.reach(address)
        return sock.reach((address, bytes([127, 0, 0, 1]) if kind == "wildcard" else b""))

    def sends(self, count: int, size: int) -> None:
        """Send single datagrams to the socket that was opened."""
        self.sends_to(self._address, count, size)

    def sends_to(self, address: tuple[str, int], count: int, size: int) -> None:
        """Send single datagrams."""
        for _ in range(count):
            self.outside.sendto(bytes(size), address)

    def sends_segments(self, count: int, size: int) -> None:
        """Send segments to the socket that was opened."""
        segment = (17, 103, struct.pack("H", size))  # SOL_UDP, UDP_SEGMENT
        self.outside.sendmsg([bytes(size * count)], [segment], 0, self._address)

    def drain(self) -> None:
        """Read what was sent outside."""
        try:
            while True:
                self.outside.recv_into(self._buffer)
        except BlockingIOError:
            pass

    def on_datagram(self, _size: int, _source: object, _tos: int = 0) -> None:
        """Note a single datagram."""
        self.reads.add(1)

    def on_segments(self, size: int, segment: int, _source: object, _tos: int = 0) -> int:
        """Note how many came at once."""
        self.reads.add(size // segment)
        return 0


@pytest.fixture
def ends() -> Iterator[Ends]:
    with ExitStack() as stack:
        yield Ends(stack)


def fail(what: str) -> None:
    raise AssertionError(what)
