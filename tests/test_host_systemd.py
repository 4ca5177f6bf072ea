"""What systemd is told, and what it hands over: real sockets, and a real process for the latter."""

import fcntl
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import IO, Any

import pytest

from relay.host.systemd import ActivationError, Notifier, inherited_sockets, watchdog_interval
from tests.process import TIMEOUT, environment

# --- Notifications --------------------------------------------------------------------------


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator["Manager"]:
    name = str(tmp_path / "notify")
    if request.param == "abstract":
        name = f"@relay-test-{os.getpid()}-{random.getrandbits(64):x}"
    with closing(Manager(name)) as manager:
        yield manager


@pytest.fixture
def notifier(manager: "Manager") -> Iterator[Notifier]:
    with closing(Notifier({"NOTIFY_SOCKET": manager.name})) as notifier:
        yield notifier


def test_each_notification_is_one_datagram(manager: "Manager", notifier: Notifier) -> None:
    assert notifier.is_active
    notifier.ready()
    assert manager.hears() == "READY=1"
    notifier.status("relaying for 3 clients")
    assert manager.hears() == "STATUS=relaying for 3 clients"
    notifier.watchdog()
    assert manager.hears() == "WATCHDOG=1"
    notifier.extend_timeout(1.5)
    assert manager.hears() == "EXTEND_TIMEOUT_USEC=1500000"
    notifier.stopping()
    assert manager.hears() == "STOPPING=1"


def test_a_reload_is_dated_as_notify_reload_wants_it(
    manager: "Manager", notifier: Notifier
) -> None:
    before = time.monotonic()
    notifier.reloading()
    after = time.monotonic()
    reloading, date = manager.hears().split("\n")
    assert reloading == "RELOADING=1"
    key, _, microseconds = date.partition("=")
    assert key == "MONOTONIC_USEC"
    assert int(before * 1e6) <= int(microseconds) <= int(after * 1e6)


STATUSES = [
    pytest.param("draining\nREADY=1", "draining READY=1", id="a line of its own"),
    pytest.param("a\r\n\x0bb", "a b", id="other line ends"),
    pytest.param("", "", id="nothing"),
    pytest.param("café", "café", id="not ASCII"),
    pytest.param("lone \udc80", "lone ?", id="not UTF-8"),
]


@pytest.mark.parametrize(("text", "heard"), STATUSES)
def test_a_status_is_one_line_whatever_is_in_it(
    manager: "Manager", notifier: Notifier, text: str, heard: str
) -> None:
    notifier.status(text)
    assert manager.hears() == f"STATUS={heard}"


def test_a_manager_that_does_not_read_holds_nobody_up(
    manager: "Manager", notifier: Notifier
) -> None:
    """What it must not miss is sent with the next message that it takes, and only once."""
    others = manager.fills_up()
    notifier.ready()
    notifier.watchdog()
    assert [manager.hears() for _ in range(others)] == ["other"] * others
    manager.hears_nothing()

    notifier.status("relaying")
    assert manager.hears() == "READY=1\nSTATUS=relaying"
    notifier.watchdog()
    assert manager.hears() == "WATCHDOG=1"


def test_what_is_untold_and_no_more_true_is_not_told(
    manager: "Manager", notifier: Notifier
) -> None:
    others = manager.fills_up()
    notifier.ready()
    notifier.stopping()
    for _ in range(others):
        manager.hears()

    notifier.watchdog()
    assert manager.hears() == "STOPPING=1\nWATCHDOG=1"


def test_a_manager_that_is_gone_is_no_error(manager: "Manager", notifier: Notifier) -> None:
    manager.close()
    notifier.ready()
    notifier.status("relaying")


def test_nobody_is_told_after_the_end(manager: "Manager", notifier: Notifier) -> None:
    notifier.close()
    assert not notifier.is_active
    notifier.ready()
    manager.hears_nothing()
    notifier.close()


@pytest.mark.parametrize("name", [None, "", "vsock:2:1234", "notify", "/" + "x" * 200])
def test_where_nobody_listens_nothing_happens(name: str | None) -> None:
    with closing(Notifier({} if name is None else {"NOTIFY_SOCKET": name})) as notifier:
        assert notifier.is_active == (name is not None and name.startswith("/"))
        notifier.ready()
        notifier.watchdog()


