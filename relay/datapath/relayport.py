"""Relay ports: what peers send to one goes to the client whose allocation it is."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from relay.datapath.destination import Destination, PeerDestination, Pieces
from relay.datapath.permitted import Permitted
from relay.datapath.workspace import FRAME_AT, Workspace
from relay.net.udp import Receiver
from relay.stun.address import Address, family_of
from relay.stun.const import Family
from relay.turn.channeldata import HEADER, HEADER_SIZE
from relay.turn.commands import ClientAddress, Drop, PeerAddress, transport_of
from relay.turn.indications import Icmp

_pack, _pack_into = HEADER.pack, HEADER.pack_into


class RelaySocket(Protocol):
    """The socket of a relay port in one family."""

    @property
    def host(self) -> str:
        """The address that it is bound to, which may be a wildcard."""

    def reach(self, address: Any, /) -> PeerDestination:  # noqa: ANN401
        """Return how to send to a peer from here."""

    def report_errors(self, take: Callable[[Any, Icmp], None], /) -> None:
        """Call ``take(peer, icmp)`` for each ICMP error about what was sent from here."""

    def look_for_marks(self) -> None:
        """Look at the next datagrams for DSCP and ECN: a flow may begin."""

    def close(self) -> None:
        """Give up the port."""


OpenSocket = Callable[[Family, int, Receiver], RelaySocket]
"""Binds a port in one family; the receiver takes what arrives there. Raises OSError."""


class RelayPort:
    """A relay port: its socket in each family, and what its peers may send to the client.

    A peer that is bound to a channel has a route, as ChannelData; what others send is
    :class:`Permitted`, or not. Peers are told apart by host and port, so one table does for both
    families.
    """

    __slots__ = (
        "_buffer",
        "_client",
        "_clock",
        "_framed",
        "_permitted",
        "_routes",
        "_sizes",
        "_sockets",
        "_workspace",
        "number",
    )

    def __init__(self, number: int, workspace: Workspace, clock: Callable[[], float]) -> None:
        """Begin without a socket. *clock* tells monotonic seconds."""
        self.number = number
        self._clock = clock
        self._workspace = workspace
        self._buffer = workspace.buffer
        self._framed = workspace.framed
        self._sizes = workspace.counters.to_client
        self._sockets: dict[Family, RelaySocket] = {}
        self._routes: dict[PeerAddress, int] = {}  # the client's channel number for each peer
        self._permitted: Permitted | None = None  # once somebody is
        self._client: Destination | None = None  # once something may be relayed to it

    def open(
        self, open_socket: OpenSocket, number: int, families: Iterable[Family]
    ) -> dict[Family, OSError]:
        """Bind the port in each family that it can be bound in; return what failed."""
        failures: dict[Family, OSError] = {}
        try:
            for family in families:
                try:
                    self._sockets[family] = open_socket(family, number, self)
                except OSError as error:
                    # A traceback leads to this frame and so back to the error: a cycle.
                    failures[family] = error.with_traceback(None)
        except BaseException:
            self.close()
            raise
        return failures

    @property
    def sockets(self) -> Mapping[Family, RelaySocket]:
        """Its socket in each family that it is bound in."""
        return self._sockets

    def forget(self) -> None:
        """Forget whose it is and what is relayed through it; it stays open."""
        self._routes.clear()
        self._permitted = self._client = None

    def is_open_in(self, family: Family) -> bool:
        """Tell if the port is bound in a family."""
        return family in self._sockets

    def host(self, family: Family) -> str:
        """Return the address that it is bound to in a family, which may be a wildcard."""
        return self._sockets[family].host

    def reach(self, peer: PeerAddress) -> PeerDestination:
        """Return how to send to a peer from here."""
        return self._sockets[family_of(peer[0])].reach(peer)

    def serve(
        self, client: ClientAddress, reach_client: Callable[[ClientAddress], Destination]
    ) -> None:
        """Relay to *client*, whose allocation it is."""
        if self._client is None:
            self._client = reach_client(client)
            self._sizes = self._workspace.counters.by_transport[transport_of(client)].to_client

    def bind(self, peer: PeerAddress, number: int) -> None:
        """Relay what *peer* sends to the client, as that *number*'s ChannelData."""
        self._routes[peer] = number
        self._sockets[family_of(peer[0])].look_for_marks()

    def unbind(self, peer: PeerAddress) -> None:
        """Relay nothing from *peer* any more."""
        del self._routes[peer]

    def permit(self, hosts: list[str], *, reports_errors: bool) -> Permitted:
        """Relay what comes from any port of *hosts*, and return by what that is known."""
        permitted = self._permitted
        if permitted is None:
            assert self._client is not None
            permitted = Permitted(
                self.number, self._workspace, self._client, self._sizes, self._clock
            )
            self._permitted = permitted
        permitted.permit(hosts)
        for sock in self._sockets.values():
            sock.look_for_marks()
            if reports_errors:
                sock.report_errors(permitted.on_error)
        return permitted

    def revoke(self, hosts: list[str]) -> None:
        """Relay nothing more of *hosts*, and to them, but in channels."""
        assert self._permitted is not None
        self._permitted.revoke(hosts)

    def on_datagram(self, size: int, peer: PeerAddress, tos: int = 0) -> bool:
        """Relay a datagram whose *size* bytes lie in the buffer, behind room for the header.

        Returns whether it was relayed.
        """
        number = self._routes.get(peer)
        if number is None:
            if self._permitted is not None:
                return self._permitted.indicate(size, peer, tos)
            self._workspace.drop(Drop.UNBOUND_PEER)
            return False
        _pack_into(self._buffer, FRAME_AT, number, size)
        assert self._client is not None
        if self._client.send(self._framed[HEADER_SIZE + size], tos):
            self._sizes[size] += 1
            return True
        return False

    def on_segments(self, size: int, segment: int, peer: PeerAddress, tos: int = 0) -> int:
        """Relay datagrams whose *size* bytes lie in the buffer, behind room for one header.

        Each is of *segment* bytes; the last may be shorter. Returns how many of them had to be
        handled singly.
        """
        all_of_it = self._workspace.for_peers[:size]
        payloads: Pieces = [all_of_it[at : at + segment] for at in range(0, size, segment)]
        relayed = self.relay_many(payloads, segment, peer, tos)
        for payload in payloads[relayed:]:
            self.relay(payload, peer, tos)
        return len(payloads) - relayed

    def relay(self, payload: memoryview | bytes, peer: PeerAddress, tos: int) -> bool:
        """Relay a payload that may lie anywhere; return whether it was relayed."""
        size = len(payload)
        self._workspace.for_peers[:size] = payload
        return self.on_datagram(size, peer, tos)

    def relay_many(self, payloads: Pieces, size: int, peer: PeerAddress, tos: int) -> int:
        """Relay payloads of *size* bytes at once; the last may be shorter, none is empty.

        Returns how many were relayed, from the first on.
        """
        number = self._routes.get(peer)
        if number is None:
            if self._permitted is None:
                return 0
            return self._permitted.indicate_many(payloads, size, peer, tos)
        pieces: Pieces = [_pack(number, size)] * (2 * len(payloads))
        pieces[1::2] = payloads
        pieces[-2] = _pack(number, len(payloads[-1]))
        assert self._client is not None
        sent = self._client.send_many(pieces, 2, HEADER_SIZE + size, tos)
        self._workspace.count_many(self._sizes, sent, payloads, size)
        return sent

    def close_in(self, families: Iterable[Family], peers: Iterable[PeerAddress]) -> bool:
        """Give up the port in some families, with the routes from *peers*, which are in these.

        Returns whether it is open in another one.
        """
        for family in families:
            self._sockets.pop(family).close()
        for peer in peers:
            del self._routes[peer]
        if self._permitted is not None:
            self._permitted.close_in(families)
        return bool(self._sockets)

    def close(self) -> None:
        """Give up the port in every family."""
        for sock in self._sockets.values():
            sock.close()
        # A socket refers to this port, its receiver, and ways out refer to their socket: as
        # cycles, they would stay until the garbage collector runs.
        self._sockets.clear()
        self._permitted = None


