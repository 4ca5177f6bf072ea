"""The kernel's queues, and what is said of them."""

import errno
import logging
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from relay.net.buffers import BufferSetter, log_buffers, set_buffers
from relay.net.listening import LISTEN_BUFFER
from relay.net.udp import PORT_BUFFER
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
    """Stands in for a socket of a kernel that may refuse to exceed its limits."""

    def __init__(self, *, forces: bool) -> None:
        self._forces = forces
        self.calls: list[tuple[int, int]] = []

    def setsockopt(self, _level: int, option: int, value: int) -> None:
        self.calls.append((option, value))
        if option in {32, 33} and not self._forces:  # SO_SNDBUFFORCE, SO_RCVBUFFORCE
            raise PermissionError(errno.EPERM, "not permitted")

    def getsockopt(self, *_: int) -> int:
        raise AssertionError("a question that changes nothing")


def test_what_the_kernel_once_refused_it_is_not_asked_again() -> None:
    """Privileges do not come back, and each allocation would cost another system call."""
    setter = BufferSetter()
    sockets: list[Any] = [Kernel(forces=False) for _ in range(3)]
    for sock in sockets:
        setter.set(sock, SIZE)

    plain = [(socket.SO_RCVBUF, SIZE), (socket.SO_SNDBUF, SIZE)]
    assert [sock.calls for sock in sockets] == [[(33, SIZE), *plain], plain, plain]


def test_where_limits_may_be_exceeded_they_are() -> None:
    setter, sock = BufferSetter(), Kernel(forces=True)
    kernel: Any = sock
    setter.set(kernel, SIZE)

    assert sock.calls == [(33, SIZE), (32, SIZE)]


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


def limit(name: str) -> int:
    return int(Path("/proc/sys/net/core", name).read_text())


class Limited:
    """A socket whose queues have a size of their own, whatever was asked for."""

    def __init__(self, actual: tuple[int, int]) -> None:
        self._actual = dict(zip((socket.SO_RCVBUF, socket.SO_SNDBUF), actual, strict=True))

    def getsockopt(self, _level: int, option: int) -> int:
        return 2 * self._actual[option]
