"""The routes: which channel of which client leads to which peer, and back.

They are written here and nowhere else, by three commands of the server. Whoever else relays by
them (a program in the kernel, say) is told of each change in the same place.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

from relay.datapath.destination import Destination
from relay.datapath.hairpin import Hairpin
from relay.datapath.relayport import RelayPorts
from relay.datapath.workspace import Workspace
from relay.stun.address import family_of
from relay.stun.const import Family
from relay.turn.commands import (
    BindChannel,
    ClientAddress,
    ClosePort,
    PeerAddress,
    UnbindChannel,
)

ReachClient = Callable[[ClientAddress], Destination]
"""Returns how a client is reached."""


class RouteWatcher(Protocol):
    """Whoever else relays by the routes."""

    def bound(self, bind: BindChannel, /) -> None:
        """Relay this from here on. The client has not heard yet that it may send."""

    def unbinding(self, unbind: UnbindChannel, /) -> None:
        """Stop relaying this. The client has not heard yet that it is over."""


class Routes:
    """The one table of what is relayed, kept where each direction looks it up.

    From a client it is found by (client, channel number), in :attr:`to_peer`; from a peer by its
    address, in the relay port.
    """

    def __init__(
        self,
        workspace: Workspace,
        ports: RelayPorts,
        reach_client: ReachClient,
        public_hosts: Mapping[Family, str],
        relay_ports: range,
    ) -> None:
        """*public_hosts* and *relay_ports* tell what may be another allocation of this relay."""
        self._workspace = workspace
        self._ports = ports
        self._reach_client = reach_client
        self._public_hosts = public_hosts
        self._relay_ports = relay_ports
        self.to_peer: dict[tuple[ClientAddress, int], Destination] = {}
        self.watchers: list[RouteWatcher] = []

    def bind(self, bind: BindChannel) -> None:
        """Relay between a client's channel and a peer, both ways."""
        reach_client = partial(self._reach_client, bind.client)
        self._ports[bind.port].bind(bind.peer, bind.number, reach_client)
        self.to_peer[bind.client, bind.number] = self._reach_peer(bind)
        for watcher in self.watchers:
            watcher.bound(bind)

    def unbind(self, unbind: UnbindChannel) -> None:
        """Undo what :meth:`bind` did."""
        for watcher in self.watchers:
            watcher.unbinding(unbind)
        del self.to_peer[unbind.client, unbind.number]
        self._ports[unbind.port].unbind(unbind.peer)

    def close_port(self, close: ClosePort) -> None:
        """Undo it for all channels that end with their port, and give that up."""
        for watcher in self.watchers:
            for number, peer in close.channels:
                watcher.unbinding(UnbindChannel(close.client, number, close.port, peer))
        for number, _ in close.channels:
            del self.to_peer[close.client, number]
        self._ports.close(close.port, close.families, [peer for _, peer in close.channels])

    def clear(self) -> None:
        """Forget the routes from clients, at the end; those to clients go with their ports.

        Watchers are told nothing: they end at the same time.
        """
        self.to_peer.clear()

    def _reach_peer(self, bind: BindChannel) -> Destination:
        host, port = bind.peer
        way_out = self._ports[bind.port].reach(bind.peer)
        if host != self._public_hosts.get(family_of(host)) or port not in self._relay_ports:
            return way_out
        relayed_address = PeerAddress((host, bind.port))
        outside = way_out if bind.reaches_outside else None
        return Hairpin(self._workspace, self._ports, bind.peer, relayed_address, outside)
