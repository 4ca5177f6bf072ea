"""Every way to somebody keeps one contract, wherever the bytes lie that are to be sent."""

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from relay.datapath.destination import Destination, Pieces
from relay.datapath.hairpin import Hairpin
from relay.net.listening import ListeningSocket, WildcardSocket
from relay.net.offload import Offload
from relay.net.udp import Shared, UdpDestination, bind_udp
from tests.scenario import Scenario, ToClient, channel_data

Arrived = Callable[[int], list[bytes]]
Buffer = bytearray | memoryview
"""Returns so many payloads that have arrived."""


@pytest.fixture(params=["bound", "wildcard", "hairpin"])
def way(request: pytest.FixtureRequest) -> Iterator[tuple[Destination, Arrived, Buffer]]:
    """A destination, what arrives there, and the buffer that sockets read into."""
    with ExitStack() as stack:
        if request.param == "hairpin":
            yield by_hairpin()
        else:
            yield by_udp(request.param, stack)


def by_udp(kind: str, stack: ExitStack) -> tuple[Destination, Arrived, Buffer]:
    buffer = bytearray(100)
    shared = Shared(memoryview(buffer), fail, Offload(wanted=True))
    somebody = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    somebody.bind(("127.0.0.1", 0))
    somebody.settimeout(10)
    local = socket.inet_aton("127.0.0.1")
    destination: UdpDestination
    if kind == "bound":
        sock = stack.enter_context(bind_udp("127.0.0.1", 0, 65536))
        destination = ListeningSocket(sock, shared, Nobody()).reach((somebody.getsockname(), b""))
    else:
        sock = stack.enter_context(bind_udp("0.0.0.0", 0, 65536))
        wildcard = WildcardSocket(sock, shared, Nobody())
        destination = wildcard.reach((somebody.getsockname(), local))
    return destination, lambda count: [somebody.recv(65536) for _ in range(count)], buffer


def by_hairpin() -> tuple[Destination, Arrived, Buffer]:
    relay = Scenario()
    alice = relay.client("192.0.2.10:5000").allocates()
    bob = relay.client("192.0.2.11:5000").allocates()
    alice.binds(0x4001, bob.relayed_address)
    bob.binds(0x4002, alice.relayed_address)
    relay.sent()
    destination = relay.datapath.routes.to_peer[alice.address, 0x4001]
    assert isinstance(destination, Hairpin)

    def arrived(count: int) -> list[bytes]:
        sent = relay.sent()
        assert [type(one) for one in sent] == [ToClient] * count
        frames = [one.datagram for one in sent if isinstance(one, ToClient)]
        payloads = [frame[4:] for frame in frames]
        assert frames == [channel_data(0x4002, payload) for payload in payloads]
        return payloads

    return destination, arrived, relay.buffer


def test_what_is_given_is_sent(way: tuple[Destination, Arrived, Buffer]) -> None:
    """And not what the buffer happens to hold: that is somebody else's."""
    destination, arrived, buffer = way
    buffer[:20] = b"S" * 20
    for datagram in (b"hello", memoryview(b"hello again")[6:], b""):
        assert destination.send(datagram)
        assert arrived(1) == [bytes(datagram)]


def test_of_many_too(way: tuple[Destination, Arrived, Buffer]) -> None:
    destination, arrived, buffer = way
    buffer[:20] = b"S" * 20
    pieces: Pieces = [b"he", b"llo", b"al", b"ice", b"b", b"ob"]

    assert destination.send_many(pieces, 2, 5) == 3
    assert arrived(3) == [b"hello", b"alice", b"bob"]
    assert destination.send_many([b"one", b"two", b"3"], 1, 3) == 3
    assert arrived(3) == [b"one", b"two", b"3"]


class Nobody:
    """Receives nothing."""

    def on_datagram(self, *_: object) -> None:
        raise AssertionError("a datagram")

    def on_segments(self, *_: object) -> int:
        raise AssertionError("segments")


def fail(what: str) -> None:
    raise AssertionError(what)
