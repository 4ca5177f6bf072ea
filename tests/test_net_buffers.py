"""The kernel's queues, and what is said of them."""

import errno
import logging
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from relay.net.buffers import BufferGiver, log_buffers, set_buffers
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
    inbox, reactor = Inbox(), Reactor()
    shared = Shared(memoryview(bytearray(65535)), pytest.fail, Offload(wanted=False))
    number = free_port()
    opener = PortOpener(reactor, {socket.AF_INET: "127.0.0.1"}, shared)
    port = opener.open(socket.AF_INET, number, inbox)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        for _ in range(100):
            peer.sendto(bytes(1400), ("127.0.0.1", number))
    while port.reader.on_readable():
        pass

    assert inbox.count == 100
    port.close()
    reactor.close()


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
