"""Segments through the kernel's UDP_GRO and UDP_SEGMENT, and without them where it refuses."""

import errno
import logging
import os
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from relay.net.listening import ListeningSocket, WildcardSocket, adopt
from relay.net.offload import Offload, SegmentSender
from relay.net.reactor import Reactor
from relay.net.udp import BURST, READ_BUDGET, SEGMENTED_BUDGET, PortSocket, Shared, bind_udp

SOL_UDP, UDP_SEGMENT, UDP_GRO = 17, 103, 104  # <linux/udp.h>
WILDCARDS = {"127.0.0.1": "0.0.0.0", "::1": "::"}
SIZE = 100
TO = ("192.0.2.10", 5000)

every_host = pytest.mark.parametrize("host", ["127.0.0.1", "::1"])


class Receiver:
    """A socket under test, and what it handed over. It reads when told to."""

    def __init__(self, kind: str, host: str, stack: ExitStack, *, offload: bool = True) -> None:
        self._buffer = bytearray(65535)
        self._sock = stack.enter_context(
            bind_udp(WILDCARDS[host] if kind == "wildcard" else host, 0, 4 << 20)
        )
        self.address = (host, self._sock.getsockname()[1])
        shared = Shared(memoryview(self._buffer), unexpected, Offload(wanted=offload))
        self.under_test: PortSocket | ListeningSocket
        if kind == "port":
            reactor = Reactor()
            stack.callback(reactor.close)
            self.under_test = PortSocket(self._sock, shared, self, reactor)
        elif kind == "bound":
            self.under_test = ListeningSocket(self._sock, shared, self)
        else:
            self.under_test = WildcardSocket(self._sock, shared, self)
        self.reads: list[int] = []  # how many datagrams each of them held
        self.handled_singly = 0  # what is said of the segments of each read
        self.datagrams: list[bytes] = []
        self.sources: set[Any] = set()

    def reads_once(self) -> list[int]:
        """Return how many datagrams each read held."""
        self.reads = []
        self.under_test.reader.on_readable()
        return self.reads

    def takes_all(self) -> list[int]:
        reads = []
        while select.select([self._sock], [], [], 0)[0]:
            reads += self.reads_once()
        return reads

    def on_datagram(self, size: int, source: Any, _tos: int = 0) -> None:
        self._take([bytes(self._buffer[:size])], source)

    def on_segments(self, size: int, segment: int, source: Any, _tos: int = 0) -> int:
        assert segment < size
        self._take(
            [bytes(self._buffer[at:size][:segment]) for at in range(0, size, segment)], source
        )
        return self.handled_singly

    def _take(self, datagrams: list[bytes], source: Any) -> None:
        self.reads.append(len(datagrams))
        self.datagrams += datagrams
        self.sources.add(source)


class Sender:
    """A plain socket, which can also send and receive segments."""

    def __init__(self, host: str, stack: ExitStack) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self.socket.bind((host, 0))
        self.socket.settimeout(10)
        self.sent: list[bytes] = []

    def sends(self, count: int, to: tuple[str, int], size: int = SIZE) -> None:
        for _ in range(count):
            self.sent.append(len(self.sent).to_bytes(size, "big"))
            self.socket.sendto(self.sent[-1], to)

    def sends_segments(
        self, count: int, to: tuple[str, int], size: int = SIZE, last: int = 0
    ) -> None:
        segments = [len(self.sent + [b""] * index).to_bytes(size, "big") for index in range(count)]
        segments += [b"x" * last] if last else []
        self.sent += segments
        self.socket.sendmsg(segments, [(SOL_UDP, UDP_SEGMENT, struct.pack("H", size))], 0, to)

    def receives(self, count: int) -> list[bytes]:
        return [self.socket.recv(65535) for _ in range(count)]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


# --- Receiving -------------------------------------------------------------------------------


@every_host
def test_a_wildcard_socket_reads_segments_from_the_start(host: str, stack: ExitStack) -> None:
    receiver, sender = Receiver("wildcard", host, stack), Sender(host, stack)

    sender.sends(1, receiver.address)
    sender.sends_segments(32, receiver.address, last=7)
    sender.sends(1, receiver.address)

    assert receiver.takes_all() == [1, 33, 1]
    assert receiver.datagrams == sender.sent
    local = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    assert receiver.sources == {(sender.socket.getsockname(), local)}


