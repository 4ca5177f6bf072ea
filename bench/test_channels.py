"""How much of a relayed datagram's time is ours, between its read and its send.

One call takes a datagram, or 32 segments of one read, from the buffer, looks up the route among
those of :data:`CLIENTS` clients and hands it to a socket that does nothing. The kernel takes
a multiple of that for its read and its send (``test_sockets.py``); ``test_round_trip.py``
measures all of it.
"""

from typing import Any, Final

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from relay.datapath.datapath import DataPath
from relay.datapath.destination import Pieces
from relay.datapath.workspace import Workspace
from relay.net.icmp import TakeError
from relay.net.udp import Receiver
from relay.observe.counters import Counters
from relay.stun.attributes import Attr
from relay.stun.const import UDP_PROTOCOL, Family, Method
from relay.turn.channeldata import RFC8656_NUMBERS
from relay.turn.commands import ClientAddress, PeerAddress
from tests.scenario import UNIX_START, Scenario, channel_data

CLIENTS: Final = 1000
NUMBER: Final = 0x4000
PEER: Final = PeerAddress(("198.51.100.7", 9000))
PAYLOAD: Final = bytes(1200)
SEGMENTS: Final = 32
OFTEN: Final = {"rounds": 100, "iterations": 1000}  # one call is too short to be timed
LESS_OFTEN: Final = {"rounds": 100, "iterations": 100}


def test_client_to_peer(benchmark: BenchmarkFixture, table: "Table") -> None:
    datagram = channel_data(NUMBER, PAYLOAD)
    table.buffer[: len(datagram)] = datagram

    benchmark.pedantic(  # type: ignore[no-untyped-call]
        table.datapath.clients.on_datagram,
        args=(len(datagram), table.clients[CLIENTS // 2]),
        **OFTEN,
    )

    assert not table.counters.dropped


def test_peer_to_client(benchmark: BenchmarkFixture, table: "Table") -> None:
    benchmark.pedantic(  # type: ignore[no-untyped-call]
        table.ports[CLIENTS // 2].on_datagram, args=(len(PAYLOAD), PEER), **OFTEN
    )

    assert not table.counters.dropped


@pytest.mark.parametrize("is_alike", [True, False], ids=["alike", "mixed"])
def test_segments_to_peer(benchmark: BenchmarkFixture, table: "Table", *, is_alike: bool) -> None:
    """If mixed, the last datagram is on another channel: all are relayed one by one."""
    datagram = channel_data(NUMBER, PAYLOAD)
    segments = datagram * SEGMENTS
    table.buffer[: len(segments)] = segments
    if not is_alike:
        table.buffer[len(segments) - len(datagram) + 1] += 1

    benchmark.pedantic(  # type: ignore[no-untyped-call]
        table.datapath.clients.on_segments,
        args=(len(segments), len(datagram), table.clients[CLIENTS // 2]),
        **LESS_OFTEN,
    )

    assert bool(table.counters.batches) is is_alike


def test_segments_to_client(benchmark: BenchmarkFixture, table: "Table") -> None:
    benchmark.pedantic(  # type: ignore[no-untyped-call]
        table.ports[CLIENTS // 2].on_segments,
        args=(SEGMENTS * len(PAYLOAD), len(PAYLOAD), PEER),
        **LESS_OFTEN,
    )

    assert table.counters.batches


def test_unknown_channel(benchmark: BenchmarkFixture, table: "Table") -> None:
    """What is dropped should not cost more than what is relayed."""
    datagram = channel_data(NUMBER + 1, PAYLOAD)
    table.buffer[: len(datagram)] = datagram

    benchmark.pedantic(  # type: ignore[no-untyped-call]
        table.datapath.clients.on_datagram,
        args=(len(datagram), table.clients[CLIENTS // 2]),
        **OFTEN,
    )

    assert set(table.counters.dropped) == {"unbound_channel"}


class Nothing:
    """A socket, and all that is reached from there."""

    host = "0.0.0.0"

    def reach(self, address: Any) -> "Nothing":  # noqa: ANN401, ARG002
        """Return itself."""
        return self

    def look_for_marks(self) -> None:
        """Do nothing."""

    def report_errors(self, take: TakeError) -> None:
        """Do nothing."""

    def send(self, datagram: memoryview | bytes, tos: int = 0) -> bool:  # noqa: ARG002
        """Do nothing."""
        return True

    def answer(self, message: bytes) -> None:
        """Do nothing."""

    def send_whole(self, datagram: memoryview | bytes, tos: int = 0) -> bool:  # noqa: ARG002
        """Do nothing."""
        return True

    def send_many(self, pieces: Pieces, each: int, size: int, tos: int = 0) -> int:  # noqa: ARG002
        """Do nothing."""
        return len(pieces) // each

    def close(self) -> None:
        """Do nothing."""


class Table:
    """A data path with one channel for each of many clients."""

    def __init__(self) -> None:
        relay = Scenario()
        self.counters = Counters()
        workspace = Workspace(self.counters)
        self.buffer = workspace.for_clients
        self.clients: list[ClientAddress] = []
        self.ports: list[Receiver] = []
        self.datapath = DataPath(
            relay.server,
            workspace,
            reach_client=Nothing().reach,
            open_socket=self._open_socket,
            public_hosts=relay.public_hosts,
            relay_ports=range(49152, 65536),
            channel_numbers=RFC8656_NUMBERS,
            timers=relay.time,
            unix_clock=lambda: UNIX_START,
            is_relay_host=lambda _: False,
        )
        requests = []
        for number in range(CLIENTS):
            client = relay.client(f"192.0.2.10:{10000 + number}")
            self.clients.append(client.address)
            requests += [
                client.signed(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL)),
                client.signed(
                    Method.CHANNEL_BIND,
                    (Attr.CHANNEL_NUMBER, NUMBER),
                    (Attr.XOR_PEER_ADDRESS, PEER),
                ),
            ]
        for number, request in enumerate(requests):
            self.buffer[: len(request)] = request
            self.datapath.clients.on_datagram(len(request), self.clients[number // 2])

    def _open_socket(self, _family: Family, _port: int, receiver: Receiver, /) -> Nothing:
        self.ports.append(receiver)
        return Nothing()


@pytest.fixture
def table() -> Table:
    return Table()
