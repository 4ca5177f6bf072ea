"""The kernel's queues, and what is said of them."""

import errno
import logging
import os
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relay.net.buffers import BufferGiver, Overflows, log_buffers, set_buffers
from relay.net.listening import LISTEN_BUFFER
from relay.net.offload import Offload
from relay.net.reactor import Reactor
from relay.net.udp import PORT_BUFFER, PortOpener, Shared
from tests.process import RelayProcess, free_port
from tests.turnclient import TurnClient

SIZE = 1 << 20


def test_the_size_that_was_asked_for_is_worth_no_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        set_buffers(sock, 150_000)
        log_buffers(sock, 150_000, "a socket")

    assert [record.getMessage() for record in caplog.records] == [
        "a socket: the kernel queues 150000 bytes to read, 150000 to send"
    ]


def test_a_queue_that_is_long_enough_is_left_alone() -> None:
    """It may have been made by a process with more privileges."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        set_buffers(sock, 150_000)
        set_buffers(sock, 65536)

        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 300_000
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 300_000


class Kernel:
    """Stands in for a new socket of a kernel that may refuse to exceed its limits."""

    def __init__(self, *, forces: bool, default: int = 0) -> None:
        self._forces = forces
        self._default = default
        self.asked: list[tuple[int, int]] = []
        self.looks = 0

    def setsockopt(self, _level: int, option: int, value: int) -> None:
        self.asked.append((option, value))
        if option in {RCVBUFFORCE, SNDBUFFORCE} and not self._forces:
            raise PermissionError(errno.EPERM, "not permitted")

    def getsockopt(self, *_: int) -> int:
        self.looks += 1
        return 2 * self._default


RCVBUFFORCE, SNDBUFFORCE = 33, 32


@pytest.mark.parametrize(
    ("kernel", "first", "later"),
    [
        pytest.param(
            {"forces": False},
            [RCVBUFFORCE, socket.SO_RCVBUF, SNDBUFFORCE, socket.SO_SNDBUF],
            [socket.SO_RCVBUF, socket.SO_SNDBUF],
            id="without privileges",
        ),
        pytest.param(
            {"forces": True},
            [RCVBUFFORCE, SNDBUFFORCE],
            [RCVBUFFORCE, SNDBUFFORCE],
            id="with privileges",
        ),
        pytest.param({"forces": False, "default": SIZE}, [], [], id="long enough by default"),
    ],
)
def test_what_the_first_socket_tells_is_not_asked_again(
    kernel: dict[str, Any], first: list[int], later: list[int]
) -> None:
    """Each allocation would pay for the question."""
    giver, sockets = BufferGiver(), [Kernel(**kernel) for _ in range(3)]
    for sock in sockets:
        new: Any = sock
        giver.give(new, SIZE)

    assert [[option for option, _ in sock.asked] for sock in sockets] == [first, later, later]
    assert all(size == SIZE for sock in sockets for _, size in sock.asked)
    assert [sock.looks for sock in sockets] == [2, 0, 0]


def test_no_queue_is_made_shorter() -> None:
    giver = BufferGiver()
    for _ in range(2):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            before = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
            giver.give(sock, before // 4)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == before


@pytest.mark.parametrize(
    ("actual", "commands"),
    [
        pytest.param(
            (212992, 212992), ["net.core.rmem_max=1048576 net.core.wmem_max=1048576"], id="both"
        ),
        pytest.param((SIZE, SIZE - 1), ["net.core.wmem_max=1048576"], id="to send"),
        pytest.param((0, 2 * SIZE), ["net.core.rmem_max=1048576"], id="to read"),
        pytest.param((SIZE, SIZE), [], id="neither"),
    ],
)
def test_less_is_warned_of_with_the_command_that_helps(
    actual: tuple[int, int], commands: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    sock: Any = Limited(actual)

    log_buffers(sock, SIZE, "a socket")

    warnings = [record.getMessage() for record in caplog.records]
    assert [warning.partition("sysctl -w ")[2] for warning in warnings] == commands


def test_a_relay_without_privileges_says_what_it_got() -> None:
    """Once for the listening socket of each family, and once for all relay ports."""
    prefix: tuple[str, ...] = ()
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("giving up a capability takes setpriv")
        prefix = ("setpriv", "--bounding-set=-net_admin")
    with RelayProcess(port=free_port(), prefix=prefix) as relay:
        for _ in range(2):
            server = ("127.0.0.1", relay.port)
            with TurnClient(server, relay.username, relay.password) as alice:
                alice.allocates()
    log = relay.errors()
    for whose, size in (
        ("the socket for clients on 0.0.0.0", LISTEN_BUFFER),
        ("the socket for clients on ::", LISTEN_BUFFER),
        ("each relay port", PORT_BUFFER),
    ):
        read, send = (min(size, limit(name)) for name in ("rmem_max", "wmem_max"))
        assert log.count(f"{whose}: the kernel queues {read} bytes to read, {send} to send") == 1
        assert log.count(f"{whose}: bursts may be lost") == (min(read, send) < size)


def test_a_burst_of_a_hundred_large_datagrams_fits_into_the_queue_of_a_port() -> None:
    """With what the kernel lets everyone have by default."""
    inbox, reactor, number = Inbox(), Reactor(), free_port()
    port = opener_of(reactor).open(socket.AF_INET, number, inbox)
    sends(100, number)
    while port.reader.on_readable():
        pass

    assert inbox.count == 100
    port.close()
    reactor.close()


# --- What found no room ----------------------------------------------------------------------


def test_what_finds_the_queue_of_a_port_full_is_counted() -> None:
    """While it is open, as far as the kernel was asked, and to the end when it is closed."""
    time, inbox = Time(), Inbox()
    reactor = Reactor(lambda: time.now)
    opener = opener_of(reactor)
    number = free_port()
    port = opener.open(socket.AF_INET, number, inbox)
    sends(1000, number)
    assert opener.queues.overflows() == 0

    time.now += Overflows.PERIOD
    reactor.iterate()  # the kernel is asked, and some are read
    counted = opener.queues.overflows()
    while port.reader.on_readable():
        pass
    assert counted == 1000 - inbox.count > 0

    sends(1000, number)
    port.close()
    reactor.close_retired()
    after = opener.queues.overflows()
    assert after > counted
    time.now += Overflows.PERIOD
    reactor.iterate()
    assert opener.queues.overflows() == after
    reactor.close()


def test_every_port_adds_to_the_count() -> None:
    """Whether it is closed or not."""
    reactor = Reactor()
    opener, counted = opener_of(reactor), [0]
    for _ in range(3):
        number = free_port()
        port = opener.open(socket.AF_INET, number, Inbox())
        sends(1000, number)
        port.close()
        counted.append(opener.queues.overflows())
    reactor.close()

    assert counted == sorted(set(counted))


@pytest.mark.parametrize("count", [1, Overflows.PORTION, 3 * Overflows.PORTION + 1])
def test_the_kernel_is_asked_for_a_portion_of_many_ports_at_a_time(count: int) -> None:
    """And for each of them once in a period, the first of which begins with the first port."""
    loop, sockets = Loop(), [Counting() for _ in range(count)]
    overflows = Overflows(loop.call_later)
    for sock in sockets:
        watched: Any = sock
        overflows.watch(watched)

    asked = []
    while loop.now < 2 * Overflows.PERIOD:
        before = sum(sock.asked for sock in sockets)
        loop.goes_on()
        asked.append(sum(sock.asked for sock in sockets) - before)

    assert max(asked) <= Overflows.PORTION
    assert min(sock.asked for sock in sockets) >= 1
    assert len(asked) <= 1 + -(-count // Overflows.PORTION)
    assert overflows.overflows() == sum(sock.asked for sock in sockets)


def test_without_ports_the_loop_may_sleep() -> None:
    loop, sock = Loop(), Counting()
    overflows = Overflows(loop.call_later)
    assert loop.callback is None
    watched: Any = sock
    overflows.watch(watched)
    overflows.forget(watched)

    loop.goes_on()

    assert loop.callback is None
    overflows.watch(watched)
    assert loop.callback is not None


def test_the_kernels_counter_may_begin_again() -> None:
    loop, sock = Loop(), Counting(0xFFFF_FFFE)
    watched: Any = sock
    overflows = Overflows(loop.call_later)
    overflows.watch(watched)
    for _ in range(3):
        loop.goes_on()

    assert overflows.overflows() == 0x1_0000_0001


class Time:
    """A clock that stands still."""

    now = 1000.0


def opener_of(reactor: Reactor) -> PortOpener:
    shared = Shared(memoryview(bytearray(65535)), pytest.fail, Offload(wanted=False))
    return PortOpener(reactor, {socket.AF_INET: "127.0.0.1"}, shared)


def sends(count: int, port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        for _ in range(count):
            peer.sendto(bytes(1400), ("127.0.0.1", port))


class Loop:
    """Calls back when it is told to go on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.callback: Callable[[], None] | None = None
        self._delay = 0.0

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        self._delay, self.callback = delay, callback

    def goes_on(self) -> None:
        callback, self.callback = self.callback, None
        assert callback is not None
        self.now += self._delay
        callback()


class Counting:
    """Stands in for a socket of which the kernel has one more overflow whenever it is asked."""

    def __init__(self, overflows: int = 0) -> None:
        self._overflows = overflows
        self.asked = 0

    def getsockopt(self, *_: int) -> bytes:
        self.asked += 1
        self._overflows = (self._overflows + 1) & 0xFFFF_FFFF
        return struct.pack("9I", *[0] * 8, self._overflows)


class Inbox:
    """Counts datagrams."""

    count = 0

    def on_datagram(self, *_: object) -> None:
        self.count += 1

    def on_segments(self, *_: object) -> int:
        raise AssertionError("segments")


def limit(name: str) -> int:
    return int(Path("/proc/sys/net/core", name).read_text())


class Limited:
    """A socket whose queues have a size of their own, whatever was asked for."""

    def __init__(self, actual: tuple[int, int]) -> None:
        self._actual = dict(zip((socket.SO_RCVBUF, socket.SO_SNDBUF), actual, strict=True))

    def getsockopt(self, _level: int, option: int) -> int:
        return 2 * self._actual[option]