@every_host
@pytest.mark.parametrize("kind", ["port", "bound"])
def test_other_sockets_read_segments_after_a_burst(kind: str, host: str, stack: ExitStack) -> None:
    """What was queued before that is read one by one; the order stays."""
    receiver, sender = Receiver(kind, host, stack), Sender(host, stack)
    sender.sends_segments(32, receiver.address)
    sender.sends_segments(32, receiver.address)

    assert receiver.reads_once() == [1] * READ_BUDGET
    sender.sends_segments(32, receiver.address, last=7)
    assert receiver.takes_all() == [1] * 32 + [33]
    sender.sends(1, receiver.address)
    sender.sends_segments(32, receiver.address)
    assert receiver.takes_all() == [1, 32]
    assert receiver.datagrams == sender.sent
    assert len(receiver.sources) == 1
    address = sender.socket.getsockname()
    assert receiver.sources == {address[:2] if kind == "port" else (address, b"")}


@pytest.mark.parametrize("kind", ["port", "bound"])
@pytest.mark.parametrize(
    ("count", "others", "is_a_burst"),
    [
        pytest.param(BURST, 0, True, id="just a burst"),
        pytest.param(READ_BUDGET, 0, True, id="a whole budget"),
        pytest.param(BURST - 1, 0, False, id="too few"),
        pytest.param(BURST, 1, False, id="of two flows"),
        pytest.param(READ_BUDGET - 1, 1, False, id="of two flows, in a whole budget"),
    ],
)
def test_what_counts_as_a_burst(
    kind: str, count: int, others: int, *, is_a_burst: bool, stack: ExitStack
) -> None:
    """Reading with GRO makes single datagrams dearer, so calls must not have it."""
    receiver, sender = Receiver(kind, "127.0.0.1", stack), Sender("127.0.0.1", stack)
    sender.sends(count, receiver.address)
    Sender("127.0.0.1", stack).sends(others, receiver.address)
    receiver.takes_all()
    receiver.datagrams.clear()
    sender.sent.clear()

    sender.sends_segments(10, receiver.address)

    assert receiver.takes_all() == ([10] if is_a_burst else [1] * 10)
    assert receiver.datagrams == sender.sent


@pytest.mark.parametrize("kind", ["port", "bound", "wildcard"])
def test_without_offload_no_segments_are_read(kind: str, stack: ExitStack) -> None:
    receiver = Receiver(kind, "127.0.0.1", stack, offload=False)
    sender = Sender("127.0.0.1", stack)

    for _ in range(3):
        sender.sends_segments(32, receiver.address)
        assert receiver.takes_all() == [1] * 32
    assert receiver.datagrams == sender.sent


@pytest.mark.parametrize("kind", ["port", "bound", "wildcard"])
def test_a_socket_full_of_segments_leaves_time_to_others(kind: str, stack: ExitStack) -> None:
    receiver, sender = Receiver(kind, "127.0.0.1", stack), Sender("127.0.0.1", stack)
    sender.sends(READ_BUDGET, receiver.address)
    receiver.takes_all()

    for _ in range(SEGMENTED_BUDGET + 1):
        sender.sends_segments(64, receiver.address)

    assert receiver.reads_once() == [64] * SEGMENTED_BUDGET
    assert receiver.takes_all() == [64]


# --- Sending ---------------------------------------------------------------------------------


@every_host
@pytest.mark.parametrize("kind", ["port", "bound", "wildcard"])
@pytest.mark.parametrize(
    ("size", "count", "last"),
    [
        pytest.param(100, 10, 0, id="few"),
        pytest.param(1200, 32, 1, id="a short one at the end"),
        pytest.param(1, 128, 0, id="more than the kernel takes"),
        pytest.param(1204, 54, 700, id="more bytes than the kernel takes"),
        pytest.param(1023 + 4, 64, 0, id="grown past the limit by the headers"),
        pytest.param(40_000, 2, 0, id="two that do not fit together"),
        pytest.param(100, 64, 50, id="a single one left over"),
    ],
)
def test_segments_arrive_as_datagrams(
    kind: str, host: str, size: int, count: int, last: int, stack: ExitStack
) -> None:
    """Each is sent in two pieces."""
    receiver, sender = Receiver(kind, host, stack), Sender(host, stack)
    sender.sends(1, receiver.address)
    receiver.takes_all()
    datagrams = [bytes([number]) * size for number in range(count)]
    datagrams += [b"x" * last] if last else []
    pieces: list[memoryview | bytes] = []
    for datagram in datagrams:
        pieces += (datagram[:1], memoryview(datagram)[1:])

    sent = receiver.under_test.reach(receiver.sources.pop()).send_many(pieces, 2, size)

    assert sent == len(datagrams)
    assert sender.receives(len(datagrams)) == datagrams
    assert sender.socket.getsockname()[0] == host


