"""What a live allocation costs while nothing happens: in memory, and in CPU time.

Run it with ``python -m bench.memory [ALLOCATIONS]``. Server, data path, reactor and relay
sockets are the real ones; only the listening socket is missing, so that nobody has to take
the answers. The memory is what Python holds for each allocation, with the objects of its socket,
but without the kernel's memory and the interpreter's own. The CPU time is that of the reactor
waiting with all the sockets open.
"""

import resource
import sys
import time
import tracemalloc
from typing import Final

from relay.datapath.datapath import DataPath
from relay.datapath.destination import Pieces
from relay.datapath.workspace import Workspace
from relay.net.offload import Offload
from relay.net.reactor import Reactor
from relay.net.udp import PortOpener, Shared
from relay.observe.counters import Counters
from relay.stun.attributes import Attr
from relay.stun.const import UDP_PROTOCOL, Family, Method
from relay.turn.channeldata import RFC8656_NUMBERS
from relay.turn.commands import ClientAddress
from tests.scenario import START, UNIX_START, Client, Scenario

ALLOCATIONS: Final = 10_000
PORTS: Final = range(30000, 65536)
SPARE_DESCRIPTORS: Final = 64
IDLE: Final = 5.0  # seconds


def main(count: int) -> None:
    """Measure with so many allocations, and print what came out."""
    relay = Idle()
    clients = [relay.client(number) for number in range(count)]
    # Ready before anything is traced: what the clients hold is not the relay's.
    allocates, binds = list(map(allocate_of, clients)), list(map(bind_of, clients))

    tracemalloc.start()
    empty, _ = tracemalloc.get_traced_memory()
    relay.serves(allocates)
    allocated, _ = tracemalloc.get_traced_memory()
    relay.serves(binds)
    bound, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert relay.scenario.server.allocations == count
    assert not relay.counters.dropped
    print(f"live allocations             {count:8}")
    print(f"bytes per allocation         {(allocated - empty) / count:8.0f}")
    print(f"bytes more, for one channel  {(bound - allocated) / count:8.0f}")

    relay.waits(0.1)  # in which the C library sorts what tracemalloc has freed
    cpu, iterations = relay.waits(IDLE)
    print(f"CPU while idle, ms per s     {1000 * cpu / IDLE:8.3f}")
    print(f"iterations of the reactor    {iterations:8}   in {IDLE:.0f} s")
    relay.close()


class Idle:
    """A relay whose clients have no sockets."""

    def __init__(self, ports: range = PORTS) -> None:
        self.scenario = Scenario(ports=ports)
        self.counters = Counters()
        began = time.monotonic()
        self._reactor = Reactor(clock=lambda: START + time.monotonic() - began)
        workspace = Workspace(self.counters)
        self._buffer = workspace.for_clients
        self._datapath = DataPath(
            self.scenario.server,
            workspace,
            reach_client=Unheard,
            open_socket=PortOpener(
                self._reactor,
                {Family.IPV4: "127.0.0.1", Family.IPV6: "::1"},
                Shared(workspace.for_peers, self.counters.lost, Offload(wanted=True)),
            ).open,
            public_hosts=self.scenario.public_hosts,
            relay_ports=ports,
            channel_numbers=RFC8656_NUMBERS,
            timers=self._reactor,
            unix_clock=lambda: UNIX_START,
            is_relay_host=lambda _: False,
        )

    def client(self, number: int) -> Client:
        """Return a client with credentials of its own."""
        return self.scenario.client("{}:{}".format(*address_of(number)))

    def serves(self, requests: list[bytes]) -> None:
        """Serve a request of each client. Its address is new each time, as from the kernel."""
        for number, request in enumerate(requests):
            self._buffer[: len(request)] = request
            client = ClientAddress((address_of(number), bytes([192, 0, 2, 1])))
            self._datapath.clients.on_datagram(len(request), client)

    def waits(self, seconds: float) -> tuple[float, int]:
        """Let the reactor wait; return the CPU time it took, and how often it woke up."""
        ended: list[bool] = []
        self._reactor.call_later(seconds, lambda: ended.append(True))
        began, iterations = time.process_time(), 0
        while not ended:
            self._reactor.iterate()
            iterations += 1
        return time.process_time() - began, iterations

    def close(self) -> None:
        """Give the ports back."""
        self._datapath.close()
        self._reactor.close()


class Unheard:
    """The way to a client that takes no answers. It holds what a real one does."""

    __slots__ = ("_address", "_lost", "_segments", "_sendto")

    def __init__(self, client: ClientAddress) -> None:
        self._address = client
        self._sendto = self._address.index  # a bound method

    def send(self, datagram: memoryview | bytes, tos: int = 0) -> bool:  # noqa: ARG002
        """Do nothing."""
        return True

    def answer(self, message: bytes) -> None:
        """Do nothing."""

    def send_many(self, pieces: Pieces, each: int, size: int, tos: int = 0) -> int:  # noqa: ARG002
        """Do nothing."""
        return len(pieces) // each


def address_of(number: int) -> tuple[str, int]:
    return f"192.0.2.{10 + number // 50_000}", 10_000 + number % 50_000


def allocate_of(client: Client) -> bytes:
    """Return an Allocate for longer than the measurement takes."""
    return client.signed(
        Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL), (Attr.LIFETIME, 3600)
    )


def bind_of(client: Client) -> bytes:
    return client.signed(
        Method.CHANNEL_BIND,
        (Attr.CHANNEL_NUMBER, 0x4000),
        (Attr.XOR_PEER_ADDRESS, ("198.51.100.7", 9000)),
    )


def allow_descriptors(count: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count:
        sys.exit(f"at most {hard} descriptors are allowed (ulimit -Hn), {count} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else ALLOCATIONS
    allow_descriptors(wanted + SPARE_DESCRIPTORS)
    main(wanted)
