"""What bench.flood sends, and whether it does."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from bench.flood import KINDS, SOURCE_PORT, _ip_and_udp, flooding
from bench.loadlib.mmsg import Volleys
from tests.turnclient import TIMEOUT

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="raw sockets take root")


def test_volleys_go_round_and_round(receiver: socket.socket) -> None:
    datagrams = [b"a", b"", b"ccc", b"dd"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect(receiver.getsockname())
        volleys = Volleys(datagrams, at_once=2)
        assert [volleys.send(sender.fileno()) for _ in range(3)] == [2, 2, 2]

    assert [receiver.recv(10) for _ in range(6)] == [*datagrams, b"a", b""]


@needs_root
def test_packet_is_from_whom_it_says(receiver: socket.socket) -> None:
    packet = _ip_and_udp("127.66.66.66", receiver.getsockname(), b"from nowhere")
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.connect(("127.0.0.1", 0))
        Volleys([packet], at_once=1).send(raw.fileno())

    assert receiver.recvfrom(100) == (b"from nowhere", ("127.66.66.66", SOURCE_PORT))


def test_flood_lasts_as_long_as_it_is_wanted(receiver: socket.socket) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect(receiver.getsockname())
        with flooding(sender, [b"x"] * 40, rate=1000.0) as flood:
            assert [receiver.recv(10) for _ in range(100)] == [b"x"] * 100
    assert flood.rate > 0


@needs_root
@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="takes two CPUs")
def test_it_runs_beside_both_servers() -> None:
    for program in ("ip", "taskset", "turnserver"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    command = [sys.executable, "-m", "bench.flood", "--seconds=0.1", "--kind=Binding"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)

    head, row = done.stdout.splitlines()
    assert head.split() == ["flood", "relay:", "lost", "newcomer", "coturn:", "lost", "newcomer"]
    assert row.startswith("Binding request ")


def test_every_kind_can_be_chosen_by_its_name() -> None:
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names)


@pytest.fixture
def receiver() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(TIMEOUT)
        yield sock
