"""What it costs to read an authenticated Allocate, and to write its success.

Every request is decoded once and answered once, so this is what the wire format takes of
the time that ``test_allocate.py`` measures. Reading does not verify the signature; writing
makes one.
"""

from typing import Final

from pytest_benchmark.fixture import BenchmarkFixture

from relay.stun.attributes import Attr
from relay.stun.const import UDP_PROTOCOL, Kind, Method
from relay.stun.message import Message, decode
from tests.scenario import Scenario

TRANSACTION_ID: Final = bytes(range(12))


def test_decode_an_authenticated_allocate(benchmark: BenchmarkFixture) -> None:
    alice = Scenario().client("192.0.2.10:5000")
    datagram = alice.signed(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL))

    received = benchmark(decode, datagram)

    assert received.integrity_offset is not None
    assert received.message.get(Attr.USERNAME) == alice.username


def test_encode_the_success_of_an_allocate(benchmark: BenchmarkFixture) -> None:
    alice = Scenario().client("192.0.2.10:5000")
    message = Message(
        Kind.SUCCESS,
        Method.ALLOCATE,
        TRANSACTION_ID,
        [
            (Attr.XOR_RELAYED_ADDRESS, ("192.0.2.1", 50000)),
            (Attr.XOR_MAPPED_ADDRESS, alice.host_and_port),
            (Attr.LIFETIME, 600),
        ],
    )

    datagram = benchmark(message.encode, alice.key)

    assert decode(datagram).message.get(Attr.LIFETIME) == 600
