"""Where TURN meets the sockets. Read this first.

Every datagram comes through here. STUN goes to the :class:`~relay.turn.server.Server`,
which leaves commands that are carried out at once. Relayed data never gets that far: it
is one look into a table of routes, and out again.

===========================  ============================================================
client to peer               :meth:`Forwarder.on_client_datagram` strips the four bytes of
                             ChannelData; the route is found by (client, channel number)
peer to client               :meth:`Forwarder.on_peer_datagram` puts them in front; the
                             route is found by the peer's address, per relay port
===========================  ============================================================

The routes are written by two commands only, ``BindChannel`` and ``UnbindChannel``, so
whatever is not bound right now is not relayed. All sockets read into one buffer. A payload
always lies at offset 4 of it, behind room for the header, and is never copied.
"""

import errno
import logging
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol, assert_never

from relay.metrics import Counters
from relay.stun.address import family_of
from relay.stun.const import Family
from relay.turn.channeldata import HEADER, HEADER_SIZE, parse
from relay.turn.commands import (
    BindChannel,
    ClientAddress,
    ClosePort,
    Drop,
    OpenPort,
    PeerAddress,
    PortFailure,
    SendMessage,
    UnbindChannel,
)
from relay.turn.peers import PeerPolicy
from relay.turn.server import Server

logger = logging.getLogger("relay.forwarder")

LARGEST_DATAGRAM: Final = 65535
# STUN over UDP stays below the MTU (RFC 8489 §6.1); longer messages only cost time to read.
LARGEST_STUN: Final = 2048
_NEITHER: Final = 0xFF  # a first byte that is neither STUN nor ChannelData
_pack_into = HEADER.pack_into

ToPeer = tuple[Callable[[memoryview, PeerAddress], bool], PeerAddress]
"""How to reach a peer: the sending end, and where to."""

ToClient = tuple[int, Callable[[memoryview, ClientAddress], bool], ClientAddress]
"""How to reach a client: the channel number for the header, the sending end, and where to."""


class Listener(Protocol):
    """The socket that clients of one family talk to."""

    def send(self, datagram: memoryview | bytes, to: ClientAddress) -> bool:
        """Send one datagram, or count it as lost; return whether it was sent."""


class RelaySocket(Protocol):
    """The socket of a relay port in one family."""

    def send(self, datagram: memoryview, to: PeerAddress) -> bool:
        """Send one datagram, or count it as lost; return whether it was sent."""

    def close(self) -> None:
        """Give up the port."""


OpenPortIn = Callable[[Family, int, Callable[[int, PeerAddress], None]], RelaySocket]
"""Bind a port, and call back with size and source of each datagram. Raises OSError."""


class Timers(Protocol):
    """The part of the reactor that knows the time."""

    clock: Callable[[], float]

    def call_at(self, deadline: float, callback: Callable[[], None]) -> None:
        """Call *callback* at *deadline*, instead of when it was to be called before."""

    def cancel(self, callback: Callable[[], None]) -> None:
        """Do not call *callback*."""


