"""From one allocation of this relay to another: inside the process.

No kernel, NAT or hairpin of a router is needed for that.
"""

from relay.datapath.destination import PeerDestination, Pieces
from relay.datapath.relayport import RelayPorts
from relay.datapath.workspace import Workspace
from relay.turn.commands import Drop, PeerAddress


class Hairpin:
    """A peer at a port of our own public address that could be a relay port.

    Whether it is one may change at any time, so that is looked up for each datagram. If it is
    none, the datagram leaves like any other, unless the peer may be reached only as an
    allocation of ours, and is gone.
    """

    __slots__ = ("_outside", "_peer", "_ports", "_relayed_address", "_workspace")

    def __init__(
        self,
        workspace: Workspace,
        ports: RelayPorts,
        peer: PeerAddress,
        relayed_address: PeerAddress,
        outside: PeerDestination | None,
    ) -> None:
        """Send from *relayed_address* to *peer*; *outside* is the way there by the kernel."""
        self._workspace = workspace
        self._ports = ports
        self._peer = peer
        self._relayed_address = relayed_address
        self._outside = outside

    def send(self, datagram: memoryview | bytes, tos: int = 0) -> bool:
        """Hand a datagram to the other allocation; see :meth:`Destination.send`."""
        port = self._ports.at(self._peer)
        if port is not None:
            return port.relay(datagram, self._relayed_address, tos)
        if self._outside is not None:
            return self._outside.send(datagram, tos)
        self._workspace.drop(Drop.PEER_IS_GONE)
        return False

    def send_whole(self, datagram: memoryview | bytes, tos: int = 0) -> bool:
        """Do the same: within the process nothing is fragmented."""
        if self._outside is not None and self._ports.at(self._peer) is None:
            return self._outside.send_whole(datagram, tos)
        return self.send(datagram, tos)

    def send_many(self, pieces: Pieces, each: int, size: int, tos: int = 0) -> int:
        """Do the same with many; what is not relayed of them is left to be sent one by one."""
        port = self._ports.at(self._peer)
        if port is not None:
            if each > 1:
                pieces = [b"".join(pieces[at : at + each]) for at in range(0, len(pieces), each)]
            return port.relay_many(pieces, size, self._relayed_address, tos)
        return 0 if self._outside is None else self._outside.send_many(pieces, each, size, tos)