def test_a_wildcard_socket_sends_segments_from_the_address_that_was_asked(stack: ExitStack) -> None:
    receiver, sender = Receiver("wildcard", "127.0.0.1", stack), Sender("127.0.0.1", stack)
    asked = ("127.0.0.2", receiver.address[1])
    sender.sends(1, asked)
    receiver.takes_all()

    receiver.under_test.reach(receiver.sources.pop()).send_many([b"one", b"two"], 1, 3)

    assert [sender.socket.recvfrom(10) for _ in range(2)] == [(b"one", asked), (b"two", asked)]


def test_segments_are_sent_in_one_call(stack: ExitStack) -> None:
    """The receiver has GRO, so it reads what was sent in one call in one read."""
    receiver, sender = Receiver("port", "127.0.0.1", stack), Sender("127.0.0.1", stack)
    sender.socket.setsockopt(SOL_UDP, UDP_GRO, 1)

    to_sender = receiver.under_test.reach(sender.socket.getsockname())
    to_sender.send_many([bytes(SIZE)] * 65, 1, SIZE)

    assert [len(segments) for segments in sender.receives(2)] == [64 * SIZE, SIZE]


# --- A kernel or a device that refuses -------------------------------------------------------


class Kernel:
    """Stands in for a socket of a kernel with GSO, unless *refusals* say otherwise."""

    def __init__(self, *refusals: int | None) -> None:
        self._refusals = list(refusals)
        self.sizes: list[int] = []  # of the segments in each call
        self.counts: list[int] = []  # how many pieces there were in it
        self.options = 0  # how many it was asked for

    def sendmsg(self, pieces: Any, control: Any, _flags: int, _to: Any) -> None:
        self.counts.append(len(pieces))
        self.sizes.append(struct.unpack("H", control[-1][2])[0])
        refusal = self._refusals.pop(0) if self._refusals else None
        if refusal is not None:
            raise OSError(refusal, os.strerror(refusal))

    def setsockopt(self, *_: Any) -> None:
        self.options += 1
        raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EMSGSIZE])