class Forwarder:
    """Feeds datagrams to the server and carries out its commands; relays data itself."""

    def __init__(
        self,
        server: Server,
        *,
        buffer: bytearray,
        listeners: dict[Family, Listener],
        open_port: OpenPortIn,
        public_hosts: dict[Family, str],
        relay_ports: range,
        channel_numbers: range,
        timers: Timers,
        unix_clock: Callable[[], float],
        is_relay_host: Callable[[str], bool],
        counters: Counters,
    ) -> None:
        """Connect *server* with what sends and receives.

        Clients' datagrams are read to the start of *buffer*, peers' to
        :data:`~relay.turn.channeldata.HEADER_SIZE` bytes after it. ``is_relay_host(host)``
        tells if relay ports send from *host*.
        """
        self._server = server
        self._buffer = buffer
        self._view = memoryview(buffer)
        self._listeners = listeners
        self._open_port = open_port
        self._public_hosts = public_hosts
        self._relay_ports = relay_ports
        self._last_channel_byte = channel_numbers[-1] >> 8
        self._timers = timers
        self._unix_clock = unix_clock
        self._is_relay_host = is_relay_host
        self._counters = counters
        self._sizes_to_peer = counters.to_peer
        self._sizes_to_client = counters.to_client
        self._ports: dict[int, _Port] = {}
        self._to_peer: dict[tuple[ClientAddress, int], ToPeer] = {}
        self.on_last_port_closed: Callable[[], None] | None = None

    def on_client_datagram(self, size: int, client: ClientAddress) -> None:
        """Serve a datagram of *size* bytes from *client*, which lies at the buffer's start."""
        first = self._buffer[0] if size else _NEITHER
        if 0x40 <= first <= self._last_channel_byte:
            self._on_channel_data(size, client)
        elif first <= 0x03:
            self._on_stun(size, client)
        else:
            self._drop(Drop.UNKNOWN_PROTOCOL)

    def on_peer_datagram(
        self, routes: dict[PeerAddress, ToClient], size: int, peer: PeerAddress
    ) -> None:
        """Relay a datagram whose *size* bytes lie in the buffer, behind room for the header.

        *routes* are those of the relay port at which it arrived.
        """
        route = routes.get(peer)
        if route is None:
            self._drop(Drop.UNBOUND_PEER)
            return
        number, send, client = route
        _pack_into(self._buffer, 0, number, size)
        if send(self._view[: HEADER_SIZE + size], client):
            self._sizes_to_client[size] += 1

    def on_timeout(self) -> None:
        """Let the server end what is due."""
        try:
            self._server.handle_timeout(self._timers.clock())
        finally:  # whatever happened, the next deadline must be set
            self._run_commands()

    def change_peer_policy(self, peer_policy: PeerPolicy) -> None:
        """Go on with other rules; channels that they forbid relay nothing from here on."""
        self._server.change_peer_policy(peer_policy, now=self._timers.clock())
        self._run_commands()

    def close(self) -> None:
        """Close every relay port."""
        for port in self._ports.values():
            port.close()
        self._ports.clear()
        self._to_peer.clear()

    def _on_channel_data(self, size: int, client: ClientAddress) -> None:
        frame = parse(self._buffer, size)
        if frame is None:
            self._drop(Drop.MALFORMED_CHANNEL_DATA)
            return
        number, length = frame
        route = self._to_peer.get((client, number))
        if route is None:
            self._drop(Drop.UNBOUND_CHANNEL)
            return
        send, peer = route
        if send(self._view[HEADER_SIZE : HEADER_SIZE + length], peer):
            self._sizes_to_peer[length] += 1

    def _on_stun(self, size: int, client: ClientAddress) -> None:
        host, port = client[0][:2]
        if port == 0:  # no answer could reach it
            self._drop(Drop.NO_SOURCE_PORT)
            return
        if size > LARGEST_STUN:
            self._drop(Drop.OVERSIZED_STUN)
            return
        if self._is_relayed_here(host, port):
            # Or a client could stack allocations into a loop. RFC 8656 §21.1.7
            self._drop(Drop.FROM_ITSELF)
            return
        drop = self._server.handle_request(
            bytes(self._view[:size]),
            client,
            now=self._timers.clock(),
            unix_now=self._unix_clock(),
        )
        if drop is not None:
            self._drop(drop)
            return
        self._run_commands()

    def _is_relayed_here(self, host: str, port: int) -> bool:
        """Tell if one of our own relay ports is the source of a datagram."""
        relay_port = self._ports.get(port)
        if relay_port is None or family_of(host) not in relay_port.sockets:
            return False
        return self._is_relay_host(host)

    def _run_commands(self) -> None:
        while (command := self._server.next_command()) is not None:
            match command:
                case SendMessage(to, message):
                    self._listener(to).send(message, to)
                case OpenPort(port, families):
                    self._open(port, families)
                case ClosePort(port):
                    self._close(port)
                case BindChannel():
                    self._bind(command)
                case UnbindChannel():
                    self._unbind(command)
                case _:
                    assert_never(command)
        deadline = self._server.poll_timeout()
        if deadline is None:
            self._timers.cancel(self.on_timeout)
        else:
            self._timers.call_at(deadline, self.on_timeout)

    def _open(self, number: int, families: tuple[Family, ...]) -> None:
        """Bind the port in each family, then tell the server how it went."""
        port = _Port()
        try:
            for family in families:
                on_datagram = partial(self.on_peer_datagram, port.routes)
                port.sockets[family] = self._open_port(family, number, on_datagram)
        except OSError as error:
            port.close()
            if error.errno == errno.EADDRINUSE:
                failure = PortFailure.IN_USE
            else:
                failure = PortFailure.REFUSED
                logger.warning("cannot open a relay port: %s", error.strerror)
            self._server.handle_port_failed(number, failure)
        else:
            self._ports[number] = port
            self._server.handle_port_opened(number, now=self._timers.clock())

    def _close(self, number: int) -> None:
        self._ports.pop(number).close()
        if not self._ports and self.on_last_port_closed is not None:
            self.on_last_port_closed()

    def _bind(self, bind: BindChannel) -> None:
        port = self._ports[bind.port]
        client_socket = self._listener(bind.client)
        port.routes[bind.peer] = (bind.number, client_socket.send, bind.client)
        family = family_of(bind.peer[0])
        peer_socket = port.sockets[family]
        send = peer_socket.send
        public_host = self._public_hosts.get(family)
        if bind.peer[0] == public_host and bind.peer[1] in self._relay_ports:
            # Perhaps one of our own relayed addresses: that may change at any time.
            relayed_address = PeerAddress((public_host, bind.port))
            outside = peer_socket if bind.reaches_outside else None
            send = partial(self._send_perhaps_inside, relayed_address, outside)
        self._to_peer[bind.client, bind.number] = (send, bind.peer)

    def _unbind(self, unbind: UnbindChannel) -> None:
        del self._to_peer[unbind.client, unbind.number]
        del self._ports[unbind.port].routes[unbind.peer]

    def _send_perhaps_inside(
        self,
        relayed_address: PeerAddress,
        outside: RelaySocket | None,
        payload: memoryview,
        peer: PeerAddress,
    ) -> bool:
        """Send from *relayed_address* to a port of our own host: inside, if it is an allocation.

        No kernel, NAT or hairpin is needed for that. Otherwise the datagram goes *outside*,
        unless the peer was allowed as an allocation of ours only and is gone.
        """
        port = self._ports.get(peer[1])
        if port is not None and family_of(peer[0]) in port.sockets:
            self.on_peer_datagram(port.routes, len(payload), relayed_address)
            return True
        if outside is not None:
            return outside.send(payload, peer)
        self._drop(Drop.PEER_IS_GONE)
        return False

    def _listener(self, client: ClientAddress) -> Listener:
        return self._listeners[family_of(client[0][0])]

    def _drop(self, reason: Drop) -> None:
        self._counters.dropped[reason.value] += 1


class _Port:
    """An open relay port: its socket in each family, and the routes to the client."""

    __slots__ = ("routes", "sockets")

    def __init__(self) -> None:
        self.sockets: dict[Family, RelaySocket] = {}
        self.routes: dict[PeerAddress, ToClient] = {}

    def close(self) -> None:
        for sock in self.sockets.values():
            sock.close()
