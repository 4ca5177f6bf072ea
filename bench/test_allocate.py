"""How many requests one core can answer, if the sockets cost nothing.

A request goes through the whole state machine: decoded, its signature verified, checked,
carried out, and the signed answer encoded. One call serves one request, so the column OPS
is requests per second. The first benchmark begins with no allocations and ends with
:data:`ALLOCATIONS`; the others serve one client among that many.
"""

from collections.abc import Iterator
from typing import Final

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from relay.stun.attributes import Attr
from relay.stun.const import UDP_PROTOCOL, Method
from relay.turn.commands import ClientAddress, OpenPort, SendMessage
from relay.turn.ratelimit import ClientBudget
from relay.turn.server import Server
from tests.scenario import START, UNIX_START, Client, Scenario, request

ALLOCATIONS: Final = 5000


def test_allocate(benchmark: BenchmarkFixture) -> None:
    """Each by a new client, with a username of its own, and a port that opens at once."""
    relay = Scenario()
    requests = [(relay.server, allocate_of(client), client.address) for client in clients(relay)]
    waiting = iter(requests)

    benchmark.pedantic(allocate, setup=lambda: (next(waiting), {}), rounds=ALLOCATIONS)  # type: ignore[no-untyped-call]

    assert relay.server.allocations == ALLOCATIONS


def test_refresh(benchmark: BenchmarkFixture, alice: Client, crowd: Server) -> None:
    datagram = alice.signed(Method.REFRESH, (Attr.LIFETIME, 600))

    benchmark(ask, crowd, datagram, alice.address)


def test_channel_bind_again(benchmark: BenchmarkFixture, alice: Client, crowd: Server) -> None:
    """As clients do every few minutes, for each of their channels."""
    benchmark(ask, crowd, bind_of(alice), alice.address)


def test_binding(benchmark: BenchmarkFixture, alice: Client, crowd: Server) -> None:
    """For anyone: nothing is verified and nothing signed."""
    benchmark(ask, crowd, request(Method.BINDING).encode(), alice.address)


def test_allocate_without_credentials(
    benchmark: BenchmarkFixture, alice: Client, crowd: Server
) -> None:
    """The 401 with which every client begins, and which a flood would ask for."""
    datagram = request(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL)).encode()

    benchmark(ask, crowd, datagram, alice.address)


class Unlimited(ClientBudget):
    """A budget for who asks without end, in no time."""

    def is_spent(self, now: float) -> bool:  # noqa: ARG002
        """Say that there is more."""
        return False


def allocate(server: Server, datagram: bytes, client: ClientAddress) -> None:
    """Serve an Allocate whose port opens at once."""
    server.handle_request(datagram, client, now=START, unix_now=UNIX_START)
    command = server.next_command()
    assert isinstance(command, OpenPort)
    server.handle_port_opened(command.port, {}, now=START)
    assert isinstance(server.next_command(), SendMessage)
    assert server.next_command() is None


def ask(server: Server, datagram: bytes, client: ClientAddress) -> None:
    """Serve a request that is answered, and changes nothing that is relayed."""
    server.handle_request(datagram, client, now=START, unix_now=UNIX_START)
    assert isinstance(server.next_command(), SendMessage)
    assert server.next_command() is None


@pytest.fixture(scope="module")
def relay() -> Scenario:
    return Scenario()


@pytest.fixture(scope="module")
def crowd(relay: Scenario) -> Server:
    """Return a server with many clients."""
    requests = [(allocate_of(client), client.address) for client in clients(relay)]
    for datagram, address in requests:
        allocate(relay.server, datagram, address)
    return relay.server


@pytest.fixture(scope="module")
def alice(relay: Scenario, crowd: Server) -> Client:
    """Return one more client, with a channel."""
    client = relay.client("192.0.2.10:5000")
    allocate(crowd, allocate_of(client), client.address)
    allocation = crowd._tables.of_client(client.address)  # noqa: SLF001
    assert allocation is not None
    allocation.budget = Unlimited()
    crowd.handle_request(bind_of(client), client.address, now=START, unix_now=UNIX_START)
    while crowd.next_command() is not None:
        pass  # nothing is relayed here
    return client


def clients(relay: Scenario) -> Iterator[Client]:
    for number in range(ALLOCATIONS):
        yield relay.client(f"192.0.2.{100 + number % 100}:{10000 + number // 100}")


def allocate_of(client: Client) -> bytes:
    return client.signed(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL))


def bind_of(client: Client) -> bytes:
    return client.signed(
        Method.CHANNEL_BIND,
        (Attr.CHANNEL_NUMBER, 0x4000),
        (Attr.XOR_PEER_ADDRESS, ("198.51.100.7", 9000)),
    )