def test_longer_than_the_device_sends_is_not_tried_again(
    error: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    kernel = Kernel(error)
    sender = sender_of(kernel)

    assert [send(sender, size) for size in (1400, 1400, 1500, 1399)] == [0, 0, 0, 2]
    assert kernel.sizes == [1400, 1399]
    assert [record.getMessage() for record in caplog.records] == [
        f"UDP_SEGMENT refuses datagrams of 1400 bytes ({os.strerror(error)}): sent one by one"
    ]


def test_the_refused_size_is_known_by_host_and_tried_again_later() -> None:
    """Another host may be beyond a device that takes more, and routes may change."""
    kernel = Kernel(errno.EMSGSIZE)
    sender = sender_of(kernel)
    pieces: list[memoryview | bytes] = [b"x", b"y"]

    assert sender.send(pieces, 1, 1400, TO) == 0
    assert sender.send(pieces, 1, 1400, ("192.0.2.11", 5000)) == 2
    later = [sender.send(pieces, 1, 1400, TO) for _ in range(300)]
    assert later == [0] * 256 + [2] * 44


def test_with_offload_off_no_segments_are_sent() -> None:
    sock: Any = Kernel()

    assert SegmentSender(sock, Offload(wanted=False)).send([b"x"] * 2, 1, 1, ("192.0.2.1", 9)) == 0
    assert sock.sizes == []


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_socket_that_had_gro_before_us_is_read_with_gro(
    host: str, stack: ExitStack, *, wanted: bool
) -> None:
    """Systemd hands the socket from one process to the next, with its options."""
    sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sock.bind((host, 0))
    sock.setsockopt(SOL_UDP, UDP_GRO, 1)
    buffer = memoryview(bytearray(65536))
    inbox = SegmentsOnly()
    listener = adopt(sock, Shared(buffer, unexpected, Offload(wanted=wanted)), inbox)
    sender = Sender("127.0.0.1", stack)

    sender.sends_segments(8, ("127.0.0.1", listener.address[1]))
    listener.reader.on_readable()

    assert inbox.reads == [(8 * SIZE, SIZE)]
    assert listener.sockets == [listener]  # what systemd said of it goes for no other


def test_segments_that_were_handled_singly_end_the_iteration(stack: ExitStack) -> None:
    """They may have cost as much as a hundred datagrams."""
    receiver, sender = Receiver("wildcard", "127.0.0.1", stack), Sender("127.0.0.1", stack)
    for _ in range(3):
        sender.sends_segments(8, receiver.address)

    receiver.handled_singly = 8

    assert [receiver.reads_once() for _ in range(3)] == [[8], [8], [8]]


@pytest.mark.parametrize("error", [errno.EIO, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_device_that_cannot_is_asked_again_later_and_others_meanwhile(
    error: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A tunnel on the way to one client must not decide for those beside it."""
    caplog.set_level(logging.INFO)
    kernel = Kernel(error)
    sender = sender_of(kernel)
    pieces: list[memoryview | bytes] = [b"x", b"y"]

    assert [send(sender, size) for size in (1400, 1400, 1)] == [0, 0, 0]
    assert sender.send(pieces, 1, 1400, ("192.0.2.11", 5000)) == 2
    assert kernel.sizes == [1400, 1400]
    assert len(caplog.records) == 1
    assert [send(sender, 1400) for _ in range(300)] == [0] * 254 + [2] * 46


def test_a_kernel_without_gso_is_not_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    kernel = Kernel(errno.ENOPROTOOPT)
    sender = sender_of(kernel)

    assert send(sender, 1400) == 0
    assert sender.send([b"x", b"y"], 1, 1, ("192.0.2.11", 5000)) == 0
    assert kernel.sizes == [1400]
    assert len(caplog.records) == 1


def test_a_kernel_that_cannot_count_to_64_gets_63_at_a_time() -> None:
    """Some say EINVAL to exactly 64 full segments; that says nothing of their size."""
    kernel, offload = Kernel(errno.EINVAL), Offload(wanted=True)
    sender = sender_of(kernel, offload)
    pieces: list[memoryview | bytes] = [b"xx"] * 64

    assert sender.send(pieces, 1, 2, TO) == 0
    assert sender.send(pieces, 1, 2, TO) == 64
    assert kernel.counts == [64, 63, 1]
    assert sender_of(kernel, offload).send(pieces, 1, 2, TO) == 64
    assert kernel.counts == [64, 63, 1, 63, 1]


@pytest.mark.parametrize("size", [65_508, 65_535, 65_539])
def test_what_no_datagram_can_hold_is_not_tried(size: int) -> None:
    """Loopback carries such segments to us, and a header makes them four bytes longer."""
    kernel = Kernel()

    assert sender_of(kernel).send([b"head", bytes(size - 4), b"head", b"x"], 2, size, TO) == 0
    assert kernel.sizes == []


@pytest.mark.parametrize(
    "error", [errno.ENOBUFS, errno.EAGAIN, errno.EPERM, errno.ENETUNREACH], ids=errno.errorcode.get
)
def test_what_may_pass_is_tried_again(error: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    sender = sender_of(Kernel(error))

    assert [send(sender, 1400) for _ in range(3)] == [0, 2, 2]
    assert caplog.records == []


def test_what_went_out_before_a_refusal_counts() -> None:
    sender = sender_of(Kernel(None, errno.ENOBUFS))

    assert sender.send([b"x"] * 130, 1, 1, TO) == 64


def test_a_kernel_without_udp_gro_is_asked_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    offload = Offload(wanted=True)
    sock: Any = Kernel()

    assert not offload.enable_gro(sock)
    assert not offload.enable_gro(sock)
    assert sock.options == 1
    assert [record.getMessage() for record in caplog.records] == [
        "no UDP_GRO (Protocol not available): datagrams are read one by one"
    ]


def test_several_sockets_with_the_same_trouble_log_it_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    offload = Offload(wanted=True)
    for _ in range(3):
        send(sender_of(Kernel(errno.EIO), offload), 1400)

    assert len(caplog.records) == 1


class SegmentsOnly:
    """Takes segments, and notes the size of all and of each."""

    def __init__(self) -> None:
        self.reads: list[tuple[int, int]] = []

    def on_datagram(self, *_: object) -> None:
        pytest.fail("a datagram")

    def on_segments(self, size: int, segment: int, _client: object, _tos: int = 0) -> int:
        self.reads.append((size, segment))
        return 0


def sender_of(kernel: Kernel, offload: Offload | None = None) -> SegmentSender:
    sock: Any = kernel
    return SegmentSender(sock, offload or Offload(wanted=True))


def send(sender: SegmentSender, size: int) -> int:
    return sender.send([bytes(size)] * 2, 1, size, TO)


def unexpected(name: str) -> None:
    raise AssertionError(name)