# --- The watchdog ---------------------------------------------------------------------------

WATCHDOGS = [
    pytest.param({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 30.0, id="ours"),
    pytest.param({"WATCHDOG_USEC": "1500000"}, 1.5, id="for anybody"),
    pytest.param({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None, id="another's"),
    pytest.param({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": ""}, None, id="nobody's"),
    pytest.param({}, None, id="none"),
    pytest.param({"WATCHDOG_PID": "7"}, None, id="no interval"),
    pytest.param({"WATCHDOG_USEC": ""}, None, id="empty"),
    pytest.param({"WATCHDOG_USEC": "0"}, None, id="zero"),
    pytest.param({"WATCHDOG_USEC": "-1"}, None, id="negative"),
    pytest.param({"WATCHDOG_USEC": "30s"}, None, id="no number"),
    pytest.param({"WATCHDOG_USEC": "\u0663"}, None, id="a digit, but not of ours"),
    pytest.param({"WATCHDOG_USEC": "18446744073709551615"}, None, id="infinity"),
]


@pytest.mark.parametrize(("variables", "seconds"), WATCHDOGS)
def test_watchdog_interval(variables: dict[str, str], seconds: float | None) -> None:
    assert watchdog_interval(variables, pid=7) == seconds


# --- Sockets handed over --------------------------------------------------------------------


def test_nothing_is_handed_over_without_systemd() -> None:
    assert inherited_sockets({}, pid=7) == []


@pytest.mark.parametrize("pid", ["8", "", "07", "seven"])
def test_what_is_meant_for_another_process_is_left_alone(pid: str) -> None:
    assert inherited_sockets({"LISTEN_PID": pid, "LISTEN_FDS": "nonsense"}, pid=7) == []


NONSENSE = [
    pytest.param({}, "LISTEN_FDS '': not a number", id="no number of them"),
    pytest.param({"LISTEN_FDS": "two"}, "LISTEN_FDS 'two': not a number", id="a word"),
    pytest.param({"LISTEN_FDS": "-1"}, "LISTEN_FDS '-1': not a number", id="negative"),
    pytest.param(
        {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "turn"},
        "LISTEN_FDNAMES: 1 names for 2 descriptors",
        id="too few names",
    ),
    pytest.param(
        {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "turn:turn"},
        "LISTEN_FDNAMES: 2 names for 1 descriptors",
        id="too many names",
    ),
]


@pytest.mark.parametrize(("variables", "message"), NONSENSE)
def test_nonsense_is_said_to_be_that(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ActivationError) as raised:
        inherited_sockets({"LISTEN_PID": "7", **variables}, pid=7)
    assert str(raised.value) == message


def test_none_of_them_is_no_nonsense() -> None:
    variables = {"LISTEN_PID": "7", "LISTEN_FDS": "0", "LISTEN_FDNAMES": ""}
    assert inherited_sockets(variables, pid=7) == []


def test_a_process_finds_its_sockets_by_name() -> None:
    with udp4() as first, udp6() as second:
        found = activated(first, second, names="turn:spare")
        assert found == {
            "sockets": [
                ["turn", socket.AF_INET, first.getsockname()[1]],
                ["spare", socket.AF_INET6, second.getsockname()[1]],
            ],
            "inheritable": [False, False],
            "blocking": [False, False],
            "kinds": [socket.SOCK_DGRAM, socket.SOCK_DGRAM],
        }
        for sock in (first, second):  # one and the same as in the child
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 0


def test_without_names_each_is_unknown() -> None:
    with udp4() as sock:
        found = activated(sock, names=None)
        assert found["sockets"] == [["unknown", socket.AF_INET, sock.getsockname()[1]]]


def test_nobody_else_can_bind_a_port_that_was_handed_over() -> None:
    """As long as both sockets want it, SO_REUSEADDR lets them share a UDP port."""
    with udp4() as sock, socket.socket(type=socket.SOCK_DGRAM) as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        activated(sock, names="turn")
        with pytest.raises(OSError, match="Address already in use"):
            thief.bind(sock.getsockname())


def test_a_descriptor_that_is_not_open_is_named() -> None:
    with udp4() as sock:
        found = activated(sock, names=None, count=2)
    assert found["error"] == "LISTEN_FDS 2: descriptor 4 is no socket: Bad file descriptor"


def test_a_descriptor_that_is_no_socket_is_named() -> None:
    with Path("/dev/null").open() as file:
        found = activated(file, names="turn")
    assert found["error"] == (
        "LISTEN_FDS 1: descriptor 3 is no socket: Socket operation on non-socket"
    )


@pytest.mark.skipif(
    shutil.which("systemd-socket-activate") is None, reason="systemd-socket-activate is missing"
)
def test_systemd_itself_hands_over_what_we_expect() -> None:
    """It binds, and starts us on the first datagram, which we find in the socket."""
    with udp4() as sock:
        port = sock.getsockname()[1]
    command = [
        "systemd-socket-activate",
        "--datagram",
        f"--listen=127.0.0.1:{port}",
        f"--listen=[::1]:{port}",
        "--fdname=turn:turn",
        f"--setenv=PYTHONPATH={environment()['PYTHONPATH']}",
        sys.executable,
        "-c",
        CHILD,
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if "[::1]" in line:  # it says so once it is bound
                    break
            with socket.socket(type=socket.SOCK_DGRAM) as client:
                client.sendto(b"hello", ("127.0.0.1", port))
            found = json.loads(process.communicate(timeout=TIMEOUT)[0])
        finally:
            process.kill()
    assert found["sockets"] == [["turn", socket.AF_INET, port], ["turn", socket.AF_INET6, port]]


# --- Helpers --------------------------------------------------------------------------------


class Manager:
    """The socket of a service manager, by its name in ``NOTIFY_SOCKET``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._address = name.replace("@", "\0", 1)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self._address)
        self._socket.setblocking(False)

    def hears(self) -> str:
        return self._socket.recv(4096).decode()

    def hears_nothing(self) -> None:
        with pytest.raises(BlockingIOError):
            self._socket.recv(4096)

    def fills_up(self) -> int:
        """Stop reading: let others fill the queue, and return how many messages are in it."""
        count = 0
        while True:  # one sender may reach its own limit before that of the queue
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
                sent = 0
                with suppress(BlockingIOError):
                    while True:
                        other.sendto(b"other", socket.MSG_DONTWAIT, self._address)
                        sent += 1
            if not sent:
                return count
            count += sent

    def close(self) -> None:
        self._socket.close()


# What a started process finds, as JSON. Descriptors in its arguments become those from 3 on.
CHILD = """
import json, os, sys
from relay.host.systemd import ActivationError, inherited_sockets
for target, descriptor in enumerate(sys.argv[1:], start=3):
    os.dup2(int(descriptor), target)
    os.environ["LISTEN_PID"] = str(os.getpid())
try:
    found = inherited_sockets(os.environ, os.getpid())
except ActivationError as error:
    print(json.dumps({"error": str(error)}))
else:
    print(json.dumps({
        "sockets": [[name, sock.family, sock.getsockname()[1]] for name, sock in found],
        "inheritable": [sock.get_inheritable() for _, sock in found],
        "blocking": [os.get_blocking(sock.fileno()) for _, sock in found],
        "kinds": [sock.type for _, sock in found],
    }))
    for _, sock in found:
        sock.close()
"""


def activated(*files: IO[Any] | socket.socket, names: str | None, count: int = 0) -> dict[str, Any]:
    """Start a process with *files* as its descriptors from 3 on, and return what it finds."""
    variables = {"LISTEN_FDS": str(count or len(files))}
    if names is not None:
        variables["LISTEN_FDNAMES"] = names
    copies = [fcntl.fcntl(file.fileno(), fcntl.F_DUPFD_CLOEXEC, 10) for file in files]
    try:
        child = subprocess.run(
            [sys.executable, "-Walways", "-c", CHILD, *map(str, copies)],
            pass_fds=copies,
            env=environment(**variables),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=True,
        )
    finally:
        for copy in copies:
            os.close(copy)
    assert child.stderr == ""
    found: dict[str, Any] = json.loads(child.stdout)
    return found


def udp4() -> socket.socket:
    return _as_systemd_binds(socket.AF_INET, "127.0.0.1")


def udp6() -> socket.socket:
    return _as_systemd_binds(socket.AF_INET6, "::1")


def _as_systemd_binds(family: socket.AddressFamily, host: str) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, 0))
    return sock
