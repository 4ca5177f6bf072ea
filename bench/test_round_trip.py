"""How long ChannelData is on its way: client, relay, peer, relay, client.

Through real sockets and a relay process of its own, on loopback: each way the relay reads,
looks up, and sends. Client and peer are this very process, and wait for each other, so one
call is four datagrams and nothing overlaps. Most of it is the kernel waking one process and
then the other, which depends on where it puts them: compare the medians of several runs.
"""

import socket
from collections.abc import Iterator
from typing import Final

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from relay.stun.const import Family
from tests.process import RelayProcess, free_port
from tests.turnclient import TIMEOUT, TurnClient

NUMBER: Final = 0x4000


@pytest.mark.parametrize("size", [32, 1200])
@pytest.mark.parametrize("family", Family, ids=lambda family: family.name)
def test_round_trip(
    benchmark: BenchmarkFixture, relay: RelayProcess, family: Family, size: int
) -> None:
    host = "127.0.0.1" if family is Family.IPV4 else "::1"
    payload = bytes(size)
    with (
        TurnClient((host, relay.port), relay.username, relay.password) as client,
        socket.socket(
            socket.AF_INET if family is Family.IPV4 else socket.AF_INET6, socket.SOCK_DGRAM
        ) as peer,
    ):
        peer.bind((host, 0))
        peer.connect(client.allocates(family))
        peer.settimeout(TIMEOUT)
        client.binds(NUMBER, peer.getsockname()[:2])

        def round_trip() -> tuple[int, bytes]:
            client.sends(NUMBER, payload)
            peer.send(peer.recv(2048))
            return client.receives()

        assert benchmark(round_trip) == (NUMBER, payload)


@pytest.fixture(scope="module")
def relay() -> Iterator[RelayProcess]:
    with RelayProcess(port=free_port()) as process:
        yield process
