"""The data path as one thing: its parts, put together."""

from collections.abc import Callable, Mapping

from relay.datapath.clientside import ClientSide
from relay.datapath.control import Control, Timers
from relay.datapath.destination import ClientDestination
from relay.datapath.relayport import OpenSocket, RelayPorts
from relay.datapath.routes import ReachClient, Routes
from relay.datapath.streamside import StreamSide
from relay.datapath.workspace import Workspace
from relay.stun.const import Family
from relay.turn.commands import ClientAddress, connection_of
from relay.turn.peers import PeerPolicy
from relay.turn.server import Server


class DataPath:
    """Everything between the sockets and the server."""

    def __init__(
        self,
        server: Server,
        workspace: Workspace,
        *,
        reach_client: ReachClient,
        open_socket: OpenSocket,
        public_hosts: Mapping[Family, str],
        relay_ports: range,
        channel_numbers: range,
        timers: Timers,
        unix_clock: Callable[[], float],
        is_relay_host: Callable[[str], bool],
    ) -> None:
        """Connect *server* with what sends and receives.

        ``reach_client(client)`` returns how a client is reached that speaks UDP.
        ``is_relay_host(host)`` tells if relay ports send from *host*.
        """
        self._reach_by_udp = reach_client
        self.ports = RelayPorts(workspace, open_socket, is_relay_host, timers.clock)
        self.routes = Routes(
            workspace,
            self.ports,
            self._reach_client,
            public_hosts,
            relay_ports,
            server.reaches_outside,
        )
        self.control = Control(
            server, self.ports, self.routes, self._reach_client, timers, unix_clock
        )
        self.clients = ClientSide(
            workspace,
            self.routes,
            self.ports,
            self.control.on_request,
            server.refuse_send,
            channel_numbers,
        )
        self.stream_clients = StreamSide(workspace, self.routes, self.control, self.clients)

    def _reach_client(self, client: ClientAddress) -> ClientDestination:
        if connection_of(client) is None:
            return self._reach_by_udp(client)
        return self.stream_clients.reach(client)

    def change_peer_policy(self, peer_policy: PeerPolicy) -> None:
        """Go on with other rules; channels that they forbid relay nothing from here on."""
        self.control.change_peer_policy(peer_policy)

    def when_empty(self, callback: Callable[[], None]) -> None:
        """Call *callback* when the last relay port is closed."""
        self.ports.on_last_closed = callback

    def close(self) -> None:
        """Close every relay port."""
        self.ports.close_all()
        self.routes.clear()
