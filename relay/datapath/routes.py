"""The routes: which channel of which client leads to which peer, and back; and permissions.

They are written here and nowhere else, by five commands of the server. Whoever else relays by
routes (a program in the kernel, say) is told of each change in the same place.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from relay.datapath.destination import ClientDestination, Destination, PeerDestination
from relay.datapath.hairpin import Hairpin
from relay.datapath.permitted import Permitted
from relay.datapath.relayport import RelayPort, RelayPorts
from relay.datapath.workspace import Workspace
from relay.stun.address import family_of
from relay.stun.const import Family
from relay.turn.commands import (
    BindChannel,
    ClientAddress,
    ClosePort,
    Drop,
    InstallPermissions,
    PeerAddress,
    RemovePermissions,
    UnbindChannel,
)
from relay.turn.indications import Peer, address_of

ReachClient = Callable[[ClientAddress], ClientDestination]
"""Returns how a client is reached."""

ReachesOutside = Callable[[PeerAddress], bool | None]
"""Tells whether datagrams to a peer may leave this relay; None if none may be sent to it."""


class RouteWatcher(Protocol):
    """Whoever else relays by the routes."""

    def bound(self, bind: BindChannel, /) -> None:
        """Relay this from here on. The client has not heard yet that it may send."""

    def unbinding(self, unbind: UnbindChannel, /) -> None:
        """Stop relaying this. The client has not heard yet that it is over."""

    def closing(self, close: ClosePort, /) -> None:
        """Stop relaying all channels that end with a port, which may be many."""

    def permitted(self, install: InstallPermissions, /) -> None:
        """Know that indications may be relayed, which is done here alone."""


class Routes:
    """The one table of what is relayed, kept where each direction looks it up.

    From a client it is found by (client, channel number), in :attr:`to_peer`; from a peer by its
    address, in the relay port. What is relayed by indications is found by client, in
    :attr:`permitted`, and from there as from a peer: by host, in the relay port.
    """

    def __init__(
        self,
        workspace: Workspace,
        ports: RelayPorts,
        reach_client: ReachClient,
        public_hosts: Mapping[Family, str],
        relay_ports: range,
        reaches_outside: ReachesOutside,
    ) -> None:
        """*public_hosts* and *relay_ports* tell what may be another allocation of this relay."""
        self._workspace = workspace
        self._ports = ports
        self._reach_client = reach_client
        self._public_hosts = public_hosts
        self._relay_ports = relay_ports
        self._reaches_outside = reaches_outside
        self.to_peer: dict[tuple[ClientAddress, int], Destination] = {}
        self.permitted: dict[ClientAddress, Permitted] = {}
        self.watchers: list[RouteWatcher] = []

    def bind(self, bind: BindChannel) -> None:
        """Relay between a client's channel and a peer, both ways."""
        port = self._ports[bind.port]
        port.serve(bind.client, self._reach_client)
        port.bind(bind.peer, bind.number)
        self.to_peer[bind.client, bind.number] = self._reach_peer(
            port, bind.peer, reaches_outside=bind.reaches_outside
        )
        for watcher in self.watchers:
            watcher.bound(bind)

    def unbind(self, unbind: UnbindChannel) -> None:
        """Undo what :meth:`bind` did."""
        for watcher in self.watchers:
            watcher.unbinding(unbind)
        del self.to_peer[unbind.client, unbind.number]
        self._ports[unbind.port].unbind(unbind.peer)

    def install(self, install: InstallPermissions) -> None:
        """Relay between a client and any port of some hosts by indications."""
        port = self._ports[install.port]
        port.serve(install.client, self._reach_client)
        self.permitted[install.client] = port.permit(
            install.hosts, reports_errors=install.reports_errors
        )
        for watcher in self.watchers:
            watcher.permitted(install)

    def remove(self, remove: RemovePermissions) -> None:
        """Undo what :meth:`install` did."""
        self._ports[remove.port].revoke(remove.hosts)

    def reach_permitted(self, permitted: Permitted, peer: Peer) -> PeerDestination | Drop:
        """Find the way to a peer that a Send indication names, and keep it for the next ones."""
        address = address_of(peer)
        if address is None:
            return Drop.MALFORMED_STUN
        if address[0] not in permitted:
            return Drop.NO_PERMISSION
        reaches_outside = self._reaches_outside(PeerAddress(address))
        if reaches_outside is None:
            return Drop.FORBIDDEN_PEER
        port = self._ports[permitted.port]
        way = self._reach_peer(port, PeerAddress(address), reaches_outside=reaches_outside)
        permitted.remember(peer, way)
        return way

    def close_port(self, close: ClosePort) -> None:
        """Undo it for all channels that end with their port, and give that up."""
        for watcher in self.watchers:
            watcher.closing(close)
        for number, _ in close.channels:
            del self.to_peer[close.client, number]
        peers = [peer for _, peer in close.channels]
        if not self._ports.close(close.port, close.families, peers):
            self.permitted.pop(close.client, None)

    def forget(self, client: ClientAddress, port: int, numbers: Iterable[int]) -> None:
        """Forget what is relayed for a client by these channels and by permissions.

        Watchers are told nothing, and the port stays open.
        """
        for number in numbers:
            del self.to_peer[client, number]
        self.permitted.pop(client, None)
        self._ports[port].forget()

    def clear(self) -> None:
        """Forget the routes from clients, at the end; those to clients go with their ports.

        Watchers are told nothing: they end at the same time.
        """
        self.to_peer.clear()
        self.permitted.clear()

    def _reach_peer(
        self, port: RelayPort, peer: PeerAddress, *, reaches_outside: bool
    ) -> PeerDestination:
        host, number = peer
        way_out = port.reach(peer)
        if host != self._public_hosts.get(family_of(host)) or number not in self._relay_ports:
            return way_out
        relayed_address = PeerAddress((host, port.number))
        outside = way_out if reaches_outside else None
        return Hairpin(self._workspace, self._ports, peer, relayed_address, outside)
