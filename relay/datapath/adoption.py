"""Going on where another process stops: its allocations, with the sockets that it has open.

Nothing is read from these sockets before that process has stopped, and nothing is changed about
them: until then they are its own, and it may end before we begin.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from relay.datapath.datapath import DataPath
from relay.datapath.relayport import RelaySocket
from relay.net.udp import Receiver
from relay.stun.const import Family
from relay.turn.commands import ClientAddress
from relay.turn.records import Record, UnreadableState
from relay.turn.tables import Allocation, Binding
from relay.turn.transfer import Transfer

S = TypeVar("S")
"""A socket as the system knows it."""


class InheritedRoutes(Protocol):
    """What relays the same channels elsewhere (in the kernel), and goes on with it meanwhile."""

    def inherit(self, client: ClientAddress, written: Mapping[str, str], /) -> None:
        """Know what is relayed there for a client, as the other process has written it down."""

    def disown(self, client: ClientAddress, /) -> None:
        """Know nothing of a client any more; the other process sees to what there is."""


@dataclass(slots=True)
class Arrival(Generic[S]):
    """An allocation of the other process."""

    record: Record
    sockets: Mapping[Family, S] | None  # of its port; None: as they came before
    in_kernel: Mapping[str, str]  # what is relayed for it there


class Adoption(Generic[S]):
    """Takes over allocations, once or, where one has changed meanwhile, again."""

    def __init__(
        self,
        datapath: DataPath,
        transfer: Transfer,
        adopt_socket: Callable[[S, Receiver], RelaySocket],
        in_kernel: InheritedRoutes | None = None,
    ) -> None:
        """``adopt_socket(sock, receiver)`` has a socket read; the receiver takes what arrives."""
        self._datapath = datapath
        self._transfer = transfer
        self._adopt_socket = adopt_socket
        self._in_kernel = in_kernel

    def apply(self, changed: Iterable[ClientAddress], arrivals: Iterable[Arrival[S]]) -> None:
        """Forget what the *changed* clients had, and go on with all that arrives.

        Raises UnreadableState, OSError.
        """
        ports = self._datapath.ports
        vacant = {port for client in changed if (port := self._forget(client)) is not None}
        for arrival in arrivals:
            vacant.discard(self._adopt(arrival).port)
        for number in vacant:
            ports.close(number, list(ports[number].sockets))

    def _forget(self, client: ClientAddress) -> int | None:
        """Forget what a client had; return its port, which is still open."""
        allocation = self._transfer.evict(client)
        if allocation is None:
            return None
        bound = [
            number
            for number, channel in allocation.channels.items()
            if channel.state is Binding.BOUND
        ]
        self._datapath.routes.forget(client, allocation.port, bound)
        if self._in_kernel is not None:
            self._in_kernel.disown(client)
        return allocation.port

    def _adopt(self, arrival: Arrival[S]) -> Allocation:
        def open_port(allocation: Allocation) -> None:
            if self._in_kernel is not None:
                self._in_kernel.inherit(allocation.client, arrival.in_kernel)
            if arrival.sockets is None:
                self._narrow(allocation)
            else:
                self._open(allocation, arrival.sockets)

        return self._datapath.control.adopt(arrival.record, open_port)

    def _narrow(self, allocation: Allocation) -> None:
        """Close a port that is here in the families that the allocation has lost."""
        ports, number = self._datapath.ports, allocation.port
        if number not in ports:
            raise UnreadableState(f"there is no socket of port {number}")
        lost = [family for family in ports[number].sockets if family not in allocation.families]
        if lost:
            ports.close(number, lost)

    def _open(self, allocation: Allocation, sockets: Mapping[Family, S]) -> None:
        ports, number = self._datapath.ports, allocation.port
        if number in ports:  # of another allocation, which has ended
            ports.close(number, list(ports[number].sockets))

        def adopt(family: Family, _number: int, receiver: Receiver) -> RelaySocket:
            return self._adopt_socket(sockets[family], receiver)

        if not set(allocation.families) <= sockets.keys():
            raise UnreadableState(f"there is no socket of port {number}")
        for error in ports.open(number, allocation.families, adopt).values():
            raise error