class RelayPorts:
    """The relay ports that are open, by number."""

    def __init__(
        self,
        workspace: Workspace,
        open_socket: OpenSocket,
        is_relay_host: Callable[[str], bool],
        clock: Callable[[], float],
    ) -> None:
        """``is_relay_host(host)`` tells if relay ports send from *host*."""
        self._clock = clock
        self._workspace = workspace
        self._open_socket = open_socket
        self._is_relay_host = is_relay_host
        self._ports: dict[int, RelayPort] = {}
        self.on_last_closed: Callable[[], None] | None = None

    def __getitem__(self, number: int) -> RelayPort:
        return self._ports[number]

    def at(self, address: Address) -> RelayPort | None:
        """Return the port of that number, if it is open in the family of *address*."""
        port = self._ports.get(address[1])
        return port if port is not None and port.is_open_in(family_of(address[0])) else None

    def is_source(self, address: Address) -> bool:
        """Tell if what comes from *address* was sent by one of these ports."""
        return self.at(address) is not None and self._is_relay_host(address[0])

    def __contains__(self, number: int) -> bool:
        return number in self._ports

    def open(
        self,
        number: int,
        families: tuple[Family, ...],
        open_socket: OpenSocket | None = None,
    ) -> dict[Family, OSError]:
        """Bind a port in each family that it can be bound in; return what failed.

        With *open_socket* it comes from there, instead of being bound.
        """
        port = RelayPort(number, self._workspace, self._clock)
        failures = port.open(open_socket or self._open_socket, number, families)
        if len(failures) < len(families):
            self._ports[number] = port
        return failures

    def close(
        self, number: int, families: Iterable[Family], peers: Iterable[PeerAddress] = ()
    ) -> bool:
        """Give up a port in some families, with the routes from *peers*, which are in these.

        Returns whether it is open in another one.
        """
        is_open = self._ports[number].close_in(families, peers)
        if not is_open:
            del self._ports[number]
        if not self._ports and self.on_last_closed is not None:
            self.on_last_closed()
        return is_open

    def close_all(self) -> None:
        """Give up every port."""
        for port in self._ports.values():
            port.close()
        self._ports.clear()
